"""The page at /ui and its events, without a browser."""

from __future__ import annotations

import asyncio
import json
import re
import time
from itertools import pairwise
from typing import Any

import httpx
import pytest

from branchwise.runtime.config import EngineConfig, ServerConfig
from branchwise.runtime.server.http.native.tree_text import add_text, decoder
from branchwise.runtime.server.http.ui.live import Feed


def test_the_page_is_static_and_strict(server: Any) -> None:
    page = server.http.get("/ui")
    assert page.status_code == 200 and page.headers["content-type"].startswith("text/html")
    policy = page.headers["content-security-policy"]
    assert "default-src 'none'" in policy and "unsafe" not in policy
    assert "<script>" not in page.text and "style=" not in page.text and "http" not in page.text
    again = server.http.get("/ui", headers={"If-None-Match": page.headers["etag"]})
    assert again.status_code == 304 and not again.content
    for path in page.text.split('"')[1::2]:
        if path.startswith("/ui/"):
            asset = server.http.get(path)
            assert asset.status_code == 200 and asset.headers["content-security-policy"] == policy, path
    assert server.http.get("/ui/../auth.py").status_code == 404


def test_the_manual_is_served_whole_and_links_within(server: Any) -> None:
    index = server.http.get("/docs")
    assert index.status_code == 200 and index.headers["content-security-policy"]
    found = set(re.findall(r'href="(/docs/[^"]+)"', index.text))
    assert {"/docs/README", "/docs/language", "/docs/http/ui", "/docs/http", "/docs/deploy"} <= found
    for path in sorted(found):
        page = server.http.get(path)
        assert page.status_code == 200 and "style=" not in page.text, path
        for link in re.findall(r'(?:href|src)="([^"]+)"', page.text):
            target, _, anchor = link.partition("#")
            if target.startswith("http"):
                continue
            assert target == "" or target.startswith(("/docs", "/ui/")), f"{path}: {link}"
            other = server.http.get(target) if target else page
            assert other.status_code == 200, f"{path}: {link}"
            assert not anchor or f'id="{anchor}"' in other.text, f"{path}: {link}"
    assert server.http.get("/docs/../pyproject.toml").status_code == 404
    assert server.http.get("/docs/nothing").status_code == 404


def test_where_it_is_served(start_server: Any) -> None:
    assert [ServerConfig(engine=EngineConfig(), host=host).has_ui for host in ("127.0.0.1", "::1", "0.0.0.0")] == [
        True,
        True,
        False,
    ]
    assert ServerConfig(engine=EngineConfig(), host="0.0.0.0", ui=True).has_ui
    without = start_server(ui=False)
    assert [without.http.get(path).status_code for path in ("/ui", "/ui/app.js", "/ui/events", "/docs")] == [404] * 4


def snapshots(server: Any, key: str, seconds: float = 60.0, **query: Any) -> Any:
    """The snapshots of a connection, as they arrive."""
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    with httpx.stream("GET", f"{server.url}/ui/events", headers=headers, params=query, timeout=seconds) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        for line in response.iter_lines():
            if line.startswith("data: "):
                yield json.loads(line[6:])


def texts(snapshot: dict[str, Any]) -> str:
    found, nodes = "", [child for space in snapshot["tree"]["namespaces"] for child in space["children"]]
    while nodes:
        node = nodes.pop()
        found += node["text"]
        nodes += node["children"]
    return found


