"""What is read from a model's generation_config.json, and what it means for each kind of request."""

from __future__ import annotations

import asyncio
import itertools
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from branchwise import AsyncEngine, Engine
from branchwise.runtime.config import EngineConfig, check
from branchwise.runtime.errors import LoadError
from branchwise.runtime.models.folder import SHIPPED
from branchwise.runtime.models.sampling_defaults import DEFAULTED, sampling_defaults
from branchwise.runtime.sampling_params import SamplingParams
from branchwise.runtime.server.http.anthropic.request import MessagesRequest
from branchwise.runtime.server.http.anthropic.spec import messages_sampling
from branchwise.runtime.server.http.fields.parse import parse
from branchwise.runtime.server.http.openai.chat.request import ChatRequest, chat_sampling
from branchwise.runtime.server.http.openai.completions import CompletionRequest, completion_sampling
from branchwise.runtime.server.http.openai.responses.request import read, response_sampling
from branchwise.runtime.server.http.sglang.request import GenerateSampling, generate_sampling

QWEN3 = {"temperature": 0.6, "top_p": 0.95, "top_k": 20}  # its generation_config.json, as of its release
OTHER = {"temperature": 0.25, "top_p": 0.5, "top_k": 7, "min_p": 0.125, "repetition_penalty": 1.5}
NEUTRAL = {"temperature": 1.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0}


def defaults(folder: Path, setting: Any = "model", **raw: Any) -> dict[str, float]:
    (folder / "generation_config.json").write_text(json.dumps(raw))
    return sampling_defaults(EngineConfig(sampling_defaults=setting), folder)


def test_of_a_models_file_five_fields_are_read(tmp_path: Path) -> None:
    found = defaults(
        tmp_path,
        do_sample=True,
        eos_token_id=[1, 2],
        max_new_tokens=9,
        typical_p=0.5,
        transformers_version="4",
        **QWEN3,
    )
    assert found == QWEN3
    assert defaults(tmp_path, **OTHER) == OTHER and set(OTHER) == set(DEFAULTED)


def test_do_sample_changes_nothing(tmp_path: Path) -> None:
    assert defaults(tmp_path, do_sample=False) == {}
    assert defaults(tmp_path, do_sample=False, **QWEN3) == QWEN3


def test_null_is_nothing_and_so_is_a_file_that_is_not_there(tmp_path: Path) -> None:
    assert sampling_defaults(EngineConfig(), tmp_path) == {}
    assert defaults(tmp_path, temperature=None, top_k=3) == {"top_k": 3}


@pytest.mark.parametrize(
    ("key", "value", "problem"),
    [
        ("temperature", -0.5, "temperature must be at least 0.0 and at most 100.0, got -0.5"),
        ("temperature", float("nan"), "temperature must be finite, got nan"),
        ("temperature", float("inf"), "temperature must be finite, got inf"),
        ("temperature", "0.6", "temperature must be a number, got str"),
        ("temperature", True, "temperature must be a number, got bool"),
        ("top_p", 0, "top_p must be greater than 0.0 and at most 1.0, got 0"),
        ("top_p", [0.9], "top_p must be a number, got list"),
        ("top_k", 20.0, "top_k must be an integer, got float"),
        ("top_k", -2, "top_k must be at least -1 and at most 2147483647, got -2"),
        ("min_p", 1.5, "min_p must be at least 0.0 and at most 1.0, got 1.5"),
        ("repetition_penalty", 0.0, "repetition_penalty must be greater than 0.0 and at most 100.0, got 0.0"),
    ],
)
def test_a_bad_value_names_file_key_limit_and_the_way_out(tmp_path: Path, key: str, value: Any, problem: str) -> None:
    with pytest.raises(LoadError) as caught:
        defaults(tmp_path, **{**QWEN3, key: value})
    assert str(caught.value) == (
        f"{tmp_path / 'generation_config.json'}: {problem} (--sampling-defaults neutral does without)"
    )
    assert defaults(tmp_path, "neutral", **{key: value}) == {}


@pytest.mark.parametrize("setting", ["neutral", "openai"])
def test_neutral_is_also_called_as_sglang_calls_it(tmp_path: Path, setting: Any) -> None:
    assert defaults(tmp_path, setting, **QWEN3) == {}


def test_a_file_that_is_no_object_is_refused(tmp_path: Path) -> None:
    for text in ("[1]", "{"):
        (tmp_path / "generation_config.json").write_text(text)
        with pytest.raises(LoadError, match=r"generation_config\.json"):
            sampling_defaults(EngineConfig(), tmp_path)


def test_another_setting_is_refused() -> None:
    with pytest.raises(LoadError, match="--sampling-defaults: must be one of model, neutral, openai, got 'vllm'"):
        check(EngineConfig(sampling_defaults="vllm"))  # type: ignore[arg-type]


# -- precedence --------------------------------------------------------------------------------------------------------


def completions(body: dict[str, Any], preferred: Mapping[str, float]) -> SamplingParams:
    return completion_sampling(parse(CompletionRequest, {"prompt": "x", **body}), preferred).params


