"""The costs fitted to a device's times, without a device: times are made up from known constants."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from branchwise.kernels.attention.base import LayerSpec
from branchwise.kernels.attention.tree_costs import TreeCosts
from branchwise.kernels.attention.tree_gate import Forest, describe, pays_from
from branchwise.kernels.attention.tree_plan import TreeLimits, plan_tree
from branchwise.kernels.kv_pool import KVPool

pytest.importorskip("triton", reason="Triton is not installed")

from branchwise.kernels.attention import tree_tuning
from branchwise.kernels.attention.tree_tuning import POINTS, calibrate, fit, flat_terms, tree_terms

GROUP, PAGE = 4, 16
LIMITS = TreeLimits((4096,) * 3, 1 << 16, (132, 33, 16), (128, 256, 256))
NANOSECONDS = 1e-6  # milliseconds


def terms(costs: TreeCosts) -> tuple[np.ndarray, np.ndarray]:
    flat, tree = [], []
    for point in POINTS:
        n = point.requests
        plan = plan_tree(point.table(PAGE), point.decodes(), n, GROUP, PAGE, costs, LIMITS, -np.inf)
        assert plan is not None and plan.keys_read == point.groups * point.prefix + n * point.tail
        flat.append(flat_terms(costs, point))
        tree.append(tree_terms(costs, point, GROUP, plan))
    return np.array(flat), np.array(tree)


def test_a_forest_is_shared_by_its_groups() -> None:
    table = Forest(6, 2, 32, 20).table(PAGE)
    assert table.shape == (6, 4)
    assert (table[:3, :2] == table[0, :2]).all() and (table[3:, :2] == table[3, :2]).all()
    assert len(np.unique(table)) == 2 * 2 + 6 * 2
    assert len(np.unique(Forest(6, 0, 0, 20).table(PAGE))) == 6 * 2


@pytest.mark.parametrize(
    "true",
    [
        TreeCosts(),
        TreeCosts(flat_layer=5000.0, tree_layer=20000.0),
        TreeCosts(flat=0.8, flat_tail=1.2, per_key=(0.45, 1.3, 2.2), partial=9.0, in_turn=470.0),
    ],
    ids=["as built in", "other launches", "other rates"],
)
def test_the_fit_finds_the_constants_behind_the_times(true: TreeCosts) -> None:
    unit, noise = 1.3 * NANOSECONDS, np.random.default_rng(0)
    flat, tree = (unit * rows.sum(1) * noise.uniform(0.98, 1.02, len(rows)) for rows in terms(true))
    defaults = TreeCosts()
    fitted, error = fit(defaults, terms(defaults)[0], flat, terms(defaults)[1], tree)
    assert error < 0.05
    for name in ("flat_layer", "tree_layer", "flat", "flat_tail", "in_turn"):
        assert getattr(fitted, name) == pytest.approx(getattr(true, name), rel=0.25), name
    assert fitted.per_key[1:] == pytest.approx(true.per_key[1:], rel=0.25)


def test_times_that_no_costs_explain_are_told() -> None:
    flat, tree = terms(TreeCosts())
    random = np.random.default_rng(1).lognormal(0.0, 2.0, (2, len(POINTS)))
    _, error = fit(TreeCosts(), flat, random[0], tree, random[1])
    assert error > tree_tuning.WORST_FIT


class Stand:
    """A runner and a flat backend that compute nothing; what they take is told by `took`."""

    tiles: tuple[Any, ...] = ()

    def __init__(self) -> None:
        self.planned: Any = None

    def plan(self, batch: Any, shape: Any) -> None:
        self.planned = "flat", batch.kv_lens, batch.host_page_table

    def load(self, plan: Any, padded: int) -> None:
        self.planned = "tree", plan, padded

    def advance(self, positions: Any) -> None: ...

    def run(self, *args: Any) -> None: ...


@pytest.mark.parametrize("pages", [40_000, 300])
def test_calibration(pages: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Measures what fits the pool, restores the page table, and keeps the defaults where that is too little."""
    pool = KVPool(torch.zeros(2, 2, pages, PAGE, 1, 1, dtype=torch.float16))
    table = torch.full((129, 8192 // PAGE + 64), 7, dtype=torch.int32)
    stand: Any = Stand()
    calls = []

    def took(launch: Callable[[int], None]) -> float:
        launch(0)
        calls.append(stand.planned[0])
        return 1.0

    monkeypatch.setattr(tree_tuning, "milliseconds", took)
    monkeypatch.setattr(tree_tuning, "WORST_FIT", 1e9)
    specs = [LayerSpec(1.0), LayerSpec(1.0)]
    costs = calibrate(TreeCosts(), stand, stand, specs, pool, GROUP, table, LIMITS)
    assert bool((table == 7).all())
    if pages == 40_000:
        assert len(calls) == 2 * len(POINTS)
        assert costs != TreeCosts()
    else:
        assert costs == TreeCosts()


def test_a_bad_fit_keeps_the_defaults(monkeypatch: pytest.MonkeyPatch) -> None:
    pool = KVPool(torch.zeros(2, 2, 40_000, PAGE, 1, 1, dtype=torch.float16))
    table, stand = torch.zeros((129, 8192 // PAGE + 64), dtype=torch.int32), Stand()
    times = iter(np.random.default_rng(1).lognormal(0.0, 2.0, 2 * len(POINTS)).tolist())
    monkeypatch.setattr(tree_tuning, "milliseconds", lambda launch: next(times))
    costs = replace(TreeCosts(), margin=1.0)
    specs = [LayerSpec(1.0), LayerSpec(1.0)]
    assert calibrate(costs, stand, stand, specs, pool, GROUP, table, LIMITS) == costs  # type: ignore[arg-type]


def test_the_gate_in_words() -> None:
    """More readers share shorter prefixes; launches that cost more raise the gate."""
    costs = TreeCosts()
    gates = [pays_from(readers, GROUP, PAGE, costs, LIMITS) for readers in (8, 32, 128)]
    assert gates == sorted(gates, reverse=True) and gates[0] is not None and gates[0] > gates[2]
    assert describe(GROUP, PAGE, costs, LIMITS) == (
        f"8 requests read a shared prefix once from {gates[0]:,} tokens on, 32 from {gates[1]:,}, 128 from {gates[2]:,}"
    )
    slow = replace(costs, tree_layer=1e12)
    assert describe(GROUP, PAGE, slow, LIMITS) == "no prefix of up to 32,768 tokens is read once"
