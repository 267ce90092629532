"""Runs Claude Code and Codex against a server of this repository, through several turns with tool calls.

    npm install --prefix /tmp/clients @anthropic-ai/claude-code@2.1.197 @openai/codex@0.171.0
    python tests/clients/coding_agents.py --bin /tmp/clients/node_modules/.bin

The model is random, with a long context and a chat template that writes tools. A random model calls no tools, so a
small proxy between client and server forces them: it sets ``tool_choice`` to a harmless tool for the first requests of
a run and a schema with one value for the last answer. Everything else of the requests is passed on as it is.

A client that is not installed is skipped. Exit code 0: every client ended well and had its calls answered, and every
response was a 200.
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import checkpoints

CONTEXT = 262_144  # tokens
TURNS = 2  # forced calls of each run of a client
TEMPLATE = Path(__file__).parents[1] / "runtime" / "chat" / "templates" / "qwen2.5.jinja"


class Proxy(ThreadingHTTPServer):
    """Forwards to the server, after ``change(body)`` has changed the JSON body of a POST."""

    daemon_threads = True

    def __init__(self, port: int, change: Callable[[dict[str, Any]], None]) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.upstream = port
        self.change = change
        self.seen: list[tuple[str, int, dict[str, Any], bytes]] = []  # path, status, body as sent, answer


class _Handler(BaseHTTPRequestHandler):
    server: Proxy
    protocol_version = "HTTP/1.0"  # the answer ends with the connection

    def _forward(self) -> None:
        data = self.rfile.read(int(self.headers.get("content-length") or 0))
        body: dict[str, Any] = json.loads(data) if data else {}
        if self.command == "POST":
            self.server.change(body)
            data = json.dumps(body).encode()
        headers = {name: value for name, value in self.headers.items() if name.lower() not in _OWN}
        upstream = http.client.HTTPConnection("127.0.0.1", self.server.upstream, timeout=600)
        upstream.request(self.command, self.path, data or None, headers)
        answer = upstream.getresponse()
        self.send_response(answer.status)
        for name, value in answer.getheaders():
            if name.lower() not in _OWN:
                self.send_header(name, value)
        self.end_headers()
        pieces = []
        while piece := answer.read1(65_536):
            pieces.append(piece)
            self.wfile.write(piece)
        self.server.seen.append((self.path, answer.status, body, b"".join(pieces)))

    do_GET = do_POST = do_HEAD = _forward

    def log_message(self, *_: Any) -> None:
        pass


_OWN = {"host", "connection", "content-length", "transfer-encoding", "accept-encoding"}


@contextmanager
def serving(folder: Path) -> Iterator[int]:
    """A server of a random model; its port."""
    model = checkpoints.build("llama-gqa", folder / "model", max_position_embeddings=CONTEXT)
    settings = json.loads((model / "tokenizer_config.json").read_text())
    settings["chat_template"] = TEMPLATE.read_text()
    (model / "tokenizer_config.json").write_text(json.dumps(settings))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = int(free.getsockname()[1])
    command = [sys.executable, "-m", "branchwise", "serve", str(model), "--port", str(port), "--device", "cpu"]
    with (folder / "server.log").open("wb") as log:
        server = subprocess.Popen(
            [*command, "--kv-cache-tokens", str(CONTEXT * 2), "--served-model-name", "branchwise"],
            stdout=log,
            stderr=log,
        )
    try:
        for _ in range(600):
            time.sleep(0.5)
            if server.poll() is not None:
                raise SystemExit((folder / "server.log").read_text()[-2000:])
            if _is_ready(port):
                break
        yield port
    finally:
        server.terminate()
        server.wait(60)


def _is_ready(port: int) -> bool:
    try:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
        connection.request("GET", "/health")
        return connection.getresponse().status == 200
    except OSError:
        return False


@contextmanager
def proxied(port: int, change: Callable[[dict[str, Any]], None]) -> Iterator[Proxy]:
    with Proxy(port, change) as proxy:
        threading.Thread(target=proxy.serve_forever, daemon=True).start()
        yield proxy
        proxy.shutdown()


# -- the clients -------------------------------------------------------------------------------------------------------


def claude_code(binary: str, port: int, folder: Path) -> list[str]:
    """Two runs, the second of which continues the first; the problems found."""

    def change(body: dict[str, Any]) -> None:
        if forced.next("TaskList", body):
            body["tool_choice"] = {"type": "tool", "name": "TaskList", "disable_parallel_tool_use": True}
        else:
            body["output_config"] = {"format": {"type": "json_schema", "schema": {"enum": ["Done."]}}}

    forced = Forced()
    with proxied(port, change) as proxy:
        environment = {
            "ANTHROPIC_BASE_URL": f"http://127.0.0.1:{proxy.server_port}",
            "ANTHROPIC_API_KEY": "none",
            "CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC": "1",
        }
        command = [binary, "--model", "branchwise", "--allowedTools", "TaskList", "-p"]
        problems = _run([*command, "List your tasks."], environment, folder)
        forced.count = 0
        problems += _run([*command, "--continue", "And again."], environment, folder)
        return problems + _judge(proxy, "/v1/messages", "tool_result", "cache_read_input_tokens")


def codex(binary: str, port: int, folder: Path) -> list[str]:
    """Two runs, the second of which resumes the first; the problems found."""

    def change(body: dict[str, Any]) -> None:
        if forced.next("get_goal", body):
            body["tool_choice"], body["parallel_tool_calls"] = {"type": "function", "name": "get_goal"}, False
        else:
            body["text"] = {"format": {"type": "json_schema", "name": "end", "schema": {"enum": ["Done."]}}}

    forced = Forced()
    with proxied(port, change) as proxy:
        settings = folder / ".codex" / "config.toml"
        settings.parent.mkdir()
        settings.write_text(
            'model = "branchwise"\nmodel_provider = "bw"\n[model_providers.bw]\nname = "Branchwise"\n'
            f'base_url = "http://127.0.0.1:{proxy.server_port}/v1"\nwire_api = "responses"\nenv_key = "BW_KEY"\n'
        )
        environment = {"BW_KEY": "none"}
        command = [binary, "exec", "--skip-git-repo-check"]
        problems = _run([*command, "What is your goal?"], environment, folder)
        forced.count = 0
        problems += _run([*command, "resume", "--last", "And now?"], environment, folder)
        return problems + _judge(proxy, "/v1/responses", "function_call_output", "cached_tokens")


class Forced:
    """Counts the forced calls of one run: the first `TURNS` requests that offer the tool."""

    def __init__(self) -> None:
        self.count = 0

    def next(self, tool: str, body: dict[str, Any]) -> bool:
        if self.count == TURNS or tool not in [offered.get("name") for offered in body.get("tools", [])]:
            return False
        self.count += 1
        return True


def _run(command: list[str], environment: dict[str, str], folder: Path) -> list[str]:
    done = subprocess.run(
        command,
        env={"PATH": os.environ["PATH"], "HOME": str(folder), **environment},
        cwd=folder,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=900,
    )
    return [] if done.returncode == 0 else [f"exit code {done.returncode}: {(done.stdout + done.stderr)[-600:]}"]


def _judge(proxy: Proxy, path: str, result: str, cached: str) -> list[str]:
    """What was wrong with the requests to ``path``; prints what each took."""
    requests = [seen for seen in proxy.seen if seen[0].startswith(path)]
    problems = [f"{status}: {answer[:300]!r}" for _, status, _, answer in requests if status != 200]
    for _, status, body, answer in requests:
        counts = [part.split(b":")[1].split(b",")[0].strip(b" }") for part in answer.split(cached.encode())[1:]]
        print(f"  {path} {status}: {len(json.dumps(body))} characters, {cached} {max(map(int, counts), default=0)}")
    results = json.dumps(requests[-1][2]).count(f'"{result}"') if requests else 0
    if results < 2 * TURNS:
        problems.append(f"the last request has {results} results of calls, not {2 * TURNS}")
    return problems


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--bin", default="", help="folder of the clients; default: PATH")
    path = parser.parse_args().bin or os.environ["PATH"]
    found = {run: binary for run in (claude_code, codex) if (binary := shutil.which(_NAMES[run], path=path))}
    if not found:
        print("neither claude nor codex is installed")
        return 0
    failed = False
    with tempfile.TemporaryDirectory() as folder, serving(Path(folder)) as port:
        for run, binary in found.items():
            home = Path(folder) / run.__name__
            home.mkdir()
            print(run.__name__)
            problems = run(str(Path(binary).resolve()), port, home)
            print("\n".join(f"  PROBLEM {problem}" for problem in problems) or "  well")
            failed |= bool(problems)
    return int(failed)


_NAMES = {claude_code: "claude", codex: "codex"}

if __name__ == "__main__":
    raise SystemExit(main())
