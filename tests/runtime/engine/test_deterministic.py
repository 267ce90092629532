"""``deterministic``: the same tokens and logprobs, to the bit, whatever else is in the batch and in the cache."""

from __future__ import annotations

import numpy as np
import pytest

from branchwise import Engine, LoadError, SamplingParams


def prompts(engine, lengths, seed=0):
    rng = np.random.default_rng(seed)
    trunk = rng.integers(3, engine.vocab_size, 90).tolist()
    return [
        trunk[: length // 2] + rng.integers(3, engine.vocab_size, length - length // 2).tolist() for length in lengths
    ]


PARAMS = SamplingParams(temperature=0.9, seed=5, max_tokens=9, ignore_eos=True, logprobs=2, prompt_logprobs=2)


def facts(output):
    return output.token_ids, output.logprobs, output.prompt_logprobs


MODELS = [
    ("llama-gqa", "float32", 4),
    ("llama-gqa", "bfloat16", 16),
    ("gemma2", "float32", 16),
    ("qwen3-moe", "float32", 4),
]


@pytest.fixture(scope="module", params=MODELS, ids=lambda model: "-".join(map(str, model)))
def reference(request, checkpoint):
    """Every prompt alone, with nothing cached, in one chunk."""
    family, dtype, page_size = request.param
    settings = {"dtype": dtype, "page_size": page_size, "deterministic": True, "kv_cache_tokens": 4096}
    settings["model"] = checkpoint(family)
    with Engine(disable_radix_cache=True, **settings) as engine:
        asked = prompts(engine, [5, 17, 33, 64, 90, 121, 150, 97])
        return settings, asked, [facts(engine.generate(prompt, PARAMS)) for prompt in asked]


def test_a_batch_gives_the_bits_of_each_alone(reference):
    settings, asked, expected = reference
    with Engine(disable_radix_cache=True, **settings) as engine:
        assert [facts(one) for one in engine.generate(asked, PARAMS)] == expected
        assert [facts(one) for one in engine.generate(asked[::-1], PARAMS)] == expected[::-1]


@pytest.mark.parametrize("chunk", [7, 50, 2048])
def test_warm_and_in_chunks_as_cold_and_at_once(reference, chunk):
    settings, asked, expected = reference
    with Engine(max_num_batched_tokens=chunk, max_num_seqs=6, **settings) as engine:
        for prompt in asked[::3]:  # leaves prefixes of all lengths behind
            engine.generate(prompt[: len(prompt) * 2 // 3], SamplingParams(max_tokens=3, temperature=0))
        assert [facts(one) for one in engine.generate(asked, PARAMS)] == expected
        plain = SamplingParams(temperature=0.9, seed=5, max_tokens=9, ignore_eos=True, logprobs=2)
        again = engine.generate(asked, plain)
        assert all(one.cached_tokens == len(prompt) - 1 for one, prompt in zip(again, asked, strict=True))
        assert [(one.token_ids, one.logprobs) for one in again] == [(ids, rows) for ids, rows, _ in expected]


def test_remembered_logprobs_are_those_that_would_be_computed(reference):
    settings, asked, expected = reference
    scored = SamplingParams(max_tokens=0, prompt_logprobs=0)
    with Engine(**settings) as engine:
        for _ in range(2):
            found = engine.generate(asked, scored)
            for output, (_, _, rows) in zip(found, expected, strict=True):
                assert {p: row.logprob for p, row in output.prompt_logprobs.items()} == {
                    p: row.logprob for p, row in rows.items()
                }
        assert sum(one.cache.cached_logprobs for one in found) == sum(len(prompt) - 1 for prompt in asked)


def test_it_is_the_same_model(reference):
    settings, asked, expected = reference
    with Engine(**{**settings, "deterministic": False}) as engine:
        found = engine.generate(asked, SamplingParams(max_tokens=0, prompt_logprobs=0))
        for output, (_, _, rows) in zip(found, expected, strict=True):
            for position, row in output.prompt_logprobs.items():
                near = 1e-4 if settings["dtype"] == "float32" else 0.15
                assert row.logprob == pytest.approx(rows[position].logprob, abs=near)


@pytest.mark.parametrize("setting", [{"tensor_parallel_size": 2}, {"attention_backend": "torch"}])
def test_what_cannot_be_deterministic_is_refused(setting):
    with pytest.raises(LoadError, match="--deterministic"):
        Engine("", deterministic=True, **setting)
