"""Prompt logprobs come from memory where the tree has them; what it lacks is computed once, whoever asks first."""

from __future__ import annotations

import random

import numpy as np
import pytest

from branchwise.runtime.messages import Generate
from branchwise.runtime.sampling_params import SamplingParams

SHARED = [(7 * i) % 40 + 2 for i in range(30)]


def ask(driver, prompt, k=0, **params):
    return driver.add(prompt, prompt_logprobs=k, **{"max_tokens": 0, **params})


def nodes(prompts):
    """The distinct prefixes of the prompts: the nodes of a trie, counted without one."""
    return {tuple(prompt[:end]) for prompt in prompts for end in range(1, len(prompt) + 1)}


def recomputed(prompts):
    """A prompt that leaves those before it inside a cached prefix computes the last shared token again, for its
    logits."""
    seen, again = set(), 0
    for prompt in prompts:
        shared = max((end for end in range(len(prompt) + 1) if tuple(prompt[:end]) in seen), default=0)
        again += 0 < shared < len(prompt)
        seen |= nodes([prompt])
    return again


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("k", [0, 1])
@pytest.mark.parametrize("chunk", [16, 512])
def test_every_shared_position_is_scored_once(make_driver, overlap, k, chunk):
    driver = make_driver(overlap=overlap, max_num_batched_tokens=chunk)
    prompts = [[*SHARED, question, 3, *answer] for question in (4, 5) for answer in ([6], [6, 7, 8], [9, 10])]
    asked = [ask(driver, prompt, k) for prompt in prompts]
    driver.drain()
    assert driver.executor.scored == len(nodes(prompts)) - 1
    assert driver.executor.prefilled == len(nodes(prompts)) + recomputed(prompts)
    found = sum(driver.finished[id_].cache.cached_logprobs for id_ in asked)
    assert found == sum(len(prompt) - 1 for prompt in prompts) - driver.executor.scored
    driver.verify()


def test_what_is_remembered_needs_no_step(make_driver):
    driver = make_driver()
    ask(driver, SHARED)
    driver.drain()
    computed = driver.executor.prefilled
    again, part = ask(driver, SHARED, 1), ask(driver, SHARED, prompt_logprob_start=20)
    driver.drain()
    assert driver.executor.prefilled == computed
    assert driver.finished[again].cache.cached_logprobs == 29
    assert driver.finished[again].cache.hit_tokens == 30
    assert driver.finished[part].cache.cached_logprobs == 10
    sampled = ask(driver, SHARED, max_tokens=3)
    driver.drain()
    assert driver.finished[sampled].cache.hit_tokens == 29  # the last token is computed, to sample after it
    assert driver.finished[sampled].cache.cached_logprobs == 29
    driver.verify()


def test_keys_and_values_without_scores_are_computed_again(make_driver):
    """What a request for text has computed has no scores; once it has, requests for text use the same pages."""
    driver = make_driver()
    driver.add(SHARED, max_tokens=2)
    driver.drain()
    computed = driver.executor.prefilled
    ask(driver, SHARED)
    driver.drain()
    assert driver.executor.prefilled == computed + 30
    ask(driver, SHARED)
    driver.drain()
    assert driver.executor.prefilled == computed + 30
    driver.verify()


def test_more_alternatives_are_always_computed_and_not_remembered(make_driver):
    driver = make_driver()
    ask(driver, SHARED, 1)
    driver.drain()
    for _ in range(2):
        before = driver.executor.scored
        wide = ask(driver, SHARED, 2)
        driver.drain()
        assert driver.executor.scored == before + 29
        assert driver.finished[wide].cache.cached_logprobs == 0
    driver.verify()


def test_positions_before_the_start_are_remembered_once_asked_for(make_driver):
    driver = make_driver()
    ask(driver, SHARED, prompt_logprob_start=20)
    driver.drain()
    early = ask(driver, SHARED)
    driver.drain()
    assert driver.executor.scored == 10 + 29  # nothing is remembered at the first position asked for
    assert driver.finished[early].cache.cached_logprobs == 0
    driver.verify()


def test_without_the_cache_nothing_is_remembered(make_driver):
    driver = make_driver(disable_radix_cache=True)
    for _ in range(2):
        ask(driver, SHARED)
    driver.drain()
    assert driver.executor.scored == 2 * 29
    driver.verify()


def test_namespaces_do_not_share_scores(make_driver):
    driver = make_driver()
    for salt in ("a", "b"):
        ask(driver, SHARED, salt=salt)
        driver.drain()
    assert driver.executor.scored == 2 * 29
    driver.verify()


def test_a_request_does_not_wait_for_one_that_was_aborted(make_driver):
    driver = make_driver(max_num_batched_tokens=8)
    first = ask(driver, SHARED)
    driver.step()
    second = ask(driver, SHARED)
    driver.step()
    driver.abort(first)
    driver.drain()
    assert driver.finished[second].cache.cached_logprobs < 29
    driver.verify()


def test_samples_of_one_prompt_share_its_scores(make_driver):
    driver = make_driver()
    ids = [1, 2, 3]
    driver.next_id = 4
    params = SamplingParams(max_tokens=2, n=3, seed=5, ignore_eos=True, prompt_logprobs=0)
    for i, id_ in enumerate(ids):
        driver.prompts[id_], driver.params[id_], driver.outputs[id_] = SHARED, params.sample(i), []
    driver.core.add(Generate(ids, params, tokens=np.array(SHARED, "<i4").tobytes()))
    driver.drain()
    assert driver.executor.scored <= 29 + 2 * 3  # but those of a last page that is not full, until it is published
    driver.verify()


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("seed", range(6))
def test_random_requests_under_memory_pressure(make_driver, overlap, seed):
    """Retractions, evictions and aborts: whatever is delivered is what the whole context gives."""
    rng = random.Random(seed)
    driver = make_driver(num_pages=24, overlap=overlap, max_num_batched_tokens=rng.choice([8, 24, 512]), max_num_seqs=5)
    for _ in range(60):
        prompt = [*SHARED[: rng.choice([0, 5, 16, 30])], *(rng.choice([2, 3]) for _ in range(rng.randint(1, 12)))]
        k = rng.choice([None, 0, 0, 1, 1, 3])
        start = rng.choice([0, 0, 0, len(prompt) // 2])
        more = {} if k is None else {"prompt_logprobs": k, "prompt_logprob_start": start}
        id_ = driver.add(prompt, max_tokens=rng.choice([0, 0, 1, 12]), **more)
        for _ in range(rng.randint(0, 3)):
            if driver.core.has_work:
                driver.step()
        if rng.random() < 0.1:
            driver.abort(id_)
    driver.drain()
    driver.verify()
