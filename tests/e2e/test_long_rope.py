"""LongRoPE beyond its original context: the long factors for all contexts, as transformers has them for long ones."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

from branchwise import Engine, SamplingParams

ORIGINAL, NEW = 256, 64


def test_greedy_tokens_of_long_contexts_equal_transformers(checkpoint: Callable[[str], Path]) -> None:
    import transformers

    folder = checkpoint("phi3")
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    prompt = torch.randint(3, model.config.vocab_size, (1, ORIGINAL + 1), generator=torch.Generator().manual_seed(1))
    ids = prompt
    with torch.inference_mode():
        for _ in range(NEW):
            ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], dim=1)
    expected = ids[0, prompt.shape[1] :].tolist()
    params = SamplingParams(temperature=0, max_tokens=NEW, ignore_eos=True)
    with Engine(folder, max_model_len=2 * ORIGINAL, max_num_batched_tokens=100) as engine:
        # A prefix that was computed in a short context is reused in a long one.
        engine.generate(prompt[0, :90].tolist(), SamplingParams(max_tokens=1))
        for _ in ("a cached prefix", "warm"):
            assert engine.generate(prompt[0].tolist(), params).token_ids == expected
