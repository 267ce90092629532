"""A prompt and its completion against the context, or against the whole pool where that is smaller."""

from __future__ import annotations

import pytest

from branchwise.runtime.errors import InvalidRequest
from branchwise.runtime.limits import fit
from branchwise.runtime.messages import Limits
from branchwise.runtime.sampling_params import SamplingParams


@pytest.mark.parametrize(
    ("context", "pool", "what"),
    [
        (100, 200, "the 100 tokens of the model's context; .* --max-model-len"),
        (200, 100, "the 100 tokens of the whole KV pool; .* --kv-cache-tokens"),
    ],
)
def test_the_smaller_bound_is_named_with_its_flag(context: int, pool: int, what: str) -> None:
    limits = Limits(vocab_size=10, max_model_len=context, pool_tokens=pool)
    assert fit(40, SamplingParams(max_tokens=60), limits).max_tokens == 60
    assert fit(40, SamplingParams(max_tokens=None), limits).max_tokens == 60
    for prompt_tokens, params, field in (
        (40, SamplingParams(max_tokens=61), "max_tokens"),
        (101, SamplingParams(max_tokens=0), "prompt"),
    ):
        with pytest.raises(InvalidRequest, match=what) as refused:
            fit(prompt_tokens, params, limits)
        assert refused.value.path == field
    with pytest.raises(InvalidRequest, match="no room to generate"):
        fit(100, SamplingParams(max_tokens=None), limits)


def test_a_bound_that_may_be_shortened_is_what_is_left() -> None:
    limits = Limits(vocab_size=10, max_model_len=100, pool_tokens=200)
    for asked, expected in ((60, 60), (61, 60), (32_000, 60), (5, 5)):
        assert fit(40, SamplingParams(max_tokens=asked), limits, shorten=True).max_tokens == expected
    for prompt_tokens in (100, 101):
        with pytest.raises(InvalidRequest) as refused:
            fit(prompt_tokens, SamplingParams(max_tokens=32_000), limits, shorten=True)
        assert refused.value.path == "prompt"
