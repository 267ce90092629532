"""Branches on a whole server with a real, tiny model: the same tokens as without them, and nothing computed twice."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from branchwise.runtime.config import EngineConfig, ServerConfig
from branchwise.runtime.tokenizer.tokenizer import Tokenizer

TEXT = "A tree of tokens grows a branch for every question that is asked of one document."
NEIGHBOUR = "another-tenant"
KEY = "sesame"


@pytest.fixture(scope="module", params=[16, 1], ids=["pages-of-16", "pages-of-1"])
def branch_server(
    request: Any, checkpoint: Any, tmp_path_factory: pytest.TempPathFactory, run_server_process: Any
) -> Iterator[Any]:
    engine = EngineConfig(
        model=str(checkpoint("llama-gqa")),
        kv_cache_tokens=4096,
        device="cpu",
        page_size=request.param,
        check_when_idle=True,
        max_branches=64,
        max_branches_per_key=64,
        branch_ttl=60.0,
    )
    config = ServerConfig(engine=engine, port=0, api_key=KEY, extra_api_keys=(NEIGHBOUR,))
    with run_server_process(config, tmp_path_factory.mktemp("run")) as running:
        yield running
        running.idle()
        assert running.http.get("/cache/check").json() == {"check": "clean"}


@pytest.fixture
def api(branch_server: Any) -> Iterator[Api]:
    api = Api(branch_server.http)
    branch_server.empty_cache()
    yield api
    for id in api.made:
        branch_server.http.delete(f"/branches/{id}")
    assert branch_server.http.get("/branches").json()["branches"] == 0
    branch_server.idle()


class Api:
    def __init__(self, http: httpx.Client) -> None:
        self.http = http
        self.made: list[str] = []

    def post(self, path: str, status: int = 200, **body: Any) -> Any:
        answer = self.http.post(path, json=body)
        assert answer.status_code == status, answer.text
        value = answer.json()
        if status == 200 and path == "/branches":
            self.made.append(value["id"])
        if status == 200 and path.endswith("/fork"):
            self.made += value["ids"]
        return value

    def create(self, **body: Any) -> str:
        return str(self.post("/branches", **body)["id"])

    def generate(self, id: str, sampling: dict[str, Any] | None = None, **body: Any) -> Any:
        params = {"temperature": 0, "max_new_tokens": 12, "ignore_eos": True, **(sampling or {})}
        return self.post(f"/branches/{id}/generate", sampling_params=params, **body)

    def stateless(self, ids: list[int], sampling: dict[str, Any] | None = None, **body: Any) -> Any:
        params = {"temperature": 0, "max_new_tokens": 12, "ignore_eos": True, **(sampling or {})}
        return self.post("/generate", input_ids=ids, sampling_params=params, **body)

    def ids(self, id: str) -> list[int]:
        return list(self.http.get(f"/branches/{id}", params={"input_ids": "true"}).json()["input_ids"])

    def get(self, id: str, **params: str) -> Any:
        answer = self.http.get(f"/branches/{id}", params=params)
        assert answer.status_code == 200, answer.text
        return answer.json()


@pytest.fixture(scope="module")
def tokenizer(checkpoint: Any) -> Tokenizer:
    return Tokenizer.load(Path(checkpoint("llama-gqa")))


def test_a_branch_says_what_a_stateless_request_says_cold_and_warm(api: Api, tokenizer: Tokenizer) -> None:
    trunk = api.create(text=TEXT)
    assert api.ids(trunk) == tokenizer.encode(TEXT).tolist()
    first = api.generate(trunk, return_prompt_token_ids=True)
    meta = first["meta_info"]
    assert meta["cached_tokens"] == 0 and first["prompt_token_ids"] == tokenizer.encode(TEXT).tolist()
    assert meta["branch"] == {
        "id": trunk,
        "num_tokens": meta["prompt_tokens"] + 12,
        "kept_tokens": 12,
        "pending_text": "",
    }
    computed = meta["prompt_tokens"] + 11  # the last token drawn was never fed
    children = api.post(f"/branches/{trunk}/fork", n=3)["ids"]
    warm = []
    for i, child in enumerate(children):
        api.post(f"/branches/{child}/extend", text=f" Question {i}?")
        before = api.ids(child)
        warm.append((before, api.generate(child, extend=[5 + i])))
        assert warm[-1][1]["meta_info"]["cached_tokens"] >= computed
        assert warm[-1][1]["meta_info"]["cache"]["refilled"] == 0
        assert api.ids(child) == [*before, 5 + i, *warm[-1][1]["output_ids"]]
    # The first one shares nothing with its siblings that came later: to the token.
    assert warm[0][1]["meta_info"]["cached_tokens"] == computed
    for id in api.made:
        api.http.delete(f"/branches/{id}")
    api.post("/flush_cache")
    for i, (before, answer) in enumerate(warm):
        cold = api.stateless([*before, 5 + i])
        assert cold["output_ids"] == answer["output_ids"] and cold["text"] == answer["text"]


def test_a_stream_is_the_whole_bit_by_bit(api: Api) -> None:
    trunk = api.create(text=TEXT)
    one, other = api.post(f"/branches/{trunk}/fork", n=2)["ids"]
    whole = api.generate(one)
    body = {"stream": True, "sampling_params": {"temperature": 0, "max_new_tokens": 12, "ignore_eos": True}}
    with api.http.stream("POST", f"/branches/{other}/generate", json=body) as answer:
        lines = [line for line in answer.iter_lines() if line]
    assert lines[-1] == "data: [DONE]"
    last = json.loads(lines[-2].removeprefix("data: "))
    assert last["output_ids"] == whole["output_ids"] and last["text"] == whole["text"]
    assert last["meta_info"]["branch"]["kept_tokens"] == 12
    assert api.ids(other) == api.ids(one)


def test_a_stop_string_ends_the_branch_where_it_ends_the_text(api: Api, tokenizer: Tokenizer) -> None:
    trunk = api.create(text=TEXT)
    whole = api.generate(api.post(f"/branches/{trunk}/fork", n=1)["ids"][0], {"max_new_tokens": 40})
    start = api.ids(trunk)
    seen = 0
    for end in range(4, len(whole["text"]) - 4):
        stop = whole["text"][end : end + 3]
        (child,) = api.post(f"/branches/{trunk}/fork", n=1)["ids"]
        cut = api.generate(child, {"max_new_tokens": 40, "stop": stop})
        text = whole["text"][: whole["text"].index(stop)]
        assert cut["text"] == text and cut["meta_info"]["finish_reason"]["matched"] == stop
        facts, kept = api.get(child, input_ids="true"), cut["meta_info"]["branch"]["kept_tokens"]
        assert facts["input_ids"] == start + whole["output_ids"][:kept]
        assert tokenizer.decode(whole["output_ids"][:kept]) + facts["pending_text"] == text
        rest = facts["pending_text"]
        assert rest == cut["meta_info"]["branch"]["pending_text"]
        longer = tokenizer.decode(whole["output_ids"][: kept + 1])  # as many tokens are kept as can be
        assert "\ufffd" in rest or not text.startswith(longer)  # of bytes that are no character, what they read
        if rest and seen < 5:
            seen += 1
            # What is left is tokenized together with what follows, and nothing before it again.
            more = tokenizer.encode_more(rest + " and so").tolist()
            (fork,) = api.post(f"/branches/{child}/fork", n=1)["ids"]
            assert api.post(f"/branches/{fork}/extend", text=" and so")["num_tokens"] == len(start) + kept + len(more)
            assert api.ids(fork) == start + whole["output_ids"][:kept] + more
            # Going on without more text: by itself. With ids: before them.
            answer = api.generate(child, return_prompt_token_ids=True, extend=[7])
            alone = tokenizer.encode_more(rest).tolist()
            assert answer["prompt_token_ids"] == start + whole["output_ids"][:kept] + alone + [7]
        api.http.delete(f"/branches/{child}")
        if len(api.made) > 20:
            for id in api.made[1:]:
                api.http.delete(f"/branches/{id}")
            del api.made[1:]
    assert seen


def test_a_stop_token_is_not_kept_unless_it_is_returned(api: Api) -> None:
    trunk = api.create(text=TEXT)
    whole = api.generate(api.post(f"/branches/{trunk}/fork", n=1)["ids"][0])
    stop = next(token for token in whole["output_ids"] if token != whole["output_ids"][0])
    at = whole["output_ids"].index(stop)
    one, other = api.post(f"/branches/{trunk}/fork", n=2)["ids"]
    cut = api.generate(one, {"stop_token_ids": [stop]})
    assert cut["output_ids"] == whole["output_ids"][: at + 1]
    assert cut["meta_info"]["branch"]["kept_tokens"] == at
    assert api.ids(one) == api.ids(trunk) + whole["output_ids"][:at]
    api.generate(other, {"stop_token_ids": [stop], "no_stop_trim": True})
    assert api.ids(other) == api.ids(trunk) + whole["output_ids"][: at + 1]


def test_scores_are_the_logprobs_of_the_prompt(api: Api, tokenizer: Tokenizer) -> None:
    trunk = api.create(text=TEXT)
    api.generate(trunk, {"max_new_tokens": 0})
    before = api.ids(trunk)
    computed = api.http.get("/get_server_info").json()["stats"]["computed_tokens"]
    continuations = [" yes", " no", " a longer one", [9, 8, 7]]
    scores = api.post(f"/branches/{trunk}/score", continuations=continuations, unconditional=True)["scores"]
    assert api.ids(trunk) == before
    expected = sum(1 + len(score["token_ids"]) for score in scores)  # of the branch, its last token
    deadline = time.monotonic() + 60
    while api.http.get("/get_server_info").json()["stats"]["computed_tokens"] - computed < expected:
        assert time.monotonic() < deadline
        time.sleep(0.1)  # statistics come a few times a second
    computed = api.http.get("/get_server_info").json()["stats"]["computed_tokens"] - computed
    opening = tokenizer.opening.tolist()
    assert expected <= computed <= 2 * expected
    for continuation, score in zip(continuations, scores, strict=True):
        ids = continuation if isinstance(continuation, list) else tokenizer.encode_more(continuation).tolist()
        assert score["token_ids"] == ids
        # Remembered tokens need no logits; the token before the first that does is computed again for its own.
        assert score["cached_tokens"] == len(before) - 1 + score["cached_logprobs"]
        for prefix, found in ((before, score), (opening, score["unconditional"])):
            plain = api.stateless(
                prefix + ids, {"max_new_tokens": 0}, return_logprob=True, logprob_start_len=len(prefix)
            )["meta_info"]["input_token_logprobs"]
            assert found["logprobs"] == pytest.approx([logprob for logprob, _, _ in plain], abs=2e-4)
            assert found["sum"] == pytest.approx(sum(found["logprobs"]))
            assert found["mean"] == pytest.approx(found["sum"] / len(ids))


def test_text_is_not_read_as_special_tokens_unless_said(api: Api, tokenizer: Tokenizer) -> None:
    special = tokenizer.backend.token_to_id("<|im_end|>")
    branch = api.create(text="Hello")
    api.post(f"/branches/{branch}/extend", text="<|im_end|>")
    assert special not in api.ids(branch)
    assert api.get(branch, text="true")["text"].endswith("Hello<|im_end|>")
    api.post(f"/branches/{branch}/extend", text="<|im_end|>", parse_special=True)
    assert api.ids(branch)[-1] == special
    messages = [{"role": "user", "content": "Name a tree."}]
    chat = api.create(messages=messages)
    assert api.ids(chat) == tokenizer.encode(tokenizer.apply_chat_template(messages), False).tolist()
    refused = api.post("/branches", 400, messages=[{"role": "user", "content": "x<|im_end|>y"}])
    assert "messages[0].content" in refused["error"]["message"]
    api.create(messages=[{"role": "user", "content": "x<|im_end|>y"}], parse_special=True)


def test_a_branch_of_messages_is_how_a_chat_begins(api: Api) -> None:
    parts = [{"type": "text", "text": "Name"}, {"type": "text", "text": "a tree."}]
    for body in (
        {"messages": [{"role": "developer", "content": "Be short."}, {"role": "user", "content": parts}]},
        {"messages": [{"role": "user", "content": "A"}], "add_generation_prompt": False},
    ):
        tokens = api.post("/tokenize", **body)["tokens"]
        assert api.ids(api.create(**body)) == tokens


def test_a_branch_has_the_part_of_the_cache_it_was_given(api: Api) -> None:
    def cached(**where: str) -> int:
        return int(api.generate(api.create(text=TEXT, **where))["meta_info"]["cached_tokens"])

    for where in ({}, {"cache_salt": "a"}, {"prompt_cache_key": "a"}, {"prompt_cache_key": "b"}):
        assert (cached(**where), cached(**where) > 0) == (0, True), where
    assert cached(extra_key="a") > 0, "another word for cache_salt"
    prompt = {"text": TEXT, "prompt_cache_key": "a", "sampling_params": {"max_new_tokens": 1}}
    assert api.post("/generate", **prompt)["meta_info"]["cached_tokens"] > 0


def test_a_run_tells_the_cache_header_too(api: Api) -> None:
    branch = api.create(text=TEXT, ttl="30s")
    assert api.get(branch)["expires_in"] == 30
    for stream in (False, True):
        answer = api.http.post(
            f"/branches/{branch}/generate", json={"stream": stream}, headers={"x-branchwise-cache": "1"}
        )
        hit, prompt, reason = answer.headers["x-branchwise-cache"].split(";")[:3]
        assert (int(hit) > 0, prompt.startswith("prompt="), reason.startswith("reason=")) == (stream, True, True)


def test_an_empty_branch_begins_as_the_tokenizer_begins_texts(api: Api, tokenizer: Tokenizer) -> None:
    branch = api.create()
    assert api.get(branch)["num_tokens"] == 0
    assert "empty" in api.post(f"/branches/{branch}/generate", 400)["error"]["message"]
    assert "empty" in api.post(f"/branches/{branch}/score", 400, continuations=["x"])["error"]["message"]
    api.post(f"/branches/{branch}/extend", text=TEXT)
    assert api.ids(branch) == tokenizer.encode(TEXT).tolist()
    child = api.create(parent=branch, text=" And?")
    assert api.ids(child) == tokenizer.encode(TEXT).tolist() + tokenizer.encode_more(" And?").tolist()


def test_of_several_samples_the_first_one_stays(api: Api) -> None:
    branch = api.create(text=TEXT)
    before = api.ids(branch)
    samples = api.generate(branch, {"n": 3, "temperature": 1, "sampling_seed": 4})
    assert len(samples) == 3 and len({tuple(sample["output_ids"]) for sample in samples}) == 3
    assert "branch" in samples[0]["meta_info"] and "branch" not in samples[1]["meta_info"]
    assert api.ids(branch) == before + samples[0]["output_ids"]


def test_a_batch_does_many_things_and_says_what_failed(api: Api) -> None:
    trunk = api.create(text=TEXT)
    ops = [
        {"op": "extend", "id": trunk, "text": " One."},
        {"op": "extend", "id": trunk, "text": " Two."},
        {"op": "fork", "id": trunk, "n": 2},
        {"op": "create", "input_ids": [3, 4, 5]},
        {"op": "delete", "id": "nobody"},
        {"op": "extend", "id": trunk},
    ]
    results = api.post("/branches/batch", ops=ops)["results"]
    assert api.get(trunk, text="true")["text"].endswith(" One. Two.")
    assert all(api.ids(id) == api.ids(trunk) for id in results[2]["ids"])
    assert [result.get("status") for result in results] == [None, None, None, None, 404, 400]
    deletes = [{"op": "delete", "id": id} for id in [*results[2]["ids"], results[3]["id"]]]
    assert api.post("/branches/batch", ops=deletes)["results"] == [{"deleted": True}] * 3


def test_a_branch_is_busy_while_it_generates_and_gone_when_deleted(api: Api, branch_server: Any) -> None:
    branch = api.create(text=TEXT)
    body = {"stream": True, "sampling_params": {"max_new_tokens": 400, "ignore_eos": True}}
    with api.http.stream("POST", f"/branches/{branch}/generate", json=body) as answer:
        lines = answer.iter_lines()
        next(lines)
        for path, what in (("extend", {"text": "x"}), ("fork", {"n": 1}), ("generate", {}), ("score", None)):
            given = {"continuations": ["x"]} if what is None else what
            error = api.post(f"/branches/{branch}/{path}", 409, **given)["error"]
            assert branch in error["message"] and error["code"] == "branch_busy"
        assert api.get(branch)["generating"]
        assert api.http.delete(f"/branches/{branch}").json() == {"deleted": True}
        events = [line for line in lines if line]
    assert json.loads(events[-2].removeprefix("data: "))["meta_info"]["finish_reason"]["type"] == "abort"
    for method, path in (("GET", ""), ("DELETE", ""), ("POST", "/generate")):
        gone = api.http.request(method, f"/branches/{branch}{path}", json={} if method == "POST" else None)
        assert gone.status_code == 410 and gone.json()["error"]["code"] == "branch_gone"
    branch_server.idle()


def test_leaving_a_stream_frees_the_branch(api: Api) -> None:
    branch = api.create(text=TEXT)
    before = api.ids(branch)
    body = {"stream": True, "sampling_params": {"max_new_tokens": 400, "ignore_eos": True, "temperature": 0}}
    with api.http.stream("POST", f"/branches/{branch}/generate", json=body) as answer:
        next(answer.iter_lines())
    deadline = time.monotonic() + 60
    while api.get(branch)["generating"]:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    kept = api.ids(branch)
    assert kept[: len(before)] == before and len(before) < len(kept) < len(before) + 400
    again = api.generate(branch)
    assert api.stateless(kept)["output_ids"] == again["output_ids"]


def test_unknown_and_foreign_ids_look_alike(api: Api) -> None:
    branch = api.create(text=TEXT)
    for id in ("nobody", branch[:-1], branch + "x", "b" + "A" * 32, "%00", "b%F0%9F%8C%B3"):
        error = api.http.get(f"/branches/{id}")
        assert error.status_code == 404, id
    assert api.http.get(f"/branches/{branch}", headers={"Authorization": "Bearer other"}).status_code == 401


def test_a_branch_is_there_only_for_the_key_that_made_it(api: Api) -> None:
    """To another tenant it never was: on every route, before and after its end, and as a parent."""
    branch = api.create(text=TEXT)
    neighbour = {"Authorization": f"Bearer {NEIGHBOUR}"}
    uses: list[tuple[str, str, dict[str, Any] | None]] = [
        ("GET", f"/branches/{branch}?text=true", None),
        ("POST", f"/branches/{branch}/fork", {"n": 2}),
        ("POST", f"/branches/{branch}/extend", {"text": "x"}),
        ("POST", f"/branches/{branch}/generate", {}),
        ("POST", f"/branches/{branch}/score", {"continuations": ["x"]}),
        ("POST", "/branches", {"parent": branch}),
        ("DELETE", f"/branches/{branch}", None),
    ]
    for method, path, body in uses:
        answer = api.http.request(method, path, json=body, headers=neighbour)
        assert answer.status_code == 404 and f"branch {branch} does not exist" in answer.text, (path, answer.text)
    ops = [{"op": "delete", "id": branch}, {"op": "fork", "id": branch}]
    answer = api.http.post("/branches/batch", json={"ops": ops}, headers=neighbour)
    assert [result["status"] for result in answer.json()["results"]] == [404, 404]
    assert api.get(branch)["num_tokens"] > 3, "it is as it was"
    # Nor is anything of it in the neighbour's cache.
    answer = api.http.post(
        "/generate", json={"text": TEXT, "sampling_params": {"max_new_tokens": 1}}, headers=neighbour
    )
    assert answer.json()["meta_info"]["cached_tokens"] == 0
    api.http.delete(f"/branches/{branch}")
    assert api.http.get(f"/branches/{branch}").status_code == 410
    assert api.http.get(f"/branches/{branch}", headers=neighbour).status_code == 404


@pytest.mark.parametrize(
    ("path", "body", "field"),
    [
        ("", {"text": "a", "input_ids": [1]}, "text"),
        ("", {"text": 3}, "text"),
        ("", {"input_ids": [1, 400]}, "input_ids[1]"),
        ("", {"input_ids": [1, "a"]}, "input_ids[1]"),
        ("", {"input_ids": [[1]]}, "input_ids[0]"),
        ("", {"ttl": 0}, "ttl"),
        ("", {"ttl": 61}, "ttl"),
        ("", {"ttl": "a"}, "ttl"),
        ("", {"ttl": "2m"}, "ttl"),
        ("", {"messages": "hi"}, "messages"),
        ("", {"messages": []}, "messages"),
        ("", {"messages": [{"role": "judge", "content": "hi"}]}, "messages[0].role"),
        ("", {"messages": [{"role": "user", "content": "hi"}], "functions": [{}]}, "functions"),
        ("", {"text": "a", "prompt_cache_options": {"ttl": "1m"}}, "prompt_cache_options"),
        ("/generate", {"cache_salt": "a"}, "cache_salt"),
        ("/extend", {"text": "a", "prompt_cache_key": "a"}, "prompt_cache_key"),
        ("", {"cache_salt": "x" * 600}, "cache_salt"),
        ("", {"input_ids": [5] * 600}, "input_ids"),
        ("/fork", {"n": 0}, "n"),
        ("/fork", {"n": 5000}, "n"),
        ("/fork", {"n": "2"}, "n"),
        ("/extend", {}, "text"),
        ("/extend", {"input_ids": [-1]}, "input_ids[0]"),
        ("/extend", {"text": "a", "parse_special": "yes"}, "parse_special"),
        ("/extend", {"input_ids": [5] * 600}, "input_ids"),
        ("/extend", {"input_ids": [5] * 510}, "branch"),
        ("/generate", {"extend": {}}, "extend"),
        ("/generate", {"extend": [1.5]}, "extend[0]"),
        ("/generate", {"sampling_params": {"max_new_tokens": -1}}, "sampling_params.max_new_tokens"),
        ("/generate", {"sampling_params": {"max_new_tokens": 5000}}, "sampling_params.max_new_tokens"),
        ("/generate", {"sampling_params": {"nonsense": 1}}, "sampling_params.nonsense"),
        ("/score", {}, "continuations"),
        ("/score", {"continuations": []}, "continuations"),
        ("/score", {"continuations": [""]}, "continuations[0]"),
        ("/score", {"continuations": ["a", 3]}, "continuations[1]"),
        ("/score", {"continuations": ["a"] * 1025}, "continuations"),
        ("/batch", {"ops": []}, "ops"),
    ],
)
def test_what_is_wrong_is_named(api: Api, path: str, body: dict[str, Any], field: str) -> None:
    branch = api.create(text=TEXT)
    before = api.ids(branch)
    url = "/branches" + path if path in ("", "/batch") else f"/branches/{branch}{path}"
    assert api.post(url, 400, **body)["error"]["param"] == field
    assert api.ids(branch) == before


def test_past_the_limit_it_says_when_to_come_back(api: Api) -> None:
    trunk = api.create(text=TEXT)
    children = api.post(f"/branches/{trunk}/fork", n=63)["ids"]
    for path, body in (("/branches", {}), (f"/branches/{trunk}/fork", {"n": 1})):
        answer = api.http.post(path, json=body)
        assert answer.status_code == 429 and answer.headers["Retry-After"] == "1"
        assert "--max-branches" in answer.json()["error"]["message"]
    api.http.delete(f"/branches/{children[0]}")
    api.post(f"/branches/{trunk}/fork", n=1)


def test_a_branch_expires_and_takes_its_pages_along(api: Api, branch_server: Any) -> None:
    branch = api.create(text=TEXT, ttl=2)
    api.generate(branch)
    for _ in range(3):
        time.sleep(0.8)
        api.get(branch)  # each use renews it
    assert api.http.get("/branches").json()["holding"] == 1
    deadline = time.monotonic() + 60
    while api.http.get("/branches").json()["branches"]:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert api.http.get("/branches").json() | {"holds_lost": 0} == {
        "branches": 0,
        "generating": 0,
        "holding": 0,
        "holds_lost": 0,
        "tokens": 0,
        "max_branches": 64,
    }
    assert api.http.get(f"/branches/{branch}").status_code == 410
    branch_server.idle()


def test_many_at_once_over_a_pool_that_is_too_small(api: Api) -> None:
    """Branches of many clients; every answer is the stateless one, whatever was lost and refilled."""
    trunk = api.create(text=TEXT * 2)
    children = api.post(f"/branches/{trunk}/fork", n=40)["ids"]
    lock, failures = threading.Lock(), []

    def use(i: int) -> list[tuple[list[int], list[int]]]:
        done = []
        try:
            with httpx.Client(base_url=api.http.base_url, headers=api.http.headers, timeout=120) as http:
                own = Api(http)
                for turn in range(3):
                    answer = own.generate(
                        children[i],
                        {"max_new_tokens": 8},
                        extend=f" {i} asks for the {turn}. time, at some length",
                        return_prompt_token_ids=True,
                    )
                    done.append((answer["prompt_token_ids"], answer["output_ids"]))
        except Exception as error:
            with lock:
                failures.append(error)
        return done

    with ThreadPoolExecutor(16) as pool:
        results = [one for done in pool.map(use, range(40)) for one in done]
    assert not failures, failures[:3]
    assert api.http.get("/branches").json()["holds_lost"] > 0
    api.post("/flush_cache")
    for prompt, output in results[::7]:
        assert api.stateless(prompt, {"max_new_tokens": 8})["output_ids"] == output
