"""The Ray Serve application, whole: ``branchwise cluster up``. Skipped without Ray."""

from __future__ import annotations

import contextlib
import itertools
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from base64 import urlsafe_b64encode
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import pytest

from branchwise.runtime.fleet.instances import instance_tag

pytest.importorskip("ray")

CONFIG = """
port: {port}
replicas: {replicas}
routers: 2
num_cpus: 0.5
drain_seconds: 60
ray_address: {ray}
engine: {{kv_cache_tokens: 32768, max_model_len: {length}}}
server: {{null_executor: true, null_step_seconds: 0.01, stats_log_seconds: 0}}
"""
UP = [sys.executable, "-m", "branchwise", "cluster", "up"]
GATEWAY = b"ray::ServeReplica:branchwise:gateway"
PROXY = b"ray::ProxyActor"


def environment(folder: Path) -> dict[str, str]:
    """Of a cluster of its own: Ray keeps its sockets and logs in RAY_TMPDIR/ray. A Ray that is started here demands a
    token; one that is joined by its address is sent it only in this mode."""
    own = {"XDG_STATE_HOME": str(folder), "RAY_TMPDIR": str(folder), "RAY_AUTH_MODE": "token"}
    own["RAY_SERVE_PROXY_HEALTH_CHECK_PERIOD_S"] = "1"  # Serve notices a killed proxy so soon, instead of after 10 s
    return {**os.environ, "OMP_NUM_THREADS": "1", "RAY_USAGE_STATS_ENABLED": "0", **own}


# One replica, or two while they have more than four requests on average.
AUTOSCALED = """
max_replicas: 2
target_ongoing_requests: 4
autoscaling_config: {upscale_delay_s: 1, downscale_delay_s: 1, metrics_interval_s: 0.5, look_back_period_s: 2}
"""


def ids(n: int, start: int = 3) -> list[int]:
    return [(start + 11 * i) % 300 + 5 for i in range(n)]


class Cluster(NamedTuple):
    http: httpx.Client
    process: subprocess.Popen[str]
    folder: Path
    port: int
    ray: str  # address

    def config(self, replicas: int, length: int = 4096) -> str:
        return CONFIG.format(port=self.port, replicas=replicas, length=length, ray=self.ray)

    def change(self, pool: ThreadPoolExecutor, replicas: int, length: int = 4096) -> int:
        """``up`` again. Requests during it are all answered; returns how many there were."""
        changing = pool.submit(self.up, self.config(replicas, length))
        asked = 0
        while not changing.done():
            assert self.ask(ids(50, asked)).status_code == 200
            asked += 1
            time.sleep(0.1)
        changing.result()
        eventually(lambda: len(self.replicas()) == replicas)
        return asked

    def up(self, text: str) -> None:
        """``up`` with another file."""
        file = self.folder / "changed.yaml"
        file.write_text(text)
        subprocess.run([*UP, str(file), "--detach"], env=environment(self.folder), check=True, timeout=600)

    def cached(self, prompt: list[int], **headers: str) -> int:
        """Tokens of a prompt that were cached where it was sent."""
        answer = self.ask(prompt, **headers)
        assert answer.status_code == 200, answer.text
        return answer.json()["usage"]["prompt_tokens_details"]["cached_tokens"]

    def ask(self, tokens: list[int], max_tokens: int = 1, **headers: str) -> httpx.Response:
        return self.http.post("/v1/completions", json={"prompt": tokens, "max_tokens": max_tokens}, headers=headers)

    def replicas(self) -> set[str]:
        """Names of the replicas that requests are routed to."""
        return {name for name in self.servers() if self.info(name).status_code == 200}

    def servers(self) -> dict[str, int]:
        """Process ids of the replicas' servers, by the replicas' names."""
        found = {}
        for pid in self.processes(b"branchwise.frontend.cluster.child"):
            with contextlib.suppress(OSError):
                words = (Path("/proc") / str(pid) / "cmdline").read_bytes().split(b"\0")
                if len(words) > 1:  # a process that has ended meanwhile has none
                    found[words[-2].decode()] = pid
        return found

    def processes(self, title: bytes) -> list[int]:
        """Ids of the processes whose command line has ``title``. Other tests run such processes too: these have this
        cluster's environment."""
        found, own = [], f"XDG_STATE_HOME={self.folder}".encode()
        for entry in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                if title in (entry / "cmdline").read_bytes() and own in (entry / "environ").read_bytes().split(b"\0"):
                    found.append(int(entry.name))
        return found

    def info(self, name: str) -> httpx.Response:
        return self.http.get("/server_info", headers={"x-branchwise-replica": name})

    def stream(self, tokens: list[int], max_tokens: int) -> str:
        """How a streamed request ended: done; error, for an error event; broken, for a connection that closed."""
        body = {"prompt": tokens, "max_tokens": max_tokens, "stream": True}
        try:
            with self.http.stream("POST", "/v1/completions", json=body) as answer:
                lines = [line for line in answer.iter_lines() if line]
        except httpx.TransportError as error:
            assert not isinstance(error, httpx.TimeoutException), "a stream must end"
            return "broken"
        if answer.status_code != 200 or any('"error"' in line for line in lines):
            return "error"
        return "done" if lines[-1:] == ["data: [DONE]"] else "broken"

    def in_flight(self, names: set[str]) -> int:
        """Requests of these replicas that have not ended; -1 while a replica is not reached, as through a new proxy."""
        answers = [self.info(name) for name in names]
        reached = all(answer.status_code == 200 for answer in answers)
        return sum(answer.json()["requests_in_flight"] for answer in answers) if reached else -1


