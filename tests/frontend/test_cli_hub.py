"""Models of the hub: what is asked before weights are downloaded, and what is said when it cannot be reached."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from branchwise.runtime.models.folder import SHIPPED

Command = Callable[..., subprocess.CompletedProcess[str]]


def test_the_hub_out_of_reach_is_said_without_class_names(
    branchwise: Command, unused_port: int, tmp_path: Path
) -> None:
    away = {"HF_ENDPOINT": f"http://127.0.0.1:{unused_port}", "HF_HOME": str(tmp_path), "NO_PROXY": "*"}
    done = branchwise("serve", "nobody/nothing", env=away)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: nobody/nothing: no such folder, and cannot reach the hub: ")
    assert line.endswith("; give a model's folder, or try again with a network")
    assert "Error" not in done.stderr.replace("error:", "")
    (fix,) = (line for line in branchwise("doctor", "nobody/nothing", env=away).stdout.splitlines() if "fix it" in line)
    assert fix.strip() == "fix it: branchwise pull nobody/nothing    (with a network)"


class Hub(BaseHTTPRequestHandler):
    """A hub with one model, ``some/model``: the shipped one's files, with another config."""

    requested: list[str] = []  # noqa: RUF012
    config: bytes = b""

    def do_GET(self) -> None:
        type(self).requested.append(self.path)
        files = [path for path in SHIPPED.iterdir() if path.is_file()]
        if "/tree/" in self.path:
            tree = [{"type": "file", "path": one.name, "oid": "0" * 40, "size": one.stat().st_size} for one in files]
            self._answer(json.dumps(tree).encode())
            return
        if self.path.startswith("/api/models/some/model"):
            siblings = [{"rfilename": path.name} for path in files]
            self._answer(json.dumps({"id": "some/model", "sha": "0" * 40, "siblings": siblings}).encode())
            return
        name = self.path.rpartition("/")[2]
        if not (SHIPPED / name).is_file():
            self.send_error(404)
            return
        self._answer(self.config if name == "config.json" else (SHIPPED / name).read_bytes())

    do_HEAD = do_GET

    def _answer(self, body: bytes) -> None:
        self.send_response(200)
        self.send_header("X-Repo-Commit", "0" * 40)
        self.send_header("ETag", f'"{hashlib.sha256(body).hexdigest()}"')
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[dict[str, str]]:
    Hub.requested, Hub.config = [], (SHIPPED / "config.json").read_bytes()
    httpd = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=httpd.serve_forever, daemon=True).start()
    yield {"HF_ENDPOINT": f"http://127.0.0.1:{httpd.server_port}", "HF_HOME": str(tmp_path), "NO_PROXY": "*"}
    httpd.shutdown()
    httpd.server_close()


def test_doctor_downloads_no_weights(branchwise: Command, hub: dict[str, str]) -> None:
    done = branchwise("doctor", "some/model", "--device", "cpu", env=hub)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "LlamaForCausalLM, served natively" in done.stdout
    assert "KV tokens" in done.stdout and "HTTP Request" not in done.stdout + done.stderr
    assert any(path.endswith("/config.json") for path in Hub.requested)
    assert not any(path.endswith(".safetensors") for path in Hub.requested)


def test_a_model_that_cannot_be_served_is_refused_before_its_weights_are_downloaded(
    branchwise: Command, hub: dict[str, str]
) -> None:
    Hub.config = json.dumps(json.loads(Hub.config) | {"num_hidden_layers": 1_000_000}).encode()
    done = branchwise("serve", "--model", "some/model", "--port", "0", "--device", "cpu", env=hub)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1 and done.stderr.startswith("error: ")
    assert done.stdout == "" and not any(path.endswith(".safetensors") for path in Hub.requested)


def test_pull_downloads_a_model_and_prints_its_folder(branchwise: Command, hub: dict[str, str]) -> None:
    done = branchwise("pull", "some/model", env=hub)
    assert done.returncode == 0, done.stderr
    folder = Path(done.stdout.splitlines()[-1])
    assert (folder / "model.safetensors").read_bytes() == (SHIPPED / "model.safetensors").read_bytes()


def test_pull_refuses_what_cannot_be_served_before_its_weights_are_downloaded(
    branchwise: Command, hub: dict[str, str]
) -> None:
    Hub.config = json.dumps(json.loads(Hub.config) | {"architectures": ["MambaForCausalLM"]}).encode()
    done = branchwise("pull", "some/model", env=hub)
    assert done.returncode == 2 and "MambaForCausalLM" in done.stderr and len(done.stderr.splitlines()) == 1
    assert not any(path.endswith(".safetensors") for path in Hub.requested)


def test_in_process_the_hub_out_of_reach_is_no_page_of_tracebacks(unused_port: int, tmp_path: Path) -> None:
    away = {"HF_ENDPOINT": f"http://127.0.0.1:{unused_port}", "HF_HOME": str(tmp_path), "NO_PROXY": "*"}
    program = "from branchwise.runtime.models.folder import model_folder\nmodel_folder('nobody/nothing')"
    done = subprocess.run([sys.executable, "-c", program], env=os.environ | away, capture_output=True, text=True)
    assert done.stderr.splitlines()[-1].startswith(
        "branchwise.runtime.errors.HubUnreachable: nobody/nothing: no such folder"
    )
    assert done.stderr.count("Traceback") == 1
