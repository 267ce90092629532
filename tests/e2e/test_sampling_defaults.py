"""A model that wants to be sampled its own way: on every route, what is left out is drawn as if it had been said."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from branchwise.runtime.config import EngineConfig, ServerConfig

# Far from what is usual, each of them: to leave one out gives other tokens.
WANTED = {"temperature": 0.6, "top_p": 0.8, "top_k": 25, "min_p": 0.15, "repetition_penalty": 1.3}
NEUTRAL = {"temperature": 1.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0}
STORY = [{"role": "user", "content": "Tell me a story."}]
PROMPT = "<|im_start|>user\nTell me a story.<|im_end|>\n<|im_start|>assistant\n"
DAYS = ["Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"]
WEEK = {
    "type": "object",
    "properties": {name: {"enum": DAYS} for name in ("work", "rest", "swim", "read")},
    "required": ["work", "rest", "swim", "read"],
}
TOOL = {"type": "function", "function": {"name": "plan", "parameters": WEEK}}
WITH_TOOLS = '{% if tools %}<tool_call>\n{"name": "f", "arguments": {}}\n</tool_call>{{ tools | length }}{% endif %}'
LENGTH = 24


def serve(folder: Path, run_server_process: Any, run_root: Path, setting: Any) -> Iterator[Any]:
    engine = EngineConfig(
        model=str(folder), kv_cache_tokens=8192, device="cpu", check_when_idle=True, sampling_defaults=setting
    )
    with run_server_process(ServerConfig(engine=engine, port=0), run_root) as running:
        yield running
        running.idle()


@pytest.fixture(scope="module")
def folder(checkpoint_wanting: Callable[..., Path]) -> Path:
    folder = checkpoint_wanting(do_sample=False, **WANTED)
    settings = folder / "tokenizer_config.json"
    values = json.loads(settings.read_text())
    settings.unlink()
    settings.write_text(json.dumps({**values, "chat_template": WITH_TOOLS + values["chat_template"]}))
    return folder


@pytest.fixture(scope="module")
def wanting(folder: Path, run_server_process: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A server of that model."""
    yield from serve(folder, run_server_process, tmp_path_factory.mktemp("run"), "model")