def test_a_tenant_sees_only_what_is_theirs(start_server: Any) -> None:
    running = start_server(api_key="first-key", extra_api_keys=("other-key",), admin_api_key="admin-key")

    def ask(key: str, prompt: str) -> None:
        body = {"prompt": prompt, "max_tokens": 20}
        answer = httpx.post(f"{running.url}/v1/completions", json=body, headers={"x-api-key": key}, timeout=30)
        assert answer.status_code == 200, answer.text

    ask("first-key", "the first tenant wrote this " * 4)
    ask("other-key", "another tenant wrote that " * 4)
    assert httpx.get(f"{running.url}/ui/events").status_code == 401
    assert httpx.get(f"{running.url}/ui").status_code == 200  # it holds no data
    first, other, admin = (next(snapshots(running, key)) for key in ("first-key", "other-key", "admin-key"))
    assert "first" in texts(first) and "another" not in texts(first)
    assert "another" in texts(other) and "first" not in texts(other)
    assert "another" in texts(admin) and "first" in texts(admin)
    for mine in (first, other):
        assert mine["tree"]["totals"] == {"page_size": 16} and "figures" not in mine  # sums tell about others
    assert admin["figures"]["prompt_tokens"] > 0


def test_requests_are_shown_on_their_path(start_server: Any) -> None:
    running = start_server(null_step_seconds=0.02)
    body = {"prompt": "a prompt that takes several pages of tokens " * 8, "max_tokens": 5000, "ignore_eos": True}
    body["stream"] = True
    with httpx.stream("POST", f"{running.url}/v1/completions", json=body, timeout=30) as streaming:
        lines = streaming.iter_lines()  # kept: without it httpx closes the response
        next(lines)
        for snapshot in snapshots(running, ""):
            shown = [each for each in snapshot["requests"] if each["path"]]
            if shown:
                break
    (request,) = shown
    assert request["state"] == "running" and 0 < request["computed"] <= request["tokens"] <= request["limit"]
    ids, nodes = set(), [child for space in snapshot["tree"]["namespaces"] for child in space["children"]]
    while nodes:
        node = nodes.pop()
        ids.add(node["id"])
        nodes += node["children"]
    assert set(request["path"]) <= ids


def test_a_node_in_full(start_server: Any) -> None:
    """Its text, who holds it, and the request whose reuse ended in it; of one's own tree only."""
    running = start_server(api_key="first-key", extra_api_keys=("other-key",), admin_api_key="admin-key")

    def post(path: str, body: Any, key: str = "first-key") -> httpx.Response:
        return httpx.post(f"{running.url}{path}", json=body, headers={"x-api-key": key}, timeout=30)

    shared = "the beginning that both of the prompts share, which is long enough for several pages of tokens; "
    assert post("/v1/completions", {"prompt": shared + "the first", "max_tokens": 1}).status_code == 200
    assert post("/v1/completions", {"prompt": shared + "second one", "max_tokens": 1}).status_code == 200
    assert post("/cache/pin", {"prompt": shared}).status_code == 200
    (space,) = next(snapshots(running, "first-key"))["tree"]["namespaces"]
    (top,) = space["children"]
    question = {"owner": space["owner"], "salt": space["salt"], "path": [top["id"]]}
    found = post("/ui/node", question).json()
    assert found["start"] == 0 and found["end"] == top["tokens"] == found["pages"] * 16
    assert f"<|begin|>{shared}".startswith(found["head"]) and found["tail"] == "" and found["between"] == 0
    assert (found["pins"], found["branches"], found["requests"], found["hits"]) == (1, 0, [], top["hits"])
    texts_below = [post("/ui/node", {**question, "path": [top["id"], child["id"]]}).json() for child in top["children"]]
    stops = [stop for each in [found, *texts_below] for stop in each["stops"]]
    assert [stop["request"] for stop in stops] == [2] and stops[0]["reason"] == "diverged"
    assert "second" in stops[0]["after"] and stops[0]["instead"] in shared + "the first"
    assert stops[0]["instead"]
    assert post("/ui/node", question, "other-key").status_code == 404
    assert post("/ui/node", question, "admin-key").json()["head"] == found["head"]
    missing = post("/ui/node", {**question, "path": [top["id"], 10**9]})
    assert missing.status_code == 404 and missing.json()["error"]["param"] == "path"
    assert post("/ui/node", {**question, "path": []}).status_code == 404
    assert post("/ui/node", {**question, "path": [1] * 5000}).status_code == 400


