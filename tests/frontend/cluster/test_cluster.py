"""Routing through a gateway: what is cached, branches, keys, every dialect."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from collections import Counter
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from branchwise import function, gen
from branchwise.frontend.cluster.config import read_cluster_config
from branchwise.frontend.cluster.forward import ForwardedRequest, Head
from branchwise.frontend.lang.backends import connect
from branchwise.runtime.errors import LoadError
from branchwise.runtime.fleet.view import RoutingHint


def ids(n: int, start: int = 3) -> list[int]:
    return [(start + 11 * i) % 300 + 5 for i in range(n)]


def replica_of(response: httpx.Response) -> str:
    assert response.status_code == 200, response.text
    return response.headers["x-branchwise-replica"]


async def test_prompts_go_where_they_are_cached(start_cluster: Any) -> None:
    """All dialects, from the first block on; the router learns it from events, not from its own answers."""
    cluster = await start_cluster(3)
    gateway, other = await cluster.gateway(), await cluster.gateway()
    homes = []
    for number in range(6):
        answer = await gateway.http.post("/v1/completions", json={"prompt": ids(400, 37 * number), "max_tokens": 2})
        homes.append(replica_of(answer))
    assert set(Counter(homes).values()) == {2}, "what is cached nowhere is spread"
    await gateway.caught_up()
    await other.caught_up()
    for number, home in enumerate(homes):
        prompt = [*ids(400, 37 * number), 7]
        for http in (gateway.http, other.http):
            answer = await http.post("/v1/completions", json={"prompt": prompt, "max_tokens": 2})
            assert replica_of(answer) == home
            assert answer.json()["usage"]["prompt_tokens_details"]["cached_tokens"] >= 400
    chat = {"messages": [{"role": "user", "content": "Who are you? " * 40}], "max_tokens": 3}
    home = replica_of(await gateway.http.post("/v1/chat/completions", json=chat))
    await other.caught_up()
    answers = {
        "/v1/responses": {"input": chat["messages"][0]["content"], "max_output_tokens": 3},
        "/v1/messages": {"model": (await gateway.http.get("/v1/models")).json()["data"][0]["id"], **chat},
        "/v1/chat/completions": chat,
    }
    for path, body in answers.items():
        assert replica_of(await other.http.post(path, json=body)) == home, path
    streamed = await other.http.post("/v1/chat/completions", json={**chat, "stream": True})
    assert replica_of(streamed) == home and streamed.text.rstrip().endswith("data: [DONE]")
    refused = await gateway.http.post("/v1/completions", json={"prompt": ids(4), "max_tokens": -1})
    assert refused.status_code == 400 and refused.json()["error"]["param"] == "max_tokens"
    flushed = (await gateway.http.post("/flush_cache")).json()
    assert flushed["evicted_pages"] > 6 * 400 // 16
    for name in cluster.replicas:
        tree = await gateway.http.get("/cache/tree", headers={"x-branchwise-replica": name})
        assert replica_of(tree) == name and tree.json()["totals"]["cached"] == 0


async def test_metrics_are_those_of_all_replicas_each_with_its_label(start_cluster: Any) -> None:
    cluster = await start_cluster(3, api_key="operator", log_format="json")
    gateway = await cluster.gateway()
    http = gateway.http
    assert (await http.get("/metrics")).status_code == 401
    http.headers["Authorization"] = "Bearer operator"
    homes: Counter[str] = Counter()
    for number in range(6):
        answer = await http.post("/v1/completions", json={"prompt": ids(100, 37 * number), "max_tokens": 2})
        homes[replica_of(answer)] += 100
    for name in cluster.replicas:  # answered by its scheduler after the counts of what it has done
        await http.get("/server_info", headers={"x-branchwise-replica": name})
    page = await http.get("/metrics")
    assert page.headers["content-type"].startswith("text/plain; version=0.0.4")
    families = list(text_string_to_metric_families(page.text))
    assert len({family.name for family in families}) == len(families), "the samples of a metric stand together"
    samples = [sample for family in families for sample in family.samples]
    assert {sample.labels["replica"] for sample in samples} == set(cluster.replicas)
    got = {s.labels["replica"]: s.value for s in samples if s.name == "branchwise_prompt_tokens_total"}
    assert got == homes
    alone = await http.get("/metrics", headers={"x-branchwise-replica": "replica-2"})
    names = {sample.name for family in text_string_to_metric_families(alone.text) for sample in family.samples}
    assert names == {sample.name for sample in samples} and "replica-2" not in alone.text
    buckets = [each for each in samples if each.name == "branchwise_queue_time_seconds_bucket"]
    assert len({(each.labels["replica"], each.labels["le"]) for each in buckets}) == len(buckets) > 3
    await cluster.replicas["replica-3"].kill()
    page = await http.get("/metrics")
    left = {s.labels["replica"] for family in text_string_to_metric_families(page.text) for s in family.samples}
    assert left == {"replica-1", "replica-2"}


async def test_branches_and_pins_stay_with_the_replica_that_made_them(start_cluster: Any) -> None:
    cluster = await start_cluster(3)
    gateway, other = await cluster.gateway(), await cluster.gateway()
    homes = set()
    for number in range(6):
        made = await gateway.http.post("/branches", json={"input_ids": ids(100, 41 * number)})
        branch, home = made.json()["id"], replica_of(made)
        homes.add(home)
        ran = await other.http.post(f"/branches/{branch}/generate", json={"sampling_params": {"max_new_tokens": 3}})
        assert replica_of(ran) == home
        forked = await gateway.http.post(f"/branches/{branch}/fork", json={"n": 2})
        assert replica_of(forked) == home
        for fork in forked.json()["ids"]:
            assert replica_of(await other.http.get(f"/branches/{fork}")) == home
        pin = await gateway.http.post("/cache/pin", json={"input_ids": ids(100, 41 * number)})
        assert replica_of(pin) == home, "what is cached there"
        assert replica_of(await other.http.post("/cache/unpin", json={"id": pin.json()["id"]})) == home
    assert len(homes) == 3
    os.kill(cluster.replicas[home].pid, signal.SIGKILL)
    answer = await other.http.get(f"/branches/{branch}")
    assert answer.status_code in (410, 503)
    answer = await other.http.get(f"/branches/{branch}")
    assert answer.status_code == 410, "another replica would not know it"


async def test_a_replica_that_is_absent_for_a_moment_is_not_gone(
    start_cluster: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Serve takes a replica from its routers while it changes the replica's options: its branches still exist."""
    monkeypatch.setattr("branchwise.frontend.cluster.gateway.ABSENT_SECONDS", 2.0)
    cluster = await start_cluster(2)
    gateway = await cluster.gateway()
    made = await gateway.http.post("/branches", json={"input_ids": ids(100)})
    replica = cluster.replicas.pop(replica_of(made))
    await gateway.refresh()
    asked = asyncio.create_task(gateway.http.get(f"/branches/{made.json()['id']}"))
    await asyncio.sleep(0.2)
    assert not asked.done()
    cluster.replicas[replica.name] = replica
    await gateway.refresh()
    assert replica_of(await asked) == replica.name


