"""Weights that load and overflow: the request whose logits are NaN ends with an error, and only that request."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from branchwise import Engine, EngineDead, SamplingParams
from branchwise.runtime.models import implementation

POISON = 77  # its embedding is NaN, as after an overflow in a layer
GREEDY = SamplingParams(temperature=0.0, max_tokens=20, ignore_eos=True)
PROMPT = list(range(100, 140))


@pytest.fixture(scope="module")
def engine(checkpoint: Callable[[str], Path]) -> Iterator[Engine]:
    load = implementation.load_weights

    def poisoned(*args: Any, **kwargs: Any) -> dict[str, torch.Tensor]:
        weights = load(*args, **kwargs | {"in_files": None})  # all of them in memory
        weights["embedding"][POISON] = torch.nan
        return weights

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(implementation, "load_weights", poisoned)
        engine = Engine(checkpoint("llama-mqa"), max_num_seqs=8, kv_cache_tokens=2048, page_size=8)
    with engine:
        yield engine
        engine.check()


@pytest.mark.parametrize(
    "params",
    [
        GREEDY,
        SamplingParams(max_tokens=20),
        SamplingParams(max_tokens=20, top_p=0.9, top_k=50),
        SamplingParams(max_tokens=20, temperature=0.0, logprobs=2),
        SamplingParams(max_tokens=20, regex="[a-z]{4}"),
        SamplingParams(max_tokens=20, frequency_penalty=0.5),
        SamplingParams(max_tokens=0, prompt_logprobs=1),
        SamplingParams(max_tokens=2, n=2),
    ],
)
def test_the_request_ends_with_an_error_that_names_the_cause(engine: Engine, params: SamplingParams) -> None:
    with pytest.raises(EngineDead, match="are NaN or infinite"):
        engine.generate([*PROMPT, POISON, 5], params)


def test_neighbours_and_later_users_of_the_pages_are_not_harmed(engine: Engine) -> None:
    expected = engine.generate(PROMPT, GREEDY).token_ids
    streams = [engine.stream(PROMPT, GREEDY) for _ in range(3)]
    broken = engine.stream([*PROMPT, POISON], GREEDY)
    with pytest.raises(EngineDead):
        list(broken)
    for stream in streams:
        assert [token for chunk in stream for token in chunk.token_ids] == expected
    prompts = [[(length * 31 + i) % 70 for i in range(length)] for length in range(1, 40, 7)]
    alone = [engine.generate(prompt, GREEDY).token_ids for prompt in prompts]
    for i in range(8):  # fills the pool with NaN; its pages are then partly filled by others
        with pytest.raises(EngineDead):
            engine.generate([POISON, *[i] * 250], GREEDY)
    engine.flush_cache()
    assert [output.token_ids for output in engine.generate(prompts, GREEDY)] == alone


def test_a_token_sampled_later_ends_the_request_then(engine: Engine) -> None:
    """A bias makes the model write the token whose embedding is NaN; the tokens before it are delivered."""
    received = []
    with pytest.raises(EngineDead, match="output token 2 are"):
        for chunk in engine.stream(
            PROMPT, SamplingParams(max_tokens=9, temperature=0.0, logit_bias={POISON: 100.0}, ignore_eos=True)
        ):
            received += chunk.token_ids
    assert received == [POISON]


def test_scores_of_a_branch_name_the_cause(engine: Engine) -> None:
    with engine.branch(PROMPT) as branch, pytest.raises(EngineDead, match="NaN or infinite"):
        branch.score([[5, POISON, 6]])
