"""``/cache/...`` and the cache's fields, against a whole server: three keys, an operator, and a small pool."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import httpx
import msgspec
import openai
import pytest
import zmq

KEY, OTHER, ADMIN = "ann-key", "bob-key", "operator-key"
SNAPSHOT = "/cache/events/snapshot"


@pytest.fixture(scope="module")
def running(tokenizer_folder: Any, run_server_process: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    from branchwise.runtime.config import EngineConfig, ServerConfig

    engine = EngineConfig(
        model=str(tokenizer_folder),
        check_when_idle=True,
        kv_cache_tokens=2048,
        max_model_len=1024,
        max_pinned_share=0.25,
        pinned_share_per_key=0.75,
    )
    config = ServerConfig(
        engine=engine,
        port=0,
        null_executor=True,
        null_step_seconds=0.005,
        api_key=KEY,
        extra_api_keys=(OTHER,),
        admin_api_key=ADMIN,
        kv_events="tcp://127.0.0.1:*",
    )
    with run_server_process(config, tmp_path_factory.mktemp("run")) as server:
        yield server


@pytest.fixture
def ask(running: Any) -> Iterator[Any]:
    """``ask(path, key=..., status=..., **body)``; the cache is empty at first, and the books balance at the end."""

    def ask(path: str, *, key: str = KEY, status: int = 200, headers: dict[str, str] | None = None, **body: Any) -> Any:
        method = "GET" if path in ("/cache/stats", "/cache/tree", "/cache/check", SNAPSHOT) else "POST"
        sent = {"Authorization": f"Bearer {key}", **(headers or {})}
        response = running.http.request(method, path, headers=sent, json=body if method == "POST" else None)
        assert response.status_code == status, response.text
        return response if headers else response.json()

    ask("/flush_cache", key=ADMIN)
    yield ask
    assert ask("/cache/check", key=ADMIN) == {"check": "clean"}


def ids(n: int, start: int = 3) -> list[int]:
    return [(start + 11 * i) % 300 + 5 for i in range(n)]


def complete(ask: Any, prompt: Any, **body: Any) -> dict[str, Any]:
    return ask("/v1/completions", prompt=prompt, **({"max_tokens": 1} | body))["usage"]["prompt_tokens_details"]


def pressure(ask: Any) -> None:
    """More than the pool holds."""
    for i in range(4):
        ask("/generate", input_ids=ids(900, 20 + i), sampling_params={"max_new_tokens": 1})


def test_explain_names_the_part_of_the_request_where_reuse_ends(ask: Any) -> None:
    def conversation(session: str) -> list[Any]:
        system = [{"type": "text", "text": "You are Twig."}, {"type": "text", "text": f"Session {session}"}]
        return [{"role": "system", "content": system}, {"role": "user", "content": "Hi"}]

    one, other = "01a22651-ab21-7fc1-afe8-2a4f7e9a4f21", "7fc1ab21-ab21-7fc1-afe8-2a4f7e9a4f21"
    said = ask("/cache/explain", messages=conversation(one))
    assert said["continues_in"] is None, "nothing is cached: the template's own text comes first"
    ask("/v1/chat/completions", messages=conversation(one), max_tokens=1)
    said = ask("/cache/explain", messages=conversation(other))
    assert (said["reason"], said["continues_in"]) == ("diverged", "messages[0].content[1]")
    assert said["volatile"] == [{"path": "messages[0].content[1]", "kind": "UUID", "text": other}]
    assert "volatile" not in ask("/cache/explain", prompt="Hi")


def test_explain_names_what_breaks_reuse(ask: Any) -> None:
    """A model's output sent back: its ids hit to the last token; its text may be tokenized otherwise, or left out."""
    head = ids(40)
    texts = ((id, ask("/detokenize", tokens=[id])["prompt"]) for id in range(300, 400))
    word, text = next((id, text) for id, text in texts if len(text) > 1 and text.isascii() and text.isalpha())
    letters = [ask("/tokenize", prompt=letter, add_special_tokens=False)["tokens"] for letter in text]
    spelled = [*head, *(id for one in letters for id in one)]
    ask("/generate", input_ids=spelled, sampling_params={"max_new_tokens": 0})
    assert ask("/cache/explain", input_ids=[*spelled, 9])["hit_tokens"] == len(spelled)
    said = ask("/cache/explain", input_ids=[*head, word])
    assert (said["hit_tokens"], said["breaks"], said["cached_instead"]) == (40, "tokenization", text)
    assert ask("/cache/explain", input_ids=[*head, word + 1, 9])["breaks"] == "text"
    assert ask("/cache/explain", input_ids=[*spelled, word])["breaks"] is None


