"""Tree of thought, 16 problems in BranchBench's shape: each distinct token is computed once, and little travels."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import branchwise as bw
from branchwise.frontend.lang.engine import EngineBackend


@pytest.fixture(scope="module")
def bench() -> ModuleType:
    path = Path(__file__).resolve().parents[2] / "benchmarks" / "bench_tree_of_thought.py"
    spec = importlib.util.spec_from_file_location("bench_tree_of_thought", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_fewest_tokens_are_the_distinct_ones(bench: ModuleType) -> None:
    asked = [
        ([1, 2, 3], []),  # computed to be shared
        ([1, 2, 3, 4], [5, 6]),  # 4 is new
        ([1, 2, 3, 4, 5, 6, 7], [8]),  # 5 was written and read, 6 only written
        ([1, 2, 3, 4], [9]),  # nothing new, and the logits come from 4
        ([1, 2], []),  # nothing at all
    ]
    assert bench.fewest(asked) == 3 + 1 + 2 + 1


def test_sixteen_at_once_compute_each_distinct_token_once_and_branches_send_a_tenth(bench: ModuleType) -> None:
    used = {}
    with bench.server(page_size=16) as url:
        for branches in (False, True):
            usage, least = bench.run(bw.connect(url, branches=branches))
            # What several of the sixteen begin with in one step, less than a page, each may compute for itself.
            assert least <= usage.computed_tokens <= least + bench.PROBLEMS
            used[branches] = usage
    assert used[True].prompt_tokens == used[False].prompt_tokens > 50 * least
    assert used[True].bytes_sent * 10 <= used[False].bytes_sent
    assert used[True].sent_tokens * 10 <= used[False].sent_tokens


@pytest.fixture(scope="module")
def engine_of_one() -> Iterator[bw.Engine]:
    with bw.Engine(kv_cache_tokens=32768, page_size=1) as engine:
        yield engine


@pytest.mark.parametrize("where", ["stateless", "branches", "engine"])
def test_one_by_one_the_tokens_computed_are_the_distinct_ones(bench: ModuleType, where: str, request: Any) -> None:
    """With a model, too. With pages of one token: siblings that come in one step may each fill up a larger one."""
    if where == "engine":
        smaller = {"problems": 4, "instruction": 256, "given": 64, "thought": 8, "verdict": 2}
        usage, least = bench.run(EngineBackend(request.getfixturevalue("engine_of_one")), num_threads=1, **smaller)
    else:
        with bench.server(page_size=1) as url:
            usage, least = bench.run(bw.connect(url, branches=where == "branches"), num_threads=1)
    assert usage.computed_tokens == least
