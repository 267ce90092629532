"""What happens when a part of a cluster fails: three replicas of the null model, each in processes of its own."""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import signal
from collections import Counter
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest

from branchwise.frontend.cluster.forward import ForwardedRequest, Head, ReplicaGone


def ids(n: int, start: int = 3) -> list[int]:
    return [(start + 11 * i) % 300 + 5 for i in range(n)]


async def stream(http: httpx.AsyncClient, body: dict[str, Any], path: str = "/v1/completions") -> tuple[str, str]:
    """One streamed request: who answered, and how it ended: done, or an error."""
    async with http.stream("POST", path, json={**body, "stream": True}) as answer:
        assert answer.status_code == 200, await answer.aread()
        name, lines = answer.headers["x-branchwise-replica"], [line async for line in answer.aiter_lines() if line]
    errors = [line for line in lines if line.startswith("data:") and ("error" in json_of(line))]
    done = lines[-1] == "data: [DONE]" or "message_stop" in lines[-1]
    assert len(errors) + done == 1, lines[-3:]
    return name, "error" if errors else "done"


def json_of(line: str) -> Any:
    text = line.removeprefix("data: ")
    return {} if text == "[DONE]" else json.loads(text)


async def test_a_replica_killed_in_mid_stream_ends_its_own_streams_only(start_cluster: Any) -> None:
    cluster = await start_cluster(3, null_step_seconds=0.02)
    gateway = await cluster.gateway()
    model = (await gateway.http.get("/v1/models")).json()["data"][0]["id"]
    bodies = [{"prompt": ids(64, 37 * number), "max_tokens": 400} for number in range(9)]
    tasks = [asyncio.create_task(stream(gateway.http, body)) for body in bodies]
    said = {"model": model, "max_tokens": 400, "messages": [{"role": "user", "content": "hi"}]}
    tasks.append(asyncio.create_task(stream(gateway.http, said, "/v1/messages")))
    while gateway.view.router._loads[1].sum() < len(tasks):  # until each has a first token
        assert not any(task.done() for task in tasks)
        await asyncio.sleep(0.01)
    victim = next(iter(cluster.replicas.values()))
    os.kill(victim.pid, signal.SIGKILL)
    ends = Counter(await asyncio.gather(*tasks))
    assert ends[victim.name, "error"] >= 3, "each of its clients gets one error"
    assert ends[victim.name, "done"] == 0
    assert all(end == "done" for name, end in ends if name != victim.name)
    answers = [await stream(gateway.http, {**body, "max_tokens": 2}) for body in bodies]
    assert {end for _, end in answers} == {"done"} and len({name for name, _ in answers}) == 2


async def test_a_killed_gateway_leaves_the_others_as_they_were(start_cluster: Any) -> None:
    cluster = await start_cluster(3)
    first, second = await cluster.gateway(), await cluster.gateway()
    homes = [(await stream(first.http, {"prompt": ids(320, 37 * n), "max_tokens": 2}))[0] for n in range(6)]
    await second.caught_up()
    await first.stop()
    cluster.gateways.remove(first)
    again = [(await stream(second.http, {"prompt": ids(320, 37 * n), "max_tokens": 2}))[0] for n in range(6)]
    assert again == homes, "it knows from the replicas' events what the other one sent where"
    third = await cluster.gateway()
    late = [(await stream(third.http, {"prompt": ids(320, 37 * n), "max_tokens": 2}))[0] for n in range(6)]
    assert late == homes, "one that starts late takes a snapshot"


async def test_lost_events_are_asked_for_again_or_replaced_by_a_snapshot(start_cluster: Any) -> None:
    cluster = await start_cluster(3)
    gateway = await cluster.gateway()
    for replay in (True, False):
        await stream(gateway.http, {"prompt": ids(64, 3 + replay), "max_tokens": 2})
        for _, follower in gateway.view._followers.values():
            follower._last -= 1  # as if the last batch had never come
            if not replay:
                follower._replay_address = None
        homes = [(await stream(gateway.http, {"prompt": ids(400, 7 * n), "max_tokens": 2}))[0] for n in range(6)]
        await gateway.caught_up()
        assert sum(follower.gaps for _, follower in gateway.view._followers.values()) >= 3
        for number, home in enumerate(homes):
            assert (await stream(gateway.http, {"prompt": ids(400, 7 * number), "max_tokens": 2}))[0] == home
        for name, number in gateway.view._numbers.items():
            seen = await cluster.replicas[name].snapshot()
            there = {each for event in json.loads(seen)["batch"][1] for each in event["block_hashes"]}
            assert gateway.view.router.index._blocks[0][number] == there
        await gateway.http.post("/flush_cache")
        await gateway.caught_up()