def test_explain_touches_nothing_and_tells_the_truth(ask: Any) -> None:
    text = "The tree remembers every prefix it has seen, and says so."
    said = ask("/cache/explain", prompt=text)
    assert (said["hit_tokens"], said["reason"]) == (0, "cold")
    assert complete(ask, text) == {"cached_tokens": 0, "cache_write_tokens": said["prompt_tokens"]}
    other = text[:40] + " nothing at all"
    said = ask("/cache/explain", prompt=other)
    assert said == ask("/cache/explain", prompt=other)
    assert said["reason"] == "diverged"
    assert said["diverged_at"] == said["hit_tokens"] > 0
    assert said["computed_tokens"] == said["prompt_tokens"] - said["hit_tokens"]
    assert said["continues_with"].strip()
    assert said["continues_with"] in other, "the prompt's own words, not what is cached there"
    assert (said["pinned_tokens"], said["protected_tokens"]) == (0, 0)
    assert complete(ask, other)["cached_tokens"] == said["hit_tokens"]


def test_a_pin_outlives_pressure_and_ends_by_itself(ask: Any) -> None:
    complete(ask, ids(100))
    complete(ask, ids(100, 7))
    pin = ask("/cache/pin", input_ids=ids(100), ttl=2)
    assert pin["tokens"] == 100
    assert pin["missing_tokens"] == 0
    started = time.monotonic()
    pressure(ask)
    said, unpinned = (ask("/cache/explain", input_ids=ids(100, start)) for start in (3, 7))
    if time.monotonic() - started < 1.8:  # else the machine was too slow to see it
        assert said["hit_tokens"] == said["pinned_tokens"] == said["protected_tokens"] == 99
    assert unpinned["hit_tokens"] == 0
    deadline = time.monotonic() + 60
    while ask("/cache/stats", key=ADMIN)["everybody"]["pages"]["pinned"]:
        assert time.monotonic() < deadline
        time.sleep(0.1)
    ask("/cache/unpin", id=pin["id"], status=404)


def test_pins_are_bounded_and_can_be_ended(ask: Any) -> None:
    absent = ask("/cache/pin", input_ids=ids(300), status=409)
    assert absent["error"]["code"] == "not_cached"
    first = ask("/cache/pin", input_ids=ids(300), ttl="5m", warm=True)
    assert (first["tokens"], first["expires_in"]) == (300, 300)
    more = ask("/cache/pin", input_ids=ids(200, 7), ttl=60, warm=True, status=429)
    assert (more["error"]["type"], more["error"]["code"]) == ("rate_limit_error", "pin_quota")
    assert "384" in more["error"]["message"]  # 2048 tokens × 0.25 × 0.75
    stats = ask("/cache/stats")
    assert stats["pins"] == {"count": 1, "tokens": 304, "max_tokens": 384}
    ask("/cache/unpin", id=first["id"])
    assert ask("/cache/pin", input_ids=ids(200, 7))["tokens"] == 200
    assert ask("/flush_cache", key=ADMIN)["unpinned"] == 1


def test_pinning_part_of_a_prompt_says_what_is_missing(ask: Any) -> None:
    complete(ask, ids(64))
    pin = ask("/cache/pin", input_ids=ids(100))
    assert (pin["tokens"], pin["missing_tokens"]) == (64, 36)