@pytest.fixture(scope="module")
def neutral(folder: Path, run_server_process: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """One that does not care what the model wants."""
    yield from serve(folder, run_server_process, tmp_path_factory.mktemp("run"), "neutral")


def post(server: Any, path: str, body: dict[str, Any]) -> Any:
    answer = server.http.post(path, json=body)
    assert answer.status_code == 200, answer.text
    return answer.json()


def completions(server: Any, said: dict[str, Any], seed: int) -> Any:
    body = {"prompt": PROMPT, "max_tokens": LENGTH, "seed": seed, **said}
    return post(server, "/v1/completions", body)["choices"][0]["text"]


def chat(server: Any, said: dict[str, Any], seed: int, **more: Any) -> Any:
    body = {"messages": STORY, "max_tokens": LENGTH, "seed": seed, **more, **said}
    return post(server, "/v1/chat/completions", body)["choices"][0]["message"]


def tool_call(server: Any, said: dict[str, Any], seed: int) -> Any:
    asked = {"tools": [TOOL], "tool_choice": "required", "parallel_tool_calls": False, "max_tokens": 200}
    return [call["function"] for call in chat(server, said, seed, **asked)["tool_calls"]]


def structured(server: Any, said: dict[str, Any], seed: int) -> Any:
    wanted = {"type": "json_schema", "json_schema": {"name": "week", "schema": WEEK}}
    return chat(server, said, seed, response_format=wanted, max_tokens=200)["content"]


def streamed(server: Any, said: dict[str, Any], seed: int) -> Any:
    body = {"messages": STORY, "max_tokens": LENGTH, "seed": seed, "stream": True, **said}
    answer = server.http.post("/v1/chat/completions", json=body)
    assert answer.status_code == 200, answer.text
    events = [json.loads(line[6:]) for line in answer.text.split("\n\n") if line and "[DONE]" not in line]
    return "".join(event["choices"][0]["delta"].get("content") or "" for event in events)


def responses(server: Any, said: dict[str, Any], seed: int) -> Any:
    body = {"input": STORY, "max_output_tokens": LENGTH, "seed": seed, **said}
    return post(server, "/v1/responses", body)["output"][0]["content"][0]["text"]


def messages(server: Any, said: dict[str, Any], seed: int) -> Any:
    body = {"messages": STORY, "max_tokens": LENGTH, "seed": seed, **said}
    return post(server, "/v1/messages", body)["content"][0]["text"]


def generate(server: Any, said: dict[str, Any], seed: int) -> Any:
    sampling = {"max_new_tokens": LENGTH, "sampling_seed": seed, **said}
    return post(server, "/generate", {"text": PROMPT, "sampling_params": sampling})["output_ids"]


def of_a_list(server: Any, said: dict[str, Any], seed: int) -> Any:
    """The second of two prompts, the first of which says everything itself."""
    sampling = {"max_new_tokens": LENGTH, "sampling_seed": seed}
    body = {"text": [PROMPT, PROMPT], "sampling_params": [{**sampling, **NEUTRAL}, {**sampling, **said}]}
    return post(server, "/generate", body)[1]["output_ids"]


def branch(server: Any, said: dict[str, Any], seed: int) -> Any:
    id = post(server, "/branches", {"text": PROMPT})["id"]
    sampling = {"max_new_tokens": LENGTH, "sampling_seed": seed, **said}
    answer = post(server, f"/branches/{id}/generate", {"sampling_params": sampling})
    server.http.delete(f"/branches/{id}").raise_for_status()
    return answer["output_ids"]


ROUTES = [
    *(completions, chat, tool_call, structured, streamed, responses, messages, generate, of_a_list, branch),
]


@pytest.mark.parametrize("route", ROUTES)
def test_what_is_left_out_is_what_the_model_wants(route: Any, wanting: Any, neutral: Any) -> None:
    """And what is said, or what a server that is told to be neutral makes of silence, is something else."""
    taken = {name: value for name, value in WANTED.items() if route is not messages or name != "repetition_penalty"}
    differ = 0
    for seed in (1, 2, 3):
        silent = route(wanting, {}, seed)
        assert route(wanting, taken, seed) == silent
        assert route(wanting, dict.fromkeys(taken), seed) == silent, "null says nothing"
        unlike = {name: NEUTRAL[name] for name in taken}
        said = route(neutral, unlike, seed)
        assert route(neutral, {}, seed) == said
        if route is not messages:  # there the penalty cannot be said
            assert route(wanting, unlike, seed) == said
        differ += said != silent
    assert differ >= 2, "it could not have been seen"


@pytest.mark.parametrize("name", WANTED)
def test_each_field_is_by_itself(name: str, wanting: Any, neutral: Any) -> None:
    """One that is said leaves the others the model's."""
    said = {name: NEUTRAL[name]}
    others = {**WANTED, **said}
    outcomes = []
    for seed in range(5):
        outcomes.append(generate(wanting, said, seed))
        assert outcomes[-1] == generate(neutral, others, seed)
    assert outcomes != [generate(wanting, {}, seed) for seed in range(5)], "it makes a difference"


def test_greedy_stays_greedy(wanting: Any, neutral: Any) -> None:
    """But for the penalty, which is no matter of drawing."""
    assert generate(wanting, {"temperature": 0}, 1) == generate(wanting, {"temperature": 0}, 2)
    said = {"temperature": 0, "repetition_penalty": 1.0}
    assert generate(wanting, said, 1) == generate(neutral, said, 1) == generate(neutral, {"temperature": 0}, 1)


def test_scores_are_the_models_own(wanting: Any, neutral: Any) -> None:
    ids = generate(neutral, {"temperature": 0}, 1)
    body = {"input_ids": ids, "return_logprob": True, "logprob_start_len": 0, "sampling_params": {"max_new_tokens": 0}}
    found = [post(server, "/generate", body)["meta_info"]["input_token_logprobs"] for server in (wanting, neutral)]
    assert [value for value, *_ in found[0][1:]] == pytest.approx([value for value, *_ in found[1][1:]], abs=1e-4)


def test_what_applies_can_be_seen(wanting: Any, neutral: Any) -> None:
    for server, values, drawn in ((wanting, WANTED, WANTED), (neutral, None, NEUTRAL)):
        assert server.http.get("/get_model_info").json()["preferred_sampling_params"] == values
        facts = server.http.get("/get_server_info").json()
        assert facts["engine"]["preferred_sampling_params"] == values
        assert facts["config"]["engine"]["sampling_defaults"] == ("neutral" if values is None else "model")
        told = post(server, "/v1/responses", {"input": "Hi", "max_output_tokens": 1})
        assert {name: told[name] for name in ("temperature", "top_p")} == {
            name: drawn[name] for name in ("temperature", "top_p")
        }
        told = post(server, "/v1/responses", {"input": "Hi", "max_output_tokens": 1, "temperature": 0.5})
        assert (told["temperature"], told["top_p"]) == (0.5, drawn["top_p"])


def test_a_bad_request_still_names_its_field(wanting: Any) -> None:
    assert "got 2" in wanting.refused("/v1/completions", "top_p", json={"prompt": "x", "top_p": 2})
    refused = {"text": "x", "sampling_params": {"top_k": "many"}}
    assert "must be a valid integer" in wanting.refused("/generate", "sampling_params.top_k", json=refused)


def test_a_value_that_cannot_be_served_ends_the_start(
    tokenizer_folder: Path, start_server: Callable[..., Any], null_settings: Any, tmp_path: Path
) -> None:
    for file in tokenizer_folder.iterdir():
        (tmp_path / file.name).symlink_to(file)
    (tmp_path / "generation_config.json").write_text('{"temperature": -1}')
    server = start_server(null_settings(tmp_path))
    said = server.log.read_text()
    assert server.process.returncode == 2 and len(said.splitlines()) == 1, said
    assert f"{tmp_path}/generation_config.json: temperature must be at least 0.0" in said
    assert "--sampling-defaults neutral" in said
    assert start_server(null_settings(tmp_path, engine={"sampling_defaults": "neutral"})).info