async def test_a_request_that_fails_is_tried_on_another_replica(
    start_cluster: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also while the one that failed it counts as running and has its prompt cached: it would fail every try."""
    cluster = await start_cluster(2)
    gateway = await cluster.gateway()
    body = {"prompt": ids(400), "max_tokens": 2}
    home, _ = await stream(gateway.http, body)
    await gateway.caught_up()
    tries: list[str] = []

    async def closes(_: ForwardedRequest) -> AsyncIterator[Head | bytes]:
        tries.append(home)
        raise ReplicaGone("it closed the connection", home)
        yield b""

    monkeypatch.setattr(cluster.replicas[home], "forward", closes)
    answers = [
        await gateway.http.post("/v1/completions", json=body, headers=headers)
        for headers in ({}, {"x-session-id": "s", "x-branchwise-replica": home})
    ]
    assert [answer.status_code for answer in answers] == [200, 200] and len(tries) == 2
    assert home in cluster.replicas and home not in {answer.headers["x-branchwise-replica"] for answer in answers}
    del cluster.replicas[answers[0].headers["x-branchwise-replica"]]
    assert (await gateway.http.post("/v1/completions", json=body)).status_code == 503 and len(tries) == 5, "no other"


async def test_an_engine_that_restarts_is_followed_again(start_cluster: Any) -> None:
    """Its server stays, and publishes its events elsewhere."""
    cluster = await start_cluster(1, restart=1)
    gateway = await cluster.gateway()
    [replica] = cluster.replicas.values()
    body = {"prompt": ids(400), "max_tokens": 2}
    await stream(gateway.http, body)
    await gateway.caught_up()
    before = (await replica.report()).kv_events

    async def restarted() -> bool:
        try:
            return (await replica.report()).kv_events != before
        except ReplicaGone:
            return False

    os.kill(replica._info["pids"]["scheduler"], signal.SIGKILL)
    async with asyncio.timeout(60):
        while not await restarted():
            await asyncio.sleep(0.05)
    await gateway.refresh()
    await gateway.caught_up()
    assert not len(gateway.view.router.index)
    await stream(gateway.http, body)
    await gateway.refresh()
    await gateway.caught_up()
    assert gateway.view.router.index.blocks(0) == 400 // 16


async def test_a_replica_of_which_nothing_is_known_is_chosen_by_its_load(start_cluster: Any) -> None:
    cluster = await start_cluster(3)
    gateway = await cluster.gateway()
    body = {"prompt": ids(400), "max_tokens": 2}
    home, _ = await stream(gateway.http, body)
    await gateway.caught_up()
    gateway.view.router.unsure[:] = True
    assert {(await stream(gateway.http, body))[0] for _ in range(8)} > {home}
    gateway.view.router.unsure[:] = False
    assert (await stream(gateway.http, body))[0] == home or len(await hits(gateway, body)) > 1


async def hits(gateway: Any, body: dict[str, Any]) -> set[str]:
    """Replicas that have the prompt by now."""
    names = set()
    for name in gateway.cluster.replicas:
        answer = await gateway.http.post("/v1/completions", json=body, headers={"x-branchwise-replica": name})
        if answer.json()["usage"]["prompt_tokens_details"]["cached_tokens"]:
            names.add(name)
    return names


async def test_a_slow_replica_gets_less(start_cluster: Any) -> None:
    """Stopped for a while, as by another program: its requests wait, and new ones go elsewhere."""
    cluster = await start_cluster(3)
    gateway = await cluster.gateway(watch=True)
    slow = next(iter(cluster.replicas.values()))
    scheduler = slow._info["pids"]["scheduler"]
    os.kill(scheduler, signal.SIGSTOP)
    try:
        tasks = []
        for number in range(30):
            body = {"prompt": ids(256, 7 * number), "max_tokens": 2}
            tasks.append(asyncio.create_task(stream(gateway.http, body)))
            await asyncio.wait(tasks[-1:], timeout=1)  # on a busy machine the others take their time, too
        async with asyncio.timeout(120):
            while sum(task.done() for task in tasks) < 24:  # few wait for it
                await asyncio.sleep(0.05)
    finally:
        os.kill(scheduler, signal.SIGCONT)
    ends = await asyncio.gather(*tasks)
    assert len(ends) == 30 and {end for _, end in ends} == {"done"}


async def test_a_full_replica_gets_nothing(start_cluster: Any) -> None:
    cluster = await start_cluster(3, null_step_seconds=0.02, max_queued_requests=4)
    gateway = await cluster.gateway()
    full = next(iter(cluster.replicas))
    headers = {"x-branchwise-replica": full}
    body = {"prompt": ids(256), "max_tokens": 3000}
    busy = [asyncio.create_task(gateway.http.post("/v1/completions", json=body, headers=headers)) for _ in range(4)]
    async with asyncio.timeout(60):
        while not (await cluster.replicas[full].report()).full:
            await asyncio.sleep(0.05)
    await gateway.refresh()
    await gateway.caught_up()
    assert (await gateway.http.post("/v1/completions", json=body, headers=headers)).status_code == 503
    for _ in range(6):  # its cache has the prompt: not even for that
        assert (await stream(gateway.http, {**body, "max_tokens": 2}))[0] != full
    await gateway.http.post("/abort_request", json={"abort_all": True}, headers=headers)
    assert {(await task).status_code for task in busy} == {200}
    async with asyncio.timeout(60):
        while (await cluster.replicas[full].report()).running:
            await asyncio.sleep(0.05)
    await gateway.refresh()
    assert full in {(await stream(gateway.http, {**body, "max_tokens": 2, "prompt": ids(99, n)}))[0] for n in range(9)}


async def test_every_request_ends_once_while_replicas_are_killed_and_restarted(start_cluster: Any) -> None:
    """Two kills, and a new replica after each: requests that had been answered in part say so, others go elsewhere."""
    requests = int(os.environ.get("BRANCHWISE_FAULT_REQUESTS", "1000"))
    cluster = await start_cluster(3, null_step_seconds=0.001)
    gateways = [await cluster.gateway(watch=True), await cluster.gateway(watch=True)]
    numbers, ends = itertools.count(), Counter()

    async def client(number: int) -> None:
        http = gateways[number % 2].http
        while (each := next(numbers)) < requests or not kills.done():
            body = {"prompt": ids(40 + each % 200, 7 * (each % 50)), "max_tokens": 3 + each % 5}
            if each % 2:
                ends[(await stream(http, body))[1]] += 1
            else:
                answer = await http.post("/v1/completions", json=body)
                assert answer.status_code in (200, 503), answer.text
                ends["done" if answer.status_code == 200 else "error"] += 1

    async def kill() -> None:
        for share in (0.3, 0.6):
            while sum(ends.values()) < share * requests:
                await asyncio.sleep(0.01)
            victim = next(iter(cluster.replicas.values()))
            os.kill(victim.pid, signal.SIGKILL)
            while victim.name in cluster.replicas:  # until a request has found it dead
                await asyncio.sleep(0.01)
            await cluster.add()

    kills = asyncio.create_task(kill())
    await asyncio.gather(kills, *(client(number) for number in range(24)))
    assert sum(ends.values()) >= requests and ends["error"] <= 2 * 24, ends
    assert len(cluster.replicas) == 3
    for name in cluster.replicas:
        for _ in range(600):
            check = await gateways[0].http.get("/server_info", headers={"x-branchwise-replica": name})
            if check.json()["requests_in_flight"] == 0:
                break
            await asyncio.sleep(0.1)
        check = await gateways[0].http.get("/cache/check", headers={"x-branchwise-replica": name})
        assert check.json() == {"check": "clean"}