def test_keys_know_nothing_of_each_other(ask: Any) -> None:
    complete(ask, ids(100))
    pin = ask("/cache/pin", input_ids=ids(100), ttl=60)
    never = ask("/cache/explain", key=OTHER, input_ids=ids(100))
    assert (never["hit_tokens"], never["reason"], never["pinned_tokens"]) == (0, "cold", 0)
    refused = ask("/cache/pin", key=OTHER, input_ids=ids(100), status=409)
    unseen = ask("/cache/pin", key=OTHER, input_ids=ids(100, 9), status=409)
    assert refused == unseen
    assert ask("/cache/unpin", key=OTHER, id=pin["id"], status=404)["error"]["type"] == "not_found_error"
    usage = ask("/v1/completions", key=OTHER, prompt=ids(100), max_tokens=1)["usage"]
    assert usage["prompt_tokens_details"]["cached_tokens"] == 0
    theirs = ask("/cache/stats", key=OTHER)
    assert theirs["pins"]["count"] == 0
    assert "everybody" not in theirs
    assert not {each["salt"] for each in theirs["namespaces"]} - {""}
    # the operator works in the cache of the server's first key
    assert ask("/cache/explain", key=ADMIN, input_ids=ids(100))["hit_tokens"] == 99


@pytest.mark.parametrize("field", ["cache_salt", "prompt_cache_key"])
def test_partitions_are_apart_everywhere(ask: Any, field: str) -> None:
    for _ in range(2):
        cached = complete(ask, ids(64), **{field: "one"})["cached_tokens"]
    assert cached == 63
    for other in ({}, {field: "two"}, {"cache_salt": "one", "prompt_cache_key": "one"}):
        assert complete(ask, ids(64), **other)["cached_tokens"] == 0
        assert ask("/cache/explain", input_ids=ids(64), **{field: "three"})["reason"] == "namespace"
    assert ask("/cache/explain", input_ids=ids(64), **{field: "one"})["hit_tokens"] == 63


def test_admin_routes_need_the_admin_key(ask: Any, running: Any) -> None:
    for path, body in (
        ("/flush_cache", {}),
        ("/cache/evict", {"input_ids": [5]}),
        ("/abort_request", {"abort_all": True}),
    ):
        for key in (KEY, OTHER):
            assert ask(path, key=key, status=403, **body)["error"]["type"] == "permission_error"
        ask(path, key=ADMIN, **body)
        ask(path, key="guess", status=401, **body)
    for path in ("/cache/tree", "/cache/check", SNAPSHOT):
        ask(path, status=403)
        ask(path, key=ADMIN)
    both = {"Authorization": f"Bearer {KEY}", "x-api-key": ADMIN}
    assert running.http.post("/flush_cache", headers=both).status_code == 200
    info = running.http.get("/get_server_info").text
    for key in (KEY, OTHER, ADMIN):
        assert key not in info


def test_a_name_of_a_request_is_its_keys(ask: Any, running: Any) -> None:
    long = {"text": "go on", "rid": "job", "sampling_params": {"max_new_tokens": 900}, "stream": True}
    headers = {"Authorization": f"Bearer {KEY}"}
    with running.http.stream("POST", "/generate", json=long, headers=headers) as stream:
        lines = stream.iter_lines()
        next(lines)
        assert ask("/abort_request", key=OTHER, rid="job") == {"aborted": 0}
        assert ask("/abort_request", key=ADMIN, rid="job") == {"aborted": 1}
        list(lines)


def test_evict_forgets_one_prompt(ask: Any) -> None:
    for last in (1, 2):
        complete(ask, [*ids(64), last, last, last])
    gone = ask("/cache/evict", key=ADMIN, input_ids=[*ids(64), 1])
    assert gone["evicted_pages"] == 1
    assert gone["remaining_tokens"] == 64
    assert ask("/cache/explain", input_ids=[*ids(64), 2, 2, 2])["hit_tokens"] == 66
    assert ask("/cache/evict", key=ADMIN, input_ids=ids(10))["remaining_tokens"] == 0


def test_the_operator_warms_other_keys_parts_of_the_cache(ask: Any, running: Any) -> None:
    def hottest(query: str, key: str = ADMIN) -> Any:
        return running.http.get(f"/cache/hottest?{query}", headers={"Authorization": f"Bearer {key}"})

    for _ in range(2):
        ask("/v1/completions", key=OTHER, prompt=ids(80), cache_salt="s", max_tokens=1)
    assert hottest("count=8", KEY).status_code == 403 and hottest("all_namespaces=yes").status_code == 400
    [found] = hottest("count=8&all_namespaces=true").json()["prefixes"]
    assert found["token_ids"] == ids(80)[: len(found["token_ids"])] and all(found["namespace"])
    ask("/flush_cache", key=ADMIN)
    body = {"prompts": [found["token_ids"]], "namespaces": [found["namespace"]]}
    ask("/cache/warm", key=OTHER, status=403, **body)
    for wrong in ([], [["a"]], [["a", "b"], ["a", "b"]], [["a", "b" * 2000]]):
        ask("/cache/warm", key=ADMIN, status=400, prompts=body["prompts"], namespaces=wrong)
    ask("/cache/warm", key=ADMIN, status=400, cache_salt="s", **body)
    [warmed] = ask("/cache/warm", key=ADMIN, **body)["results"]
    assert warmed["cached_tokens"] == 0
    assert ask("/cache/explain", key=OTHER, input_ids=ids(80), cache_salt="s")["hit_tokens"] >= 64
    assert ask("/cache/explain", key=OTHER, input_ids=ids(80))["hit_tokens"] == 0
    assert ask("/cache/explain", input_ids=ids(80))["hit_tokens"] == 0


