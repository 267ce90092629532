"""The files of docs/deploy: what they run, probe and scrape exists."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import typer.main
import yaml
from prometheus_client.parser import text_string_to_metric_families

from branchwise.frontend.cli.main import app
from branchwise.frontend.cluster.config import ClusterConfig
from branchwise.runtime.server.http.plumbing.auth import OPEN_PATHS
from branchwise.runtime.server.http.plumbing.metrics import Metrics

ROOT = Path(__file__).resolve().parents[2]
DEPLOY = ROOT / "docs/deploy"
DOCKERFILES = ["Dockerfile", "Dockerfile.gpu"]


def check_serve(arguments: list[str]) -> dict[str, Any]:
    """What ``branchwise serve`` reads from them. Raises `click.UsageError` for a flag or value it does not take."""
    command = typer.main.get_command(app).commands["serve"]  # type: ignore[attr-defined]
    return dict(command.make_context("serve", list(arguments)).params)


def instructions(name: str) -> list[tuple[str, str]]:
    text = re.sub(r"^#.*\n", "", (DEPLOY / name).read_text(), flags=re.M).replace("\\\n", " ")
    return [(line.split()[0], line.split(maxsplit=1)[1]) for line in text.splitlines() if line.strip()]


def manifests() -> list[dict[str, Any]]:
    return list(yaml.safe_load_all((DEPLOY / "kubernetes.yaml").read_text()))


@pytest.mark.parametrize("name", DOCKERFILES)
def test_dockerfiles(name: str) -> None:
    found = instructions(name)
    assert {"FROM", "COPY", "RUN", "USER", "ENTRYPOINT", "HEALTHCHECK"} <= {word for word, _ in found}
    entry = json.loads(next(rest for word, rest in found if word == "ENTRYPOINT"))
    assert entry[:2] == ["branchwise", "serve"]
    assert check_serve(entry[2:])["host"] == "0.0.0.0"
    probe = json.loads(next(rest for word, rest in found if word == "HEALTHCHECK").partition(" CMD ")[2])
    compile(probe[2], name, "exec")
    assert [path for path in OPEN_PATHS if path in probe[2]]
    for line in (rest for word, rest in found if word == "RUN"):
        for path in re.findall(r"(?<=-c )\S+\.txt", line):
            assert (ROOT / path).is_file()
    assert next(rest for word, rest in reversed(found) if word == "USER") == "branchwise"
    assert re.fullmatch(
        r"[A-Za-z0-9./-]+:[a-z0-9.-]+( AS build)?", next(rest for word, rest in found if word == "FROM")
    )


def test_dockerignore_keeps_what_the_build_needs() -> None:
    for name in DOCKERFILES:
        ignored = (DEPLOY / f"{name}.dockerignore").read_text().split()
        needed = {"pyproject.toml", "README.md", "LICENSE", ".ci", "radix", "kernels", "runtime", "frontend"}
        assert not needed & set(ignored)


def test_compose() -> None:
    services = yaml.safe_load((DEPLOY / "compose.yaml").read_text())["services"]
    build = services["branchwise"]["build"]
    assert (DEPLOY / build["context"] / build["dockerfile"]).is_file()
    assert check_serve(services["branchwise"]["command"])["drain_delay"] == 5
    for volume in services["grafana"]["volumes"]:
        assert (DEPLOY / volume.split(":")[0]).is_file()
    (scrape,) = yaml.safe_load((DEPLOY / "prometheus.yml").read_text())["scrape_configs"]
    assert scrape["static_configs"][0]["targets"] == ["branchwise:8000"]
    assert scrape["metrics_path"] == "/metrics"


def test_compose_is_of_the_specification() -> None:
    pytest.importorskip("check_jsonschema")
    command = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", "vendor.compose-spec"]
    done = subprocess.run([*command, str(DEPLOY / "compose.yaml")], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("version", ["1.30", "1.33"])
def test_kubernetes_takes_the_manifests(version: str) -> None:
    """No field that the API does not know, and none of another type."""
    kubernetes_validate = pytest.importorskip("kubernetes_validate")
    for manifest in manifests():
        kubernetes_validate.validate(manifest, version, strict=True)
    wrong = manifests()[2]
    wrong["spec"]["template"]["spec"]["containers"][0]["livenessProb"] = {}
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(wrong, version, strict=True)


def test_prometheus_takes_the_dashboards_queries() -> None:
    promql_parser = pytest.importorskip("promql_parser")
    panels = json.loads((DEPLOY / "grafana/branchwise.json").read_text())["panels"]
    queries = [target["expr"] for panel in panels for target in panel["targets"]]
    for query in queries:
        promql_parser.parse(query.replace("$__rate_interval", "1m"))
    with pytest.raises(ValueError):
        promql_parser.parse("rate(branchwise_steps_total[1m]")


@pytest.mark.parametrize(
    ("tool", "arguments"),
    [
        ("hadolint", ["Dockerfile", "Dockerfile.gpu"]),
        ("promtool", ["check", "config", "--syntax-only", "prometheus.yml"]),
    ],
)
def test_tools_that_are_here_find_no_fault(tool: str, arguments: list[str]) -> None:
    program = shutil.which(tool)
    if program is None:
        pytest.skip(f"no {tool} here")
    done = subprocess.run([program, *arguments], cwd=DEPLOY, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_dashboard_shows_metrics_that_exist() -> None:
    families = text_string_to_metric_families(Metrics().render().decode())
    known = {sample.name for family in families for sample in family.samples}
    panels = json.loads((DEPLOY / "grafana/branchwise.json").read_text())["panels"]
    shown = {name for panel in panels for t in panel["targets"] for name in re.findall(r"branchwise_\w+", t["expr"])}
    assert len(shown) > 15
    assert shown <= known
    (source,) = yaml.safe_load((DEPLOY / "grafana/provisioning.yaml").read_text())["datasources"]
    assert {panel["datasource"]["uid"] for panel in panels} == {source["uid"]}


def test_kubernetes() -> None:
    service, claim, deployment = manifests()
    pod = deployment["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    read = check_serve(container["args"])
    assert read["drain_delay"] + read["drain_seconds"] < pod["terminationGracePeriodSeconds"]
    assert service["spec"]["selector"] == deployment["spec"]["template"]["metadata"]["labels"]
    port = container["ports"][0]
    assert port["name"] == service["spec"]["ports"][0]["targetPort"]
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        get = container[probe]["httpGet"]
        assert get["path"] in OPEN_PATHS
        assert get["port"] == port["name"]
    liveness = container["livenessProbe"]
    assert liveness["periodSeconds"] * liveness["failureThreshold"] > read["drain_delay"] + read["drain_seconds"]
    volumes = {volume["name"]: volume for volume in pod["volumes"]}
    assert {mount["name"] for mount in container["volumeMounts"]} == volumes.keys()
    assert volumes["storage"]["persistentVolumeClaim"]["claimName"] == claim["metadata"]["name"]


def kuberay() -> tuple[dict[str, Any], dict[str, Any]]:
    cluster, service = yaml.safe_load_all((DEPLOY / "kuberay.yaml").read_text())
    return cluster, service


@pytest.mark.parametrize("version", ["1.30", "1.33"])
def test_kubernetes_takes_kuberays_pods(version: str) -> None:
    kubernetes_validate = pytest.importorskip("kubernetes_validate")
    cluster, service = kuberay()
    kubernetes_validate.validate(service, version, strict=True)
    for group in (cluster["spec"]["headGroupSpec"], *cluster["spec"]["workerGroupSpecs"]):
        pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "one"}, **group["template"]}
        kubernetes_validate.validate(pod, version, strict=True)


def test_kuberay() -> None:
    cluster, service = kuberay()
    # The fields of ray.io/v1, by KubeRay's API reference.
    assert cluster["spec"].keys() <= {"rayVersion", "enableInTreeAutoscaling", "headGroupSpec", "workerGroupSpecs"}
    [group] = cluster["spec"]["workerGroupSpecs"]
    assert group.keys() == {"groupName", "replicas", "minReplicas", "maxReplicas", "rayStartParams", "template"}
    assert group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]
    head, worker = cluster["spec"]["headGroupSpec"]["template"]["spec"], group["template"]["spec"]
    [head_container], [worker_container] = head["containers"], worker["containers"]
    for pod, container in ((head, head_container), (worker, worker_container)):
        assert {mount["name"] for mount in container["volumeMounts"]} <= {each["name"] for each in pod["volumes"]}
        assert ClusterConfig().drain_seconds < pod["terminationGracePeriodSeconds"]
        # With this annotation a container's own command runs, and must start Ray; else it would run before Ray starts.
        assert cluster["metadata"]["annotations"]["ray.io/overwrite-container-cmd"] == "true"
        assert container["command"] and "$KUBERAY_GEN_RAY_START_CMD" in container["args"][0]
    ports = {port["name"]: port["containerPort"] for port in head_container["ports"]}
    assert ports[service["spec"]["ports"][0]["targetPort"]] == ClusterConfig().port
    assert ports["gcs-server"] == 6379, "workers join through the head's Service, which has only the named ports"
    assert "readinessProbe" not in head_container, "and must be ready before there are replicas"
    [line] = head_container["args"]
    words = line.rpartition("branchwise ")[2].split()
    assert words[:2] == ["cluster", "up"] and "up" in typer.main.get_command(app).commands["cluster"].commands  # type: ignore[attr-defined]


def test_systemd_unit(tmp_path: Path) -> None:
    text = (DEPLOY / "branchwise.service").read_text()
    command = shlex.split(re.search(r"^ExecStart=(.*)$", text, re.M)[1])  # type: ignore[index]
    assert command[1] == "serve"
    assert check_serve(command[2:])["api_key_file"] == "%d/api-key"
    analyze = shutil.which("systemd-analyze")
    if analyze is None:
        pytest.skip("no systemd-analyze here")
    unit = tmp_path / "branchwise.service"
    unit.write_text(text.replace(command[0], sys.executable))  # it looks whether the program exists
    done = subprocess.run([analyze, "verify", str(unit)], capture_output=True, text=True)
    assert "branchwise.service" not in done.stderr, done.stderr
