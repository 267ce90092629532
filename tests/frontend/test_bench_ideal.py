"""The ideal cache against a naive set of prefixes."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from branchwise.frontend.bench.ideal import IdealCache, Trie

sequences = st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=12), min_size=1, max_size=25)


@given(sequences)
@settings(deadline=None)
def test_trie_counts_distinct_prefixes(prompts: list[list[int]]) -> None:
    trie, prefixes = Trie(), set()
    for prompt in prompts:
        own = {tuple(prompt[: n + 1]) for n in range(len(prompt))}
        assert trie.add(np.array(prompt, np.int32)) == len(own & prefixes)
        prefixes |= own
        assert trie.size == len(prefixes)


def test_fewshot_computes_the_prefix_once() -> None:
    cache = IdealCache()
    for question in range(10):
        cache.sent([*range(2048), *range(5000 + 64 * question, 5064 + 64 * question)])
    assert cache.computed_tokens == 2048 + 10 * 64
    assert cache.cached_tokens == 9 * 2048


def test_the_last_prompt_token_is_always_computed() -> None:
    cache = IdealCache()
    cache.sent([1, 2, 3])
    cache.sent([1, 2, 3])
    assert cache.computed_tokens == 3 + 1
    cache.sent([1, 2])  # a proper prefix
    assert cache.computed_tokens == 3 + 1 + 1


def test_outputs_are_reused_but_for_their_last_token() -> None:
    cache = IdealCache()
    cache.sent([1, 2, 3])
    cache.received([1, 2, 3], [7, 8, 9])
    cache.sent([1, 2, 3, 7, 8, 9, 4])
    assert cache.computed_tokens == 3 + 2  # 9 has no KV yet, 4 is new
    assert cache.cached_share == 5 / 10