def unused_port() -> int:
    """A port that nobody listens on, and that the kernel gives to nobody who asks for any port: Serve's proxy takes it
    many seconds later."""
    lowest_given = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    for port in range(10_000 + os.getpid() % 10_000, lowest_given):
        with contextlib.suppress(OSError), socket.create_server(("127.0.0.1", port)):
            return port
    raise AssertionError("every port is taken")


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    port = unused_port()
    folder = Path(tempfile.mkdtemp(prefix="cluster-"))  # a short path: Ray's sockets are in it
    try:
        yield from running(folder, port)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def running(folder: Path, port: int) -> Iterator[Cluster]:
    file = folder / "cluster.yaml"
    file.write_text(CONFIG.format(port=port, replicas=2, length=4096, ray="local"))
    process = subprocess.Popen([*UP, str(file)], stdout=subprocess.PIPE, text=True, env=environment(folder))
    assert process.stdout is not None
    ray = ""
    for line in process.stdout:
        if "started Ray at" in line:
            ray = line.split()[-1]
        if "ready" in line:
            break
    else:
        raise AssertionError(f"it did not start: {process.wait()}")
    with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60) as http:
        yield Cluster(http, process, folder, port, ray)
    if process.poll() is None:
        process.send_signal(signal.SIGTERM)
    assert process.wait(240) == 0


@pytest.fixture
def threads() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(16) as pool:
        yield pool


def home(answer: httpx.Response) -> str:
    assert answer.status_code == 200, answer.text
    return answer.headers["x-branchwise-replica"]


def eventually(true: Any, seconds: float = 240.0) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.2)


def test_prompts_go_where_they_are_cached(cluster: Cluster) -> None:
    """By both routers, from the replicas' first reports on, which say where events are published."""
    prompts = [ids(400, 37 * number) for number in range(6)]

    def routed() -> bool:
        """By chance once in 260,000 times."""
        cluster.http.post("/flush_cache")
        homes = [home(cluster.ask(prompt, 2)) for prompt in prompts]
        answers = [cluster.ask(prompt, 2) for _ in range(3) for prompt in prompts]
        cached = {answer.json()["usage"]["prompt_tokens_details"]["cached_tokens"] for answer in answers}
        return [home(answer) for answer in answers] == 3 * homes and cached == {399} and len(set(homes)) == 2

    eventually(routed, 600)
    chat = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 5, "stream": True}
    assert cluster.http.post("/v1/chat/completions", json=chat).text.rstrip().endswith("data: [DONE]")
    assert cluster.http.post("/flush_cache").json()["evicted_pages"] > 6 * 25


