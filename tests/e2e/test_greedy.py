"""Sixty-four greedy tokens of every family, identical to `transformers`: cold, warm, chunked, whatever the page."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from branchwise import Engine, SamplingParams

LENGTHS = (1, 15, 16, 17, 50)
NEW = 64
NEW_ALONE = 20  # tokens of a request that runs alone: from every prompt length they cross the end of a page
TIE = 3e-5  # between logits that rounding may swap: transformers in float32 is up to 2.3e-5 off float64


@pytest.fixture(scope="module")
def is_greedy(checkpoint: Callable[[str], Path]) -> Callable[[str, list[int], list[int]], bool]:
    """``is_greedy(family, prompt, tokens)``: whether each token is the most likely one after the prompt and the tokens
    before it, by `transformers` and up to rounding.

    So ``tokens`` is a greedy continuation, by induction: one forward pass proves what decoding token by token would
    compute.
    """

    @lru_cache(maxsize=1)
    def load(family: str) -> Any:
        return AutoModelForCausalLM.from_pretrained(
            checkpoint(family), dtype=torch.float32, attn_implementation="eager"
        )

    def greedy(family: str, prompt: list[int], tokens: list[int]) -> bool:
        with torch.inference_mode():
            logits = load(family)(torch.tensor([prompt + tokens])).logits[0, len(prompt) - 1 : -1]
        chosen = logits.gather(1, torch.tensor(tokens)[:, None])[:, 0]
        return bool((logits.amax(1) - chosen <= TIE).all())

    return greedy


@pytest.mark.parametrize("page_size", [1, 16])
def test_greedy_tokens_equal_transformers(checkpoint, is_greedy, family, page_size):
    greedy = SamplingParams(temperature=0, max_tokens=NEW, ignore_eos=True)
    few = SamplingParams(temperature=0, max_tokens=NEW_ALONE, ignore_eos=True)
    expected: list[list[int]] = []
    for overlap, budget in ((False, None), (True, 24)):  # 24: prompts are computed in chunks beside decodes
        with Engine(
            checkpoint(family),
            page_size=page_size,
            max_num_seqs=16,
            max_num_batched_tokens=budget,
            kv_cache_tokens=2048,
            overlap=overlap,
        ) as engine:
            rng = np.random.default_rng(1)
            prompts = [rng.integers(3, engine.vocab_size, n).tolist() for n in LENGTHS]
            cold = engine.generate(prompts, greedy)  # all at once: batched, sharing steps
            warm = engine.generate(prompts, greedy)
            alone = [engine.generate(p, few) for p in prompts]
            engine.check()
        if not expected:
            expected = [list(one.token_ids) for one in cold]
            for prompt, tokens in zip(prompts, expected, strict=True):
                assert len(tokens) == NEW
                assert is_greedy(family, prompt, tokens)
        for prompt, tokens, first, second, third in zip(prompts, expected, cold, warm, alone, strict=True):
            for found in (first.token_ids, second.token_ids, third.token_ids):
                assert list(found) == tokens[: len(found)] or is_greedy(family, prompt, list(found))
            assert len(first.token_ids) == len(second.token_ids) == NEW and len(third.token_ids) == NEW_ALONE
            assert second.cached_tokens == third.cached_tokens == len(prompt) - 1