async def test_a_batch_of_branches_is_split_between_replicas(start_cluster: Any) -> None:
    cluster = await start_cluster(3)
    gateway, other = await cluster.gateway(), await cluster.gateway()
    made = [await gateway.http.post("/branches", json={"input_ids": ids(100, 41 * n)}) for n in range(3)]
    branches, homes = [answer.json()["id"] for answer in made], [replica_of(answer) for answer in made]
    assert len(set(homes)) == 3
    ops: list[Any] = [
        {"op": "fork", "id": branches[0], "n": 2},
        {"op": "extend", "id": branches[1], "input_ids": [7]},
        {"op": "extend", "id": branches[1], "input_ids": [8, 9]},
        {"op": "create", "input_ids": ids(50)},
        {"op": "create", "parent": branches[2]},
        {"op": "extend", "id": branches[0], "input_ids": "wrong"},
        17,
        {"op": "delete", "id": "b" + "A" * 32},
        {"op": "delete", "id": branches[2]},
    ]
    answer = await other.http.post("/branches/batch", json={"ops": ops})
    assert answer.status_code == 200, answer.text
    forked, once, twice, created, child, wrong, number, unknown, deleted = answer.json()["results"]
    assert (once["num_tokens"], twice["num_tokens"], created["num_tokens"], child["num_tokens"]) == (101, 103, 50, 100)
    assert wrong["status"] == 400 and "ops[5].input_ids" in wrong["error"]["param"]
    assert number["status"] == 400 and "ops[6]" in number["error"]["message"]
    assert unknown["status"] == 410 and deleted["deleted"]
    for id, home in ((forked["ids"][1], homes[0]), (child["id"], homes[2])):
        assert replica_of(await gateway.http.get(f"/branches/{id}")) == home
    counts = (await gateway.http.get("/branches")).json()
    assert counts["branches"] == 6, "3 + 2 forks + 2 created - 1 deleted, of all replicas"
    children = {"ops": [{"op": "delete", "id": id} for id in forked["ids"]]}
    assert replica_of(await other.http.post("/branches/batch", json=children)) == homes[0], (
        "of one replica: passed whole"
    )
    os.kill(cluster.replicas[homes[0]].pid, signal.SIGKILL)
    for _ in range(2):  # the first try may still find the replica in the gateway's view
        ops = [{"op": "extend", "id": id, "input_ids": [7]} for id in branches[:2]]
        gone, extended = (await gateway.http.post("/branches/batch", json={"ops": ops})).json()["results"]
        assert gone["status"] in (410, 503) and "num_tokens" in extended
    assert gone["status"] == 410 and "gone" in gone["error"]["message"]
    for body in (b"[", b'{"ops": 3}', b'{"ops": []}', b'{"ops": [{"op": "fork", "id": 3}, {"op": "fork", "id": ""}]}'):
        answer = await gateway.http.post("/branches/batch", content=body, headers={"content-type": "application/json"})
        assert answer.status_code == 400 or {each["status"] for each in answer.json()["results"]} <= {400, 404}


