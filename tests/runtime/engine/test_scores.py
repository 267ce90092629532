"""Prompt logprobs from memory, with a real model: the same bits, and not computed again."""

from __future__ import annotations

import pytest

from branchwise import AsyncEngine, Engine, InvalidRequest, SamplingParams

TEXT = "A tree of tokens grows a branch for every question that is asked of one document."
SCORED = SamplingParams(max_tokens=0, prompt_logprobs=1)


@pytest.fixture(scope="module", params=[1, 16], ids=["pages-of-1", "pages-of-16"])
def engine(request, checkpoint):
    with Engine(checkpoint("llama-gqa"), kv_cache_tokens=4096, page_size=request.param) as engine:
        yield engine
        engine.check()


@pytest.fixture
def clean(engine):
    engine.flush_cache()
    return engine


def computed(engine, call):
    before = engine.stats().computed_tokens
    return call(), engine.stats().computed_tokens - before


def test_logprobs_from_memory_are_those_that_were_computed(clean):
    ids = clean.tokenizer.encode(TEXT).tolist()
    first, cost = computed(clean, lambda: clean.generate(ids, SCORED))
    assert cost == len(ids) and first.cache.cached_logprobs == 0
    again, cost = computed(clean, lambda: clean.generate(ids, SCORED))
    assert cost == 0 and again.cache.cached_logprobs == len(ids) - 1
    assert again.prompt_logprobs == first.prompt_logprobs  # to the bit, with the best token
    longer, cost = computed(clean, lambda: clean.generate([*ids, 5, 6], SCORED))
    assert cost == 3  # the last known token for its logits, and the new ones
    shared = {position: row for position, row in longer.prompt_logprobs.items() if position < len(ids)}
    assert shared == first.prompt_logprobs
    chosen = clean.generate(ids, SamplingParams(max_tokens=0, prompt_logprobs=0)).prompt_logprobs
    assert {p: row.logprob for p, row in chosen.items()} == {p: row.logprob for p, row in first.prompt_logprobs.items()}
    assert all(row.top == [] for row in chosen.values())


def test_many_requests_that_need_nothing_computed_are_all_served(clean):
    """More than one plan looks up: a plan that ends requests without a step is progress."""
    prompts = [[5, 6, 7, 8 + i] for i in range(200)]
    first = clean.generate(prompts, SCORED)
    again, cost = computed(clean, lambda: clean.generate(prompts, SCORED))
    assert cost == 0
    assert [one.prompt_logprobs for one in again] == [one.prompt_logprobs for one in first]


def test_more_alternatives_are_computed_and_agree(clean):
    ids = clean.tokenizer.encode(TEXT).tolist()
    first = clean.generate(ids, SCORED)
    wide, cost = computed(clean, lambda: clean.generate(ids, SamplingParams(max_tokens=0, prompt_logprobs=3)))
    assert cost == len(ids)
    for position, row in wide.prompt_logprobs.items():
        assert row.logprob == pytest.approx(first.prompt_logprobs[position].logprob, abs=1e-4)
        assert row.top[0][0] == first.prompt_logprobs[position].top[0][0]


def test_score_is_prompt_logprobs_of_the_whole(clean):
    continuations = [" yes", " yes, of course", [9, 8, 7]]
    prefix = clean.tokenizer.encode(TEXT).tolist()
    clean.generate(prefix, SamplingParams(max_tokens=0))
    scores, cost = computed(clean, lambda: clean.score(TEXT, continuations))
    distinct = {tuple(score.token_ids[:end]) for score in scores for end in range(1, len(score.token_ids) + 1)}
    assert cost == len(distinct) + len(scores)  # each begins with the token before it, for that one's logits
    for score in scores:
        params = SamplingParams(max_tokens=0, prompt_logprobs=0, prompt_logprob_start=len(prefix))
        whole, cost = computed(clean, lambda ids=prefix + score.token_ids, params=params: clean.generate(ids, params))
        assert cost == 0 and [row.logprob for row in whole.prompt_logprobs.values()] == score.logprobs
    again, cost = computed(clean, lambda: clean.score(TEXT, continuations))
    assert cost == 0
    assert [score.logprobs for score in again] == [score.logprobs for score in scores]
    assert [score.cached_logprobs for score in again] == [len(score.token_ids) for score in scores]
    assert clean.stats().branches == 0
    for wrong in ([], [""], [[10**6]]):
        with pytest.raises(InvalidRequest, match=r"continuations|input_ids"):
            clean.score(TEXT, wrong)


async def test_score_for_asyncio(checkpoint):
    async with AsyncEngine(checkpoint("llama-gqa"), kv_cache_tokens=2048) as engine:
        one, other = await engine.score(TEXT, [[5, 6], [7, 8]])
        assert [one.cached_logprobs, other.cached_logprobs] == [0, 0] and one.sum != other.sum