def test_branches_of_all_replicas_are_reached_by_every_router(cluster: Cluster) -> None:
    """A batch is split by the replicas that made its branches; what is gone has its error in its place."""
    http = cluster.http
    branches: dict[str, str] = {}
    for number in range(16):
        made = http.post("/branches", json={"input_ids": ids(100, 41 * number)})
        branches[home(made)] = made.json()["id"]
        if len(branches) == 2:
            break
    [(first, one), (_, two)] = branches.items()
    for _ in range(4):
        assert home(http.get(f"/branches/{one}")) == first
    unknown = "b" + urlsafe_b64encode(instance_tag("nobody") + bytes(18)).decode()
    ops = [
        {"op": "fork", "id": one, "n": 2},
        {"op": "extend", "id": two, "input_ids": [7]},
        {"op": "delete", "id": unknown},
        {"op": "create", "input_ids": ids(20)},
        {"op": "create", "parent": two},
    ]
    answer = http.post("/branches/batch", json={"ops": ops})
    forked, extended, gone, created, child = answer.json()["results"]
    assert (extended["num_tokens"], created["num_tokens"], child["num_tokens"]) == (101, 20, 101)
    assert gone["status"] == 410 and "gone" in gone["error"]["message"]
    assert http.get(f"/branches/{unknown}").status_code == 410
    children = {"ops": [{"op": "extend", "id": id, "input_ids": [9]} for id in forked["ids"]]}
    answer = http.post("/branches/batch", json=children)
    assert home(answer) == first and [each["num_tokens"] for each in answer.json()["results"]] == [101, 101]
    assert http.get("/branches").json()["branches"] >= 6
    ran = http.post(f"/branches/{child['id']}/generate", json={"sampling_params": {"max_new_tokens": 3}})
    assert home(ran) == home(http.get(f"/branches/{two}"))


def test_a_killed_server_is_replaced_and_its_clients_get_one_error(cluster: Cluster) -> None:
    body = {"prompt": ids(64), "max_tokens": 2000, "stream": True}
    with cluster.http.stream("POST", "/v1/completions", json=body) as answer:
        lines = answer.iter_lines()
        assert next(lines).startswith("data: {")
        name = answer.headers["x-branchwise-replica"]
        os.kill(cluster.servers()[name], signal.SIGKILL)
        errors = [line for line in lines if '"error"' in line]
    assert len(errors) == 1 and "replica" in errors[0]
    assert cluster.ask(ids(64)).status_code == 200, "the others serve"
    eventually(lambda: len(cluster.replicas() - {name}) == 2)


@pytest.mark.parametrize("title", [GATEWAY, PROXY])
def test_a_killed_gateway_ends_its_own_streams_and_leaves_nothing(
    cluster: Cluster, threads: ThreadPoolExecutor, title: bytes
) -> None:
    """A gateway, or Serve's HTTP proxy in front of them: its streams break, their requests are aborted on the replicas,
    another one answers."""
    names = cluster.replicas()
    streams = [threads.submit(cluster.stream, ids(64, 37 * number), 1600) for number in range(10)]
    eventually(lambda: cluster.in_flight(names) == 10)
    os.kill(cluster.processes(title)[0], signal.SIGKILL)
    ends = [stream.result(120) for stream in streams]
    assert set(ends) <= {"done", "error", "broken"} and ends.count("done") < 10
    if title == GATEWAY:
        assert "done" in ends, "the streams of the other gateway go on"

    def answers() -> bool:
        try:
            return cluster.ask(ids(64)).status_code == 200
        except httpx.TransportError:
            return False

    eventually(answers)
    eventually(lambda: cluster.in_flight(names) == 0)
    for name in names:

        def clean(name: str = name) -> bool:
            check = cluster.http.get("/cache/check", headers={"x-branchwise-replica": name})
            return bool(check.status_code == 200 and check.json() == {"check": "clean"})

        eventually(clean)


def test_more_or_fewer_replicas_leave_the_others_as_they_are(cluster: Cluster, threads: ThreadPoolExecutor) -> None:
    """2, 3 and 2 replicas: those that stay are the same processes with the same cache; the new one is warmed, the one
    that goes finishes its requests."""

    def tokens(name: str) -> int:
        tree = cluster.http.get("/cache/tree", headers={"x-branchwise-replica": name})
        return tree.json()["totals"]["cached"]

    def streams(names: set[str]) -> list[Future[str]]:
        found = [threads.submit(cluster.stream, ids(64, 37 * number), 1000) for number in range(6)]
        eventually(lambda: cluster.in_flight(names) == 6)
        return found

    first, gateways = cluster.replicas(), set(cluster.processes(GATEWAY))
    before = cluster.servers()
    assert before.keys() == first
    prompts = [ids(400, 41 * number) for number in range(8)]
    eventually(lambda: [cluster.cached(prompt) for prompt in prompts] == [399] * 8)
    held = {name: tokens(name) for name in first}
    running = streams(first)
    assert cluster.change(threads, 3)
    assert [stream.result(120) for stream in running] == ["done"] * 6
    second = cluster.replicas()
    [new] = second - first
    warmed = [cluster.cached([*prompt, 7], **{"x-branchwise-replica": new}) for prompt in prompts]
    assert sum(count >= 384 for count in warmed) >= 2, "the prompts of one of the others"
    assert before.items() < cluster.servers().items() and set(cluster.processes(GATEWAY)) == gateways
    assert all(tokens(name) >= count for name, count in held.items())
    assert [cluster.cached(prompt) for prompt in prompts] == [399] * 8
    before, held = cluster.servers(), {name: tokens(name) for name in second}
    running = streams(second)
    assert cluster.change(threads, 2)
    assert [stream.result(120) for stream in running] == ["done"] * 6
    third = cluster.replicas()
    assert third < second
    eventually(lambda: cluster.servers() == {name: before[name] for name in third})
    assert all(tokens(name) >= held[name] for name in third) and set(cluster.processes(GATEWAY)) == gateways