def test_warm_computes_and_generates_nothing(ask: Any) -> None:
    warmed = ask("/cache/warm", prompts=[ids(48), ids(80)], prompt_cache_options={"ttl": "1m"})["results"]
    assert [each["prompt_tokens"] for each in warmed] == [48, 80]
    assert sum(each["cache_write_tokens"] for each in warmed) == 80, "what they share is computed once"
    assert [each["pinned_tokens"] for each in warmed] == [48, 80]
    assert complete(ask, ids(80))["cached_tokens"] == 79
    ask("/cache/warm", prompts="a text", status=400)
    ask("/cache/warm", prompts=[], status=400)
    texts = ask("/cache/warm", prompts=["Read this first.", "And then this."])["results"]
    assert all(each["cache_write_tokens"] == each["prompt_tokens"] for each in texts)


def test_breakpoints_and_modes_of_plain_requests(ask: Any) -> None:
    meta = ask(
        "/generate",
        input_ids=ids(64),
        sampling_params={"max_new_tokens": 2},
        prompt_cache_breakpoint=[{"at": 21, "ttl": "1m"}],
    )["meta_info"]
    assert meta["cache"].pop("reason") in ("cold", "evicted")  # by another test's flush
    assert meta["cache"] == {"hit_tokens": 0, "write_tokens": 64, "pinned_tokens": 21}
    text = "A long introduction that many prompts share. And a question?"
    share = text.index(" And")
    complete(ask, text, prompt_cache_breakpoint={"at": share, "ttl": 60})
    pressure(ask)
    kept = ask("/cache/explain", prompt=text[:share] + " Or another?")
    assert kept["hit_tokens"] == kept["pinned_tokens"] > 0
    assert ask("/cache/explain", input_ids=ids(64))["pinned_tokens"] == 32, "two pages: the second whole"
    off = complete(ask, ids(64), prompt_cache_options={"mode": "off"})
    assert off == {"cached_tokens": 0, "cache_write_tokens": 0}
    before = ask("/cache/stats", key=ADMIN)["everybody"]["pages"]["free"]
    private = ask("/generate", input_ids=ids(200, 9), prompt_cache_options={"mode": "off"})["meta_info"]
    assert private["cache"]["reason"] == "disabled"
    assert ask("/cache/stats", key=ADMIN)["everybody"]["pages"]["free"] >= before


SYSTEM = "You are the keeper of a village library. You answer briefly and name the shelf."


def chat(ask: Any, *parts: dict[str, Any], question: str, **body: Any) -> dict[str, Any]:
    messages = [{"role": "system", "content": list(parts)}, {"role": "user", "content": question}]
    return ask("/v1/chat/completions", messages=messages, max_tokens=1, **body)["usage"]["prompt_tokens_details"]