async def test_keys_and_salts_are_parts_of_the_cache(start_cluster: Any) -> None:
    cluster = await start_cluster(2, api_key="ann", extra_api_keys=["bob"])
    gateway = await cluster.gateway()
    prompt = ids(320)

    async def ask(key: str, **more: Any) -> tuple[str, int]:
        headers = {"Authorization": f"Bearer {key}"}
        answer = await gateway.http.post(
            "/v1/completions", headers=headers, json={"prompt": prompt, "max_tokens": 1, **more}
        )
        home = replica_of(answer)
        await gateway.caught_up()
        return home, answer.json()["usage"]["prompt_tokens_details"]["cached_tokens"]

    assert (await gateway.http.post("/v1/completions", json={"prompt": prompt})).status_code == 401
    places = [("ann", {}), ("bob", {}), ("bob", {"cache_salt": "s"})]
    first = [await ask(key, **more) for key, more in places]
    assert [cached for _, cached in first] == [0, 0, 0]
    assert first[0][0] != first[1][0], "another key's prompt is as good as new"
    for (key, more), (home, _) in zip(places, first, strict=True):
        assert await ask(key, **more) == (home, 319)


async def test_a_new_replica_is_warmed_for_every_key_and_salt(start_cluster: Any) -> None:
    """Each prefix is computed for whom it was cached: others find nothing."""
    cluster = await start_cluster(1, api_key="ann", extra_api_keys=["bob"])
    gateway = await cluster.gateway()
    [old] = cluster.replicas.values()
    asked = {("ann", None): ids(160), ("bob", None): ids(160, 50), ("bob", "salt"): ids(160, 90)}

    async def cached(name: str, key: str, salt: str | None, prompt: list[int]) -> int:
        headers = {"Authorization": f"Bearer {key}", "x-branchwise-replica": name}
        body = {"prompt": prompt, "max_tokens": 1} | ({"cache_salt": salt} if salt else {})
        answer = await gateway.http.post("/v1/completions", headers=headers, json=body)
        assert replica_of(answer) == name
        return answer.json()["usage"]["prompt_tokens_details"]["cached_tokens"]

    for (key, salt), prompt in asked.items():
        assert [await cached(old.name, key, salt, prompt) for _ in range(2)] == [0, 159]
    prefixes = await old.hottest(8)
    assert len(prefixes) == 3 and len({tuple(each["namespace"]) for each in prefixes}) == 3
    new = await cluster.add()
    await new.warm(prefixes)
    await gateway.refresh()
    for (key, salt), prompt in asked.items():
        for other_key, other_salt in asked:
            if (other_key, other_salt) != (key, salt):
                assert await cached(new.name, other_key, other_salt, [*prompt, 7]) == 0
        assert await cached(new.name, key, salt, [*prompt, 8]) >= 144, "whole pages of it"