def test_a_changed_flag_replaces_all_replicas_which_finish_their_requests(
    cluster: Cluster, threads: ThreadPoolExecutor
) -> None:
    before = cluster.replicas()
    streams = [threads.submit(cluster.stream, ids(64, 37 * number), 1000) for number in range(6)]
    eventually(lambda: cluster.in_flight(before) == 6)
    assert cluster.change(threads, 2, length=4000)
    assert [stream.result(120) for stream in streams] == ["done"] * 6
    eventually(lambda: len(cluster.replicas() - before) == len(cluster.servers()) == 2)
    too_long = cluster.ask(ids(4050))
    assert too_long.status_code == 400 and "4000" in too_long.text


@pytest.mark.timeout(1200)
def test_replicas_follow_the_load(cluster: Cluster, threads: ThreadPoolExecutor) -> None:
    """Load starts a second replica, which is warmed before it takes requests. When the load is gone one of them stops,
    and finishes its requests first."""
    cluster.up(cluster.config(1, length=4000) + AUTOSCALED)
    eventually(lambda: len(cluster.servers()) == len(cluster.replicas()) == 1, 600)
    [first] = cluster.replicas()
    prompts = [ids(400, 41 * number) for number in range(8)]
    for prompt in [*prompts, *prompts]:  # what is used more than once is warmed
        assert home(cluster.ask(prompt)) == first
    scaled = threading.Event()

    def load(number: int) -> set[str]:
        """Of prompts that are not repeated, and so not warmed."""
        ends = set()
        for each in itertools.count():
            if scaled.is_set():
                return ends
            ends.add(cluster.stream([5 + number, 5 + each % 300, *ids(62)], 200))
        raise AssertionError

    loads = [threads.submit(load, number) for number in range(12)]
    try:
        eventually(lambda: len(cluster.replicas()) == 2, 600)
        [second] = cluster.replicas() - {first}
        warmed = [cluster.cached([*prompt, 7], **{"x-branchwise-replica": second}) for prompt in prompts]
    finally:
        scaled.set()
    assert {end for each in loads for end in each.result(600)} == {"done"}
    assert sum(count >= 384 for count in warmed) >= 4, "only warming has computed them there"
    streams = [threads.submit(cluster.stream, ids(64, 37 * number), 1200) for number in range(2)]
    eventually(lambda: len(cluster.servers()) == 1, 600)
    assert [stream.result(600) for stream in streams] == ["done", "done"]


def test_the_secret_is_nowhere_but_in_its_file(cluster: Cluster) -> None:
    file = cluster.folder / "branchwise" / "cluster-branchwise" / "secret"
    assert file.stat().st_mode & 0o777 == 0o600 and file.parent.stat().st_mode & 0o777 == 0o700
    secret = file.read_bytes().hex().encode()
    assert not cluster.processes(secret)
    logs = [path for path in (cluster.folder / "ray" / "session_latest" / "logs").rglob("*") if path.is_file()]
    assert logs and not [path for path in logs if secret in path.read_bytes()]


def test_a_cluster_that_is_stopped_finishes_its_requests(cluster: Cluster, threads: ThreadPoolExecutor) -> None:
    names = cluster.replicas()
    streams = [threads.submit(cluster.stream, ids(64, 37 * number), 1000) for number in range(4)]
    eventually(lambda: cluster.in_flight(names) == 4)
    cluster.process.send_signal(signal.SIGTERM)
    assert [stream.result(120) for stream in streams] == ["done"] * 4
    assert cluster.process.wait(240) == 0
    assert not cluster.servers()
