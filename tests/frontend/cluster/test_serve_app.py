"""The Ray Serve application as it is described to Serve, without a cluster. Skipped without Ray."""

from __future__ import annotations

import asyncio
import os
import signal
from types import SimpleNamespace
from typing import Any

import pytest

from branchwise.frontend.cli import cluster as command
from branchwise.frontend.cluster.config import ClusterConfig
from branchwise.frontend.cluster.replica import stop_seconds
from branchwise.runtime.config import DISK_WRITE_SECONDS
from branchwise.runtime.errors import LoadError
from branchwise.runtime.server.engine_processes import EXIT_SECONDS

serve = pytest.importorskip("ray.serve")
serve_app = pytest.importorskip("branchwise.frontend.cluster.serve_app")

SERVER = {"null_executor": True}


def versions(application: Any) -> list[str | None]:
    """Of the deployments of an application: the gateway, and the engine that it is bound to."""
    gateway = application._bound_deployment
    return [gateway.version, gateway.init_args[1]._bound_deployment.version]


def test_autoscaling_is_what_the_file_says() -> None:
    assert serve_app.autoscaling_of(ClusterConfig(replicas=2)) is None
    settings = {"upscale_delay_s": 3, "downscale_delay_s": 9.5, "initial_replicas": 2}
    made = serve_app.autoscaling_of(ClusterConfig(replicas=1, max_replicas=4, autoscaling_config=settings))
    assert (made.min_replicas, made.max_replicas, made.target_ongoing_requests) == (1, 4, 32)
    assert {name: getattr(made, name) for name in settings} == settings


@pytest.mark.parametrize(
    "settings", [{"upscale_dely_s": 3}, {"upscale_delay_s": -1}, {"upscale_delay_s": "soon"}, {"initial_replicas": 9}]
)
def test_what_serve_does_not_take_is_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(LoadError, match="autoscaling_config"):
        serve_app.autoscaling_of(ClusterConfig(replicas=1, max_replicas=4, autoscaling_config=settings))


def test_the_number_of_replicas_is_no_part_of_the_version() -> None:
    first = versions(serve_app.make_app(ClusterConfig(server=SERVER), "s"))
    assert len(set(first)) == 1 and first[0] is not None
    autoscaled = ClusterConfig(server=SERVER, max_replicas=5, autoscaling_config={"upscale_delay_s": 1})
    assert versions(serve_app.make_app(autoscaled, "s")) == first
    assert versions(serve_app.make_app(ClusterConfig(server=SERVER), "t")) != first


def test_a_replica_that_stops_may_write_its_disk_cache() -> None:
    """Serve kills a replica after a time that begins when its requests may still take all of theirs."""
    config = ClusterConfig(server={**SERVER, "drain_delay": 40}, engine={"disk_cache": "/nowhere"}, drain_seconds=100)
    engine = serve_app.make_app(config, "s")._bound_deployment.init_args[1]._bound_deployment
    needed = 40 + 100 + EXIT_SECONDS + DISK_WRITE_SECONDS
    assert engine._deployment_config.graceful_shutdown_timeout_s > stop_seconds(config.replica("s")) > needed


def test_without_a_version_option_every_up_replaces_the_replicas(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A later Serve may drop the option, which is not public: the cluster starts, and says what is lost."""
    options = serve.Deployment.options

    def without(self: Any, **settings: Any) -> Any:
        if "_internal" in settings:
            raise TypeError("options() got an unexpected keyword argument '_internal'")
        return options(self, **settings)

    warnings: list[str] = []
    monkeypatch.setattr(serve.Deployment, "options", without)
    monkeypatch.setattr(serve_app.logger, "warning", warnings.append)
    application = serve_app.make_app(ClusterConfig(server=SERVER), "s")
    assert versions(application) == [None, None]
    assert [each for each in warnings if "replaces all replicas" in each]


@pytest.mark.parametrize(
    ("address", "variable", "runs", "asked"),
    [
        ("auto", None, True, ["auto"]),  # also another program's
        ("auto", None, False, ["auto", "local"]),
        ("auto", "local", True, ["local"]),
        ("local", "10.0.0.5:6379", True, ["local"]),
        ("10.0.0.5:6379", None, True, ["10.0.0.5:6379"]),
        ("10.0.0.5:6379", None, False, None),  # nothing else is started instead
    ],
)
@pytest.mark.parametrize("detach", [False, True])
def test_which_ray_cluster_is_joined(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    address: str,
    variable: str | None,
    runs: bool,
    asked: list[str] | None,
    detach: bool,
) -> None:
    calls: list[dict[str, Any]] = []

    def init(**arguments: Any) -> Any:
        calls.append(arguments)
        if arguments["address"] != "local" and not runs:
            raise ConnectionError("none")
        return SimpleNamespace(address_info={"gcs_address": "10.0.0.7:1"})

    monkeypatch.setattr("ray.init", init)
    monkeypatch.setenv("RAY_ADDRESS", variable or "")
    config = ClusterConfig(ray_address=address, replicas=3, num_cpus=0.5, num_gpus=0.5)
    if asked is None or (detach and asked[-1] == "local"):
        with pytest.raises(LoadError, match="no Ray cluster"):
            command._connect(config.ray_address, None if detach else config)
        assert "local" not in [each["address"] for each in calls]
        return
    command._connect(config.ray_address, None if detach else config)
    assert [each["address"] for each in calls] == asked
    if asked[-1] == "local":
        assert "RAY_ADDRESS" not in os.environ, "or Ray's own processes would join that one"
        assert (calls[-1]["num_cpus"], calls[-1]["num_gpus"]) == (3, 2)
    assert detach or "10.0.0.7:1" in capsys.readouterr().out


async def test_a_stalled_engine_is_not_a_dead_replica(start_cluster: Any) -> None:
    """A step may take long, on a CPU above all. Only the server's own limit ends it, and then Ray starts another."""
    cluster = await start_cluster(1, hang_timeout=8)
    [replica] = cluster.replicas.values()
    actor = SimpleNamespace(_process=replica)
    os.kill(replica._info["pids"]["scheduler"], signal.SIGSTOP)
    seen = set()
    async with asyncio.timeout(120):
        while "stalled" not in seen:
            await serve_app.EngineReplica.check_health(actor)
            seen.add(await replica.status())
        assert await replica.wait() == 1
    with pytest.raises(RuntimeError, match="does not answer"):
        await serve_app.EngineReplica.check_health(actor)