@pytest.mark.parametrize(
    "mark",
    [
        {"prompt_cache_breakpoint": {"mode": "explicit"}},
        {"prompt_cache_breakpoint": {"mode": "explicit", "ttl": "30m"}},
        {"cache_control": {"type": "ephemeral"}},
        {"cache_control": {"type": "ephemeral", "ttl": "1h"}},
    ],
)
def test_a_part_of_a_chat_stays_to_its_last_token(ask: Any, mark: dict[str, Any]) -> None:
    first, second = {"type": "text", "text": SYSTEM, **mark}, {"type": "text", "text": "Today it is raining."}
    chat(ask, first, second, question="Where are the maps?", prompt_cache_key="k")
    pressure(ask)
    messages = [
        {"role": "system", "content": [first, {"type": "text", "text": "Today the sun shines."}]},
        {"role": "user", "content": "Who wrote this?"},
    ]
    seen = ask("/cache/explain", messages=messages, prompt_cache_key="k")
    rendered = ask("/tokenize", messages=messages)["tokens"]
    kept = ask("/detokenize", tokens=rendered[: seen["pinned_tokens"]])["prompt"]
    assert SYSTEM in kept, "all of the part"
    assert len(kept) < kept.index(SYSTEM) + len(SYSTEM) + 40, "and no more than the page it ends in"
    assert (
        chat(ask, *messages[0]["content"], question="Who wrote this?", prompt_cache_key="k")["cached_tokens"]
        == (seen["hit_tokens"])
    )


@pytest.mark.parametrize(
    "mark",
    [
        {"prompt_cache_breakpoint": 3},
        {"cache_control": {"type": "forever"}},
        {"cache_control": True},
        {"cache_control": {"type": "ephemeral", "ttl": "1000d"}},
    ],
)
def test_bad_marks_of_parts_are_named(ask: Any, mark: dict[str, Any]) -> None:
    messages = [{"role": "user", "content": [{"type": "text", "text": "a", **mark}]}]
    ask("/v1/chat/completions", status=400, messages=messages, max_tokens=1)


@pytest.mark.parametrize("stream", [False, True])
def test_the_header_comes_when_asked_for(ask: Any, running: Any, stream: bool) -> None:
    complete(ask, ids(64))
    for path, body in (
        ("/v1/completions", {"prompt": ids(64), "max_tokens": 1}),
        ("/generate", {"input_ids": ids(64), "sampling_params": {"max_new_tokens": 1}}),
    ):
        answer = ask(path, headers={"x-branchwise-cache": "1"}, stream=stream, **body)
        assert answer.headers["x-branchwise-cache"] == "63;prompt=64;reason=hit"
        answer = ask(path, headers={"x-other": "1"}, stream=stream, **body)
        assert "x-branchwise-cache" not in answer.headers


def test_the_openai_client_speaks_these_fields(ask: Any, running: Any) -> None:
    client = openai.OpenAI(base_url=f"{running.url}/v1", api_key=OTHER, http_client=httpx.Client())
    model = client.models.list().data[0].id
    for cached in (0, 63):
        reply = client.completions.create(
            model=model,
            prompt=ids(64),
            max_tokens=1,
            extra_body={"prompt_cache_key": "k", "prompt_cache_options": {"mode": "implicit", "ttl": "30m"}},
        )
        details = reply.usage.prompt_tokens_details
        assert (details.cached_tokens, details.cache_write_tokens) == (cached, 64 - cached)
    assert ask("/cache/explain", key=OTHER, input_ids=ids(64), prompt_cache_key="k")["pinned_tokens"] == 63


def test_kv_events_and_their_snapshot_agree(running: Any, ask: Any) -> None:
    context: zmq.Context[Any] = zmq.Context()
    subscriber = context.socket(zmq.SUB)
    subscriber.subscribe(b"")
    subscriber.connect(running.info["kv_events"])
    for number in range(100):  # until the subscription has arrived
        complete(ask, ids(40, number))
        if subscriber.poll(50):
            break
    ask("/flush_cache", key=ADMIN)
    complete(ask, ids(40), cache_salt="s")
    seen = ask(SNAPSHOT, key=ADMIN)
    ts, [stored], rank = seen["batch"]
    assert ts > 0 and rank == 0 and stored["type"] == "BlockStored"
    size = seen["block_size"]
    assert stored["token_ids"] == ids(40)[: 40 // size * size] and stored["parent_block_hash"] is None
    assert len(stored["cache_salt"]) > 32, "the owner and the salt, as digests"
    last, batch = -1, None
    while last < seen["seq"]:
        assert subscriber.poll(60_000)
        _, number, payload = subscriber.recv_multipart()
        assert last < 0 or int.from_bytes(number, "big") == last + 1
        last, batch = int.from_bytes(number, "big"), msgspec.msgpack.decode(payload)
    assert last == seen["seq"] and batch is not None and batch[1] == [stored]
    assert not subscriber.poll(50)
    context.destroy(0)
