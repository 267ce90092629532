"""Sixty-four greedy tokens of every family, identical to `transformers`: cold, warm, chunked, whatever the page."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from branchwise import Engine, SamplingParams

LENGTHS = (1, 15, 16, 17, 50)
NEW = 64


@pytest.fixture(scope="module")
def reference(checkpoint: Callable[[str], Path]) -> Callable[[str], dict[int, tuple[list[int], list[int]]]]:
    """Per family: prompt length -> (prompt ids, greedy continuation by `transformers` without a KV cache of ours)."""
    made: dict[str, dict[int, tuple[list[int], list[int]]]] = {}

    def greedy(family: str) -> dict[int, tuple[list[int], list[int]]]:
        if family in made:
            return made[family]
        import torch
        from transformers import AutoModelForCausalLM

        model = AutoModelForCausalLM.from_pretrained(
            checkpoint(family), dtype=torch.float32, attn_implementation="eager"
        )
        generator = torch.Generator().manual_seed(1)
        made[family] = {}
        for length in LENGTHS:
            prompt = torch.randint(3, model.config.vocab_size, (1, length), generator=generator)
            ids = prompt
            with torch.inference_mode():
                for _ in range(NEW):
                    ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], dim=1)
            made[family][length] = (prompt[0].tolist(), ids[0, length:].tolist())
        return made[family]

    return greedy


@pytest.mark.parametrize("page_size", [1, 16])
def test_greedy_tokens_equal_transformers(checkpoint, reference, family, page_size):
    expected = reference(family)
    greedy = SamplingParams(temperature=0, max_tokens=NEW, ignore_eos=True)
    for overlap, budget in ((False, None), (True, 24)):  # 24: prompts are computed in chunks beside decodes
        with Engine(
            checkpoint(family),
            page_size=page_size,
            max_num_seqs=16,
            max_num_batched_tokens=budget,
            kv_cache_tokens=2048,
            overlap=overlap,
        ) as engine:
            prompts = [expected[n][0] for n in LENGTHS]
            cold = engine.generate(prompts, greedy)  # all at once: batched, sharing steps
            warm = engine.generate(prompts, greedy)
            alone = [engine.generate(p, greedy) for p in prompts]
            engine.check()
        for length, first, second, third in zip(LENGTHS, cold, warm, alone, strict=True):
            assert first.token_ids == expected[length][1]
            assert second.token_ids == expected[length][1]
            assert third.token_ids == expected[length][1]
            assert second.cached_tokens == third.cached_tokens == length - 1