def test_a_long_node_is_shown_in_part(start_server: Any) -> None:
    running = start_server()
    answer = running.http.post("/v1/completions", json={"prompt": [5 + i % 90 for i in range(6000)], "max_tokens": 1})
    assert answer.status_code == 200, answer.text
    (node,) = next(snapshots(running, ""))["tree"]["namespaces"][0]["children"]
    found = running.http.post("/ui/node", json={"path": [node["id"]]}).json()
    assert found["between"] == node["tokens"] - 4096 and found["head"] and found["tail"]


@pytest.mark.parametrize("nodes", ["0", "4001", "-1", "x", "1.5"])
def test_a_bad_count_is_refused(server: Any, nodes: str) -> None:
    answer = server.http.get("/ui/events", params={"max_nodes": nodes})
    assert answer.status_code == 400 and answer.json()["error"]["param"] == "max_nodes"


async def test_one_producer_for_all_listeners_and_none_without() -> None:
    asked: list[float] = []

    async def ask() -> dict[str, Any]:
        asked.append(time.monotonic())
        return {"seconds": 0.0, "value": min(len(asked), 3)}

    feed = Feed(ask)
    with feed.listening(), feed.listening():
        version = await feed.newer(0)
        assert (version, feed.listeners) == (1, 2)
        assert b'"value":1' in feed.event and await feed.newer(1) == 2
        await feed.newer(2)
        while len(asked) < 5:  # no change: nothing is published
            await asyncio.sleep(0.05)
        assert feed.version == 3
    many = len(asked)
    await asyncio.sleep(0.7)
    assert len(asked) == many
    assert all(after - before >= 0.45 for before, after in pairwise(asked))


async def test_a_dear_snapshot_is_taken_rarely() -> None:
    asked: list[float] = []

    async def ask() -> dict[str, Any]:
        asked.append(time.monotonic())
        return {"seconds": 0.01, "value": len(asked)}  # half a per cent of the time: every two seconds

    feed = Feed(ask)
    with feed.listening():
        await feed.newer(await feed.newer(0))
    assert asked[1] - asked[0] >= 1.9


async def test_what_this_process_adds_counts_too() -> None:
    asked: list[float] = []

    async def ask() -> dict[str, Any]:
        asked.append(time.monotonic())
        return {"seconds": 0.0, "value": len(asked)}

    def complete(found: dict[str, Any]) -> None:
        end = time.thread_time() + 0.01
        while time.thread_time() < end:
            pass
        found["model"] = "m"

    feed = Feed(ask, complete)
    with feed.listening():
        await feed.newer(await feed.newer(0))
    assert asked[1] - asked[0] >= 1.9 and b'"model":"m"' in feed.event


async def test_a_failure_is_told_and_ends_the_feed() -> None:
    async def ask() -> dict[str, Any]:
        raise RuntimeError("the scheduler is gone")

    feed = Feed(ask)
    with feed.listening():
        await feed.newer(0)
    assert feed.failed and b'"error"' in feed.event


def test_a_node_is_decoded_once() -> None:
    decoded: list[tuple[int, ...]] = []

    class Recording:
        def decode(self, ids: tuple[int, ...], skip_special_tokens: bool) -> str:
            decoded.append(ids)
            return str(list(ids))

    def tree() -> dict[str, Any]:
        child = {"preview": [3], "children": []}
        return {"namespaces": [{"children": [{"preview": [1, 2], "children": [child]}]}]}

    decode = decoder(Recording(), remembered=2)  # type: ignore[arg-type]
    for _ in range(3):
        found = add_text(tree(), decode, keep_preview=False)
    (node,) = found["namespaces"][0]["children"]
    assert (node["text"], node["children"][0]["text"], "preview" in node) == ("[1, 2]", "[3]", False)
    assert decoded == [(1, 2), (3,)]