async def programs_stay_on_one_replica(gateway: Any) -> None:
    """Of our language, with and without branches. The first prompt of a program goes where that is cached; then it
    stays, even if that replica has become the busiest."""
    homes: list[list[str]] = []
    dispatch = gateway.app._dispatch

    async def recording(request: ForwardedRequest, hint: RoutingHint) -> AsyncIterator[Head | bytes]:
        async with contextlib.aclosing(dispatch(request, hint)) as parts:
            async for part in parts:
                if isinstance(part, Head) and request.method == "POST":
                    home = dict(part.headers)[b"x-branchwise-replica"].decode()
                    homes[-1].append(home)
                    assert (hint.session is not None) == (len(homes[-1]) > 1)
                yield part

    gateway.app._dispatch = recording

    @function
    async def program(s: Any, text: str) -> None:
        homes.append([])
        s += text + gen("a", max_tokens=2)
        await s["a"]
        number = gateway.view._numbers[homes[-1][0]]
        gateway.view.router._loads[4, number] += 1e9
        forks = s.fork(3)
        forks += " and " + gen("b", max_tokens=2)
        for fork in forks:
            await fork["b"]
        gateway.view.router._loads[4] = 0.0

    for branches in (True, False):
        backend = await asyncio.to_thread(connect, gateway.url, branches=branches)
        homes.clear()
        for text in (f"Once upon a time. {branches} " * 20, f"Long ago. {branches} " * 20):
            for _ in range(2):
                await program.arun(text, backend=backend)
                await gateway.caught_up()
            # What is cached nowhere goes to the other one.
            gateway.view.router._loads[4, gateway.view._numbers[homes[0][0]]] = 1e6
        assert all(len(set(each)) == 1 and len(each) >= 4 for each in homes), homes
        assert homes[0][0] == homes[1][0] != homes[2][0] == homes[3][0]


async def test_sessions_and_programs_stay_together(start_cluster: Any) -> None:
    cluster = await start_cluster(3)
    gateway, other = await cluster.gateway(), await cluster.gateway()
    homes = {}
    for session in map(str, range(12)):
        for number, http in enumerate((gateway.http, other.http, gateway.http)):
            body = {"prompt": ids(64, 7 * number + 13 * int(session)), "max_tokens": 1}
            answer = await http.post("/v1/completions", json=body, headers={"x-session-id": session})
            assert homes.setdefault(session, replica_of(answer)) == replica_of(answer)
    assert len(set(homes.values())) == 3
    await programs_stay_on_one_replica(gateway)


async def test_a_new_replica_is_warmed_and_a_stopped_one_finishes(start_cluster: Any) -> None:
    cluster = await start_cluster(2, null_step_seconds=0.02)
    gateway = await cluster.gateway()
    for _ in range(3):
        answer = await gateway.http.post("/v1/completions", json={"prompt": [*ids(320), 7], "max_tokens": 1})
        home = replica_of(answer)
        await gateway.caught_up()
    prefixes = await cluster.replicas[home].hottest(8)
    assert [each["token_ids"] for each in prefixes] == [ids(320)]
    new = await cluster.add()
    await new.warm(prefixes)
    await gateway.refresh()
    await gateway.caught_up()
    found = gateway.view.router.cached(321, [])
    assert len(found) == 3
    body = {"prompt": [*ids(320), 9], "max_tokens": 200}
    running = asyncio.create_task(gateway.http.post("/v1/completions", json=body))
    async with asyncio.timeout(60):
        while not (found := [each for each in cluster.replicas.values() if (await each.report()).running]):
            await asyncio.sleep(0.01)
    [busy] = found
    del cluster.replicas[busy.name]
    await gateway.refresh()
    assert await busy.stop() == 0
    answer = await running
    assert answer.status_code == 200 and answer.json()["usage"]["completion_tokens"] == 200, "nothing is lost"
    answer = await gateway.http.post("/v1/completions", json=body)
    assert replica_of(answer) == new.name if busy.name == home else True
    assert answer.json()["usage"]["prompt_tokens_details"]["cached_tokens"] >= 320


def test_a_config_file_is_checked(tmp_path: Any) -> None:
    pytest.importorskip("yaml")
    path = tmp_path / "cluster.yaml"
    path.write_text("replicas: 2\nengine: {model: '', max_num_seqs: 8}\nserver: {api_key: k}\n")
    config = read_cluster_config(path)
    made = config.replica("secret")
    assert (made.engine.max_num_seqs, made.api_key, made.port, made.namespace_secret) == (8, "k", 0, "secret")
    for text, problem in (
        ("replicas: 0", "replicas"),
        ("replicas: 3\nmax_replicas: 2", "max_replicas"),
        ("autoscaling_config: {upscale_delay_s: 1}", "only with max_replicas"),
        ("max_replicas: 3\nautoscaling_config: {min_replicas: 1}", "autoscaling_config.min_replicas: replicas sets it"),
        ("wrong: 1", "wrong"),
        ("engine: {max_num_seq: 8}", "max_num_seq"),
        ("server: {port: 1}", "port"),
        ("server: {restart: many}", "restart"),
        ("[", "cluster.yaml"),
    ):
        path.write_text(text)
        with pytest.raises(LoadError, match=problem):
            read_cluster_config(path)