def chat(body: dict[str, Any], preferred: Mapping[str, float]) -> SamplingParams:
    return chat_sampling(parse(ChatRequest, {"messages": [], **body}), preferred).params


def generate(body: dict[str, Any], preferred: Mapping[str, float]) -> SamplingParams:
    return generate_sampling(parse(GenerateSampling, body), preferred, None, -1)


def responses(body: dict[str, Any], preferred: Mapping[str, float]) -> SamplingParams:
    return response_sampling(read({"input": "x", **body}), preferred).params


def messages(body: dict[str, Any], preferred: Mapping[str, float]) -> SamplingParams:
    said = {"max_tokens": 5, "messages": [{"role": "user", "content": "x"}], **body}
    return messages_sampling(parse(MessagesRequest, said), preferred, {})


def drawn(params: SamplingParams) -> dict[str, float]:
    return {name: getattr(params, name) for name in DEFAULTED}


@pytest.mark.parametrize("route", [completions, chat, generate, responses, messages])
def test_the_request_goes_before_the_model_and_the_model_before_neutral(route: Any) -> None:
    taken = [name for name in DEFAULTED if route is not messages or name != "repetition_penalty"]
    assert drawn(route({}, {})) == NEUTRAL
    assert drawn(route({}, OTHER)) == OTHER
    assert drawn(route({}, QWEN3)) == {**NEUTRAL, **QWEN3}
    assert drawn(route(dict.fromkeys(taken), OTHER)) == OTHER, "null says nothing"
    for count in range(1, len(taken) + 1):  # a field that is said says nothing about the others
        for some in itertools.combinations(taken, count):
            said = {name: NEUTRAL[name] for name in some}
            assert drawn(route(said, OTHER)) == {**OTHER, **said}


# -- in process --------------------------------------------------------------------------------------------------------

TEXT = "def fork(program, branches): return [program.copy() for _ in range(branches)]"
GREEDY = SamplingParams(temperature=0)


@pytest.fixture(scope="module")
def folder(checkpoint_wanting: Callable[..., Path]) -> Path:
    """What it wants is to be greedy, in its own words: without a seed that can be seen."""
    return checkpoint_wanting(temperature=1.7, top_k=1)


@pytest.fixture(scope="module")
def engine(folder: Path) -> Iterator[Engine]:
    with Engine(folder, kv_cache_tokens=4096) as engine:
        yield engine
        engine.check()


def test_without_params_an_engine_draws_as_its_model_wants(engine: Engine) -> None:
    wanted = engine.generate(TEXT, GREEDY).token_ids
    assert engine.default_params() == SamplingParams(temperature=1.7, top_k=1)
    assert engine.generate(TEXT).token_ids == wanted
    assert [one.token_ids for one in engine.generate([TEXT, TEXT])] == [wanted, wanted]
    assert [token for chunk in engine.stream(TEXT) for token in chunk.token_ids] == wanted
    with engine.branch(TEXT) as trunk:
        one, other = trunk.fork(2)
        wanted = one.generate(GREEDY).token_ids
        assert other.generate().token_ids == wanted
        assert [token for chunk in trunk.stream() for token in chunk.token_ids] == wanted
        one.close()
        other.close()


def test_an_asynchronous_one_does_the_same(folder: Path) -> None:
    async def drawn() -> list[list[int]]:
        async with AsyncEngine(folder, kv_cache_tokens=4096) as engine:
            branch = await engine.branch(TEXT)
            streamed = [token async for chunk in engine.stream(TEXT) for token in chunk.token_ids]
            answers = [await engine.generate(TEXT, GREEDY), await engine.generate(TEXT), await branch.generate()]
            return [streamed, *(answer.token_ids for answer in answers)]

    streamed, greedy, silent, branched = asyncio.run(drawn())
    assert streamed == greedy == silent == branched


def test_params_are_what_they_say(engine: Engine, folder: Path) -> None:
    said = SamplingParams(seed=3)
    assert engine.generate(TEXT, said).token_ids != engine.generate(TEXT).token_ids
    with Engine(folder, kv_cache_tokens=4096, sampling_defaults="neutral") as neutral:
        assert neutral.default_params() == SamplingParams()
        assert neutral.info()["preferred_sampling_params"] is None
        assert neutral.generate(TEXT, said).token_ids == engine.generate(TEXT, said).token_ids


def test_a_models_wishes_are_where_others_begin(engine: Engine) -> None:
    changed = engine.default_params(top_k=0, max_tokens=7, seed=5)
    assert changed == SamplingParams(temperature=1.7, max_tokens=7, seed=5)
    assert engine.info()["preferred_sampling_params"] == {"temperature": 1.7, "top_k": 1}
    with pytest.raises(TypeError, match="tempreature"):
        engine.default_params(tempreature=1)


def test_the_shipped_model_wants_nothing() -> None:
    """Its file has ``do_sample: false``, which says nothing about a server's requests."""
    assert sampling_defaults(EngineConfig(), SHIPPED) == {}
