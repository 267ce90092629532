"""What fields become: priorities, seeds, names for aborts, times to live."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import httpx
import msgspec
import pytest

from branchwise.runtime.config import EngineConfig
from branchwise.runtime.errors import InvalidRequest
from branchwise.runtime.messages import Generate, Message
from branchwise.runtime.server.http.app import make_app
from branchwise.runtime.server.http.engine_client import EngineClient
from branchwise.runtime.server.http.fields.cache import CacheFields, caching
from branchwise.runtime.server.http.fields.sampling import engine_seed
from branchwise.runtime.server.http.state import AppState

COMPLETION, GENERATE = "/v1/completions", "/generate"


@pytest.fixture
def submitted(make_state: Callable[..., AppState], sent: list[Message]) -> Callable[..., Any]:
    """``await submitted(path, **body)``: the message that the engine gets."""

    async def submit(path: str, **body: Any) -> Generate:
        transport = httpx.ASGITransport(make_app(make_state()))
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as http:
            asking = asyncio.create_task(http.post(path, json=body))
            while not any(isinstance(message, Generate) for message in sent):
                assert not asking.done(), asking.result().text
                await asyncio.sleep(0.01)
            asking.cancel()
        return next(message for message in sent if isinstance(message, Generate))

    return submit


@pytest.mark.parametrize(("path", "priority"), [(COMPLETION, -7), (GENERATE, 7)])
async def test_a_priority_is_as_the_peer_of_the_route_has_it(
    submitted: Callable[..., Any], path: str, priority: int
) -> None:
    prompt = {"prompt": "a"} if path == COMPLETION else {"text": "a"}
    assert (await submitted(path, **prompt, priority=7)).priority == priority


@pytest.mark.parametrize(
    ("seed", "engines"),
    [(None, None), (-1, None), (0, 0), (7, 7), (-2, 2**63 - 2), (-(2**63), 0), (2**63, 2**63)],
)
async def test_a_seed_may_be_negative(submitted: Callable[..., Any], seed: int | None, engines: int | None) -> None:
    assert engine_seed(seed) == engines
    if seed != 2**63:  # which no engine takes
        assert (await submitted(COMPLETION, prompt="a", seed=seed)).params.seed == engines


async def test_special_tokens_before_a_text_can_be_left_out(submitted: Callable[..., Any]) -> None:
    assert (await submitted(COMPLETION, prompt="a", add_special_tokens=False)).add_special_tokens is False


async def test_the_prompts_ids_are_asked_for_where_they_are_returned(submitted: Callable[..., Any]) -> None:
    assert (await submitted(COMPLETION, prompt="a", return_token_ids=True)).echo_tokens is True


@pytest.mark.parametrize(("tokens", "start", "position"), [(0, {}, 0), (1, {}, None), (0, {"logprob_start_len": 2}, 2)])
async def test_logprobs_of_a_request_that_generates_nothing_are_its_prompts(
    submitted: Callable[..., Any], tokens: int, start: dict[str, int], position: int | None
) -> None:
    """As SGLang's ``unconditional_likelihood_normalized`` asks for them."""
    sampling = {"max_new_tokens": tokens}
    made = await submitted(GENERATE, input_ids=[5, 6, 7], sampling_params=sampling, return_logprob=True, **start)
    assert (made.params.prompt_logprobs is not None) == (position is not None)
    assert made.params.prompt_logprob_start == (position or 0)


async def test_a_rid_names_a_completion_for_aborts(
    submitted: Callable[..., Any], client: EngineClient, sent: list[Message]
) -> None:
    await submitted(COMPLETION, prompt=["a", "b"], rid="mine")
    assert client.abort("mine") == 2


def test_a_default_ttl_beyond_the_servers_is_lowered(make_state: Callable[..., AppState]) -> None:
    state = make_state()
    short = AppState(
        msgspec.structs.replace(state.config, engine=EngineConfig(max_pin_ttl=60.0)),
        *(state.client, state.metrics, state.namespaces, state.model_name),
    )
    for server, longest in ((state, 3600.0), (short, 60.0)):
        found = caching(server, CacheFields(), marks=[(3, "1h"), (9, "5m")])
        assert [ttl for _, ttl in found["breakpoints"]] == [longest, min(300.0, longest)]
    with pytest.raises(InvalidRequest, match="at most 60 seconds"):
        caching(short, CacheFields(), marks=[(3, "61s")])
