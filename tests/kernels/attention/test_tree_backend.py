"""Tree attention against the torch backend, which shares nothing here: compiled on a GPU, else in the interpreter."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from branchwise.kernels.attention.base import AttentionBatch, LayerSpec, StepShape
from branchwise.kernels.attention.torch_backend import TorchAttention
from branchwise.kernels.kv_pool import KVLayout, KVPool

pytest.importorskip("triton", reason="Triton is not installed")

from triton.runtime.errors import OutOfResources

from branchwise.kernels import triton_launch
from branchwise.kernels.attention import tree_backend, tree_tuning
from branchwise.kernels.attention.split import ITEM, ITEM_FIELDS
from branchwise.kernels.attention.tree_backend import TreeAttention
from branchwise.kernels.attention.tree_costs import TreeCosts
from branchwise.kernels.attention.tree_gate import Forest
from branchwise.kernels.attention.tree_plan import plan_tree
from branchwise.kernels.attention.tree_tuning import tune
from branchwise.kernels.attention.triton_backend import TritonAttention

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SHARE_ALL = TreeCosts(per_key=(0.5, 0.5, 0.5), flat=1.0, partial=0.0, tree_layer=-1e12)
SPECS = [
    LayerSpec(0.25),
    LayerSpec(0.2, window=37),
    LayerSpec(0.3, softcap=4.0),
    LayerSpec(0.3, window=90, softcap=9.0),
    LayerSpec(0.25, window=37, sinks=torch.linspace(-4.0, 9.0, 20, device=DEVICE)),
    LayerSpec(0.25, sinks=torch.linspace(-4.0, 9.0, 20, device=DEVICE)),
]
ROWS, COLUMNS = 12, 24


class World:
    """Requests in a tree: all share the first columns, thirds of them further ones, and each has a tail."""

    def __init__(
        self,
        heads: int = 4,
        kv_heads: int = 2,
        dim: int = 32,
        page: int = 4,
        specs: list[LayerSpec] | None = None,
        dtype: torch.dtype = torch.float32,
        costs: TreeCosts = SHARE_ALL,
    ) -> None:
        self.rng = np.random.default_rng(0)
        self.heads, self.page, self.specs = heads, page, specs or [LayerSpec(0.25)]
        pages = self.rng.permutation(ROWS * COLUMNS).reshape(ROWS, COLUMNS).astype(np.int32)
        self.table = np.concatenate([pages, np.full((1, COLUMNS), ROWS * COLUMNS, np.int32)])
        self.table[:-1, :6] = self.table[0, :6]
        for some in np.array_split(np.arange(ROWS), 3):
            self.table[some, 6:12] = self.table[some[0], 6:12]
        generator = torch.Generator().manual_seed(0)
        data = torch.randn((len(self.specs), 2, ROWS * COLUMNS + 1, page, kv_heads, dim), generator=generator)
        self.pool = KVPool(data.to(DEVICE, dtype))
        self.oracle = TorchAttention(KVPool(data.to(DEVICE, dtype).float()), self.specs, heads, share=False)
        self.device_table = torch.from_numpy(self.table).to(DEVICE)
        flat = TritonAttention(self.pool, self.specs, heads)
        self.tree = TreeAttention(self.pool, self.specs, heads, self.device_table, flat, 64, costs)

    def batch(self, requests: list[tuple[int, int]], written: Any = ((), ())) -> AttentionBatch:
        """``requests``: (query tokens, tokens in all), decodes first, in rows 0, 1, … of the table."""
        q_lens, kv_lens = (np.array(column, np.int32) for column in zip(*requests, strict=True))
        return AttentionBatch(
            rows=np.arange(len(requests), dtype=np.int32),
            q_lens=q_lens,
            kv_lens=kv_lens,
            num_decodes=int((np.cumsum(q_lens != 1) == 0).sum()),
            page_size=self.page,
            page_table=self.device_table,
            host_page_table=self.table,
            written=None if written is None else tuple(np.array(x, np.int32) for x in written),  # type: ignore[arg-type]
        )

    def queries(self, batch: AttentionBatch) -> torch.Tensor:
        tokens, dim = int(batch.q_lens.sum()), self.pool.layout.head_dim
        q = torch.randn((tokens, self.heads + 2, dim), generator=torch.Generator().manual_seed(tokens))
        return q.to(DEVICE, self.pool.layout.dtype)[:, : self.heads]

    def expected(self, batch: AttentionBatch, q: torch.Tensor, layer: int) -> torch.Tensor:
        self.oracle.plan(batch)
        slots = torch.from_numpy(batch.query_slots()).to(DEVICE)
        kv = self.pool.layer(layer)
        k, v = (x.flatten(0, 1)[slots].float() for x in (kv.k, kv.v))
        return self.oracle.run(layer, q.float().contiguous(), k, v)

    def check(self, batch: AttentionBatch, tolerance: float = 3e-6) -> None:
        q = self.queries(batch)
        self.tree.plan(batch)
        for layer in range(len(self.specs)):
            got = self.tree.run(layer, q, q, q).float()
            torch.testing.assert_close(got, self.expected(batch, q, layer), atol=tolerance, rtol=tolerance)


DECODES = [(1, length) for length in (60, 55, 49, 50, 90, 77, 92, 51)]


@pytest.fixture
def plans(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows by one with each plan that is made."""
    made: list[int] = []
    plan_tree = tree_backend.plan_tree
    monkeypatch.setattr(
        tree_backend, "plan_tree", lambda *args, **options: (made.append(1), plan_tree(*args, **options))[1]
    )
    return made


def test_a_captured_step_launches_no_tile_that_it_cannot_fill() -> None:
    """Groups of two query heads in tiles of 16 and 32 rows: from 9 query tokens on the second may be needed."""
    world = World()
    for n in (1, 2, 4, 8, 16, 64):
        narrow, wide = world.tree._captured_limits(StepShape(n, 0, 0)).items
        assert narrow > 0 and (wide > 0) == (n > 8)
    for n in (2, 5, 8):
        batch = world.batch(DECODES[:n])
        form = world.tree.plan(batch, StepShape(8, 0, 0))
        assert form is not None and form.tree, "the plan fits"
        q = world.queries(batch)
        padded = torch.cat([q, q.new_zeros((8 - n, *q.shape[1:]))])
        got = world.tree.run(0, padded, padded, padded)[:n]
        torch.testing.assert_close(got, world.expected(batch, q, 0), atol=3e-6, rtol=3e-6)


def test_a_captured_step_launches_no_items_beyond_the_buffers() -> None:
    """Of a shape for more requests than the page table has rows."""
    world = World()
    items = world.tree._captured_limits(StepShape(ROWS, 52, ROWS, tree=True)).items
    assert all(number <= most for number, most in zip(items, world.tree._limits.items, strict=True))


@pytest.mark.parametrize("heads, kv_heads, dim, page", [(4, 2, 32, 4), (7, 1, 24, 1), (4, 4, 64, 4), (20, 1, 16, 4)])
def test_every_kind_of_layer(heads: int, kv_heads: int, dim: int, page: int) -> None:
    # Alone and together with the first layout; with the others in two combinations, which have each of them.
    specs = [SPECS[i] for i in (range(6) if heads == 4 and kv_heads == 2 else (0, 3, 4))]
    specs = [s if s.sinks is None else replace(s, sinks=s.sinks[:heads].contiguous()) for s in specs]
    world = World(heads, kv_heads, dim, page, specs)
    world.check(world.batch([(1, 1 + length * page // 4) for _, length in DECODES]))


def test_tuning_takes_what_is_faster_and_restores_the_table(monkeypatch: pytest.MonkeyPatch) -> None:
    """Launches run (in the interpreter); what they take is made up. A tile that does not fit is left as it was."""
    monkeypatch.setattr(tree_tuning, "KEYS", 64)
    world = World()
    runner, table = world.tree._runner, world.device_table
    before, rows, launched = list(runner.tiles), world.table.copy(), []

    def took(launch: Callable[[int], None]) -> float:
        launch(0)
        launched.append([tile.stages for tile in runner.tiles])
        if len(launched) == 4:
            raise OutOfResources(1, 0, "shared memory")
        return 1.0 / len(launched)

    monkeypatch.setattr(tree_tuning, "milliseconds", took)
    tune(runner, world.pool, world.heads, table, (6, 3))
    assert launched == [[2, 2], [5, 2], [5, 2], [5, 5]]
    assert runner.tiles == [before[0]._replace(stages=5), before[1]]
    assert np.array_equal(table.cpu().numpy(), rows)
    world.check(world.batch(DECODES))


def test_saved_keys() -> None:
    world = World()
    world.tree.plan(world.batch([(1, 60)] * 8))
    assert world.tree.saved_keys == 4 * (3 + 3) * 12  # two groups of four, 12 pages of 4 tokens
    world.tree.plan(world.batch([(1, 60)]))
    assert world.tree.saved_keys == 0


def test_half_precision() -> None:
    world = World(dtype=torch.float16)
    world.check(world.batch(DECODES), 2e-3)


def test_chunks_beside_decodes() -> None:
    """Short ones are part of the tree, long ones are the flat backend's."""
    world = World(specs=SPECS[:2])
    world.check(world.batch([*DECODES, (5, 60), (16, 90)]))
    world.check(world.batch([*DECODES, (20, 60), (3, 90), (40, 90)]))
    world.check(world.batch([(20, 60), (3, 90)]))


@pytest.mark.parametrize(
    ("chunks", "members"),
    [
        ([(30, 60), (3, 90), (20, 70)], 3),
        ([(12, 60), (3, 90), (41, 90)], 2),  # one is long
        ([(41, 90)], 0),
        ([(30, 30), (3, 90), (20, 20)], 0),  # they see few keys
        ([], 0),
    ],
)
def test_the_widest_kernel_takes_chunks_whatever_the_costs(
    chunks: list[tuple[int, int]], members: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In steps that are not captured."""
    world = World(costs=TreeCosts(tree_layer=1e12))
    monkeypatch.setattr(world.tree, "_wide", True)
    monkeypatch.setattr(tree_backend, "WIDE_CHUNK", 40)
    monkeypatch.setattr(tree_backend, "WIDE_KEYS", 40)
    world.check(world.batch([*DECODES[:3], *chunks]))
    assert (world.tree._step is not None) == (members > 0)
    assert members == 0 or len(world.tree._members.chunks) == members  # type: ignore[union-attr]


@pytest.mark.parametrize(("choice", "rows"), [("auto", [128]), ("fp8", [128]), ("int4", [64, 128])])
def test_a_hopper_gpu_has_two_tiles_where_the_widest_kernel_runs(
    choice: Any, rows: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its programs, one a multiprocessor, also read the nodes of the tile that is missing."""
    monkeypatch.setattr(tree_backend, "runs_on", lambda device: True)
    layout, specs = KVLayout.of(choice, 1, 16, 2, 128, torch.bfloat16), [LayerSpec(0.1)]
    pool = KVPool.allocate(layout, 129, torch.device("cpu"))
    table = np.arange(8 * 16, dtype=np.int32).reshape(8, 16)
    table[:6, :8] = table[0, :8]
    on_device = torch.from_numpy(np.concatenate([table, np.full((1, 16), 128, np.int32)]))
    tree = TreeAttention(pool, specs, 8, on_device, TritonAttention(pool, specs, 8), 64)
    assert (
        [tile.rows for tile in tree._runner.tiles][1:] == list(tree._costs.tiles)[1:] == rows
    )  # beside the narrow one
    assert tree._limits.min_keys == ((128, 256) if len(rows) == 1 else (128, 256, 256))
    assert tree._workers[1:] == ((2,) if len(rows) == 1 else (4, 2))  # two key heads, four multiprocessors
    q_lens, kv_lens = np.ones(8, np.int32), np.full(8, 200, np.int32)
    batch = AttentionBatch(np.arange(8, dtype=np.int32), q_lens, kv_lens, 8, 16, on_device, on_device.numpy())
    tree.plan(batch, StepShape(8, 0, 0, tree=True))
    assert tree._plan is not None
    assert tree._plan.sizes[1:] == [1, 0][: len(rows)]  # six requests of four query heads read 128 keys together


def test_a_plan_is_kept_until_something_changes(plans: list[int]) -> None:
    world = World()
    world.tree.plan(world.batch(DECODES))
    for growth in range(1, 4):
        world.tree.plan(world.batch([(1, length + growth) for _, length in DECODES]))
    assert len(plans) == 1
    grown = [(1, length + 3) for _, length in DECODES]
    world.check(world.batch(grown, written=([0, 7], [16, 13])))  # a page that a tail grows into
    assert len(plans) == 1
    world.table[5, :12] = world.table[11, 12:24]  # another request, in the same row and of the same length
    world.device_table.copy_(torch.from_numpy(world.table))
    world.check(world.batch(grown, written=([5] * 12, list(range(12)))))
    assert len(plans) == 2
    world.tree.plan(world.batch(grown, written=None))
    assert len(plans) == 3
    world.tree.plan(world.batch(grown[:-1]))
    assert len(plans) == 4


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_plans_equal_those_made_from_nothing(data: st.DataObject) -> None:
    """Requests join, leave and grow. The plan of each step, kept or made anew, is the one that the present page table
    leads to for the lengths it was made for, and it is what the device has."""
    world, shape = World(), StepShape(ROWS, 20, 4, tree=True)
    tree, lengths, pages = world.tree, {row: 40 + row for row in range(8)}, itertools.count(10_000)
    for _ in range(data.draw(st.integers(1, 6))):
        written = []
        for row in data.draw(st.lists(st.integers(0, ROWS - 1), max_size=2, unique=True)):
            length = lengths.pop(row, 0)
            if not length or data.draw(st.booleans()):  # another request in the same row, no shorter: looks grown
                source, columns = data.draw(st.integers(0, ROWS - 1)), data.draw(st.integers(0, COLUMNS))
                world.table[row, :columns] = world.table[source, :columns]
                world.table[row, columns:] = list(itertools.islice(pages, COLUMNS - columns))
                written += [(row, column) for column in range(COLUMNS)]
                lengths[row] = max(length, 20) + data.draw(st.integers(0, 4))
        growth = data.draw(st.integers(0, 2))
        lengths = {row: length + growth for row, length in sorted(lengths.items())}
        if not lengths:
            continue
        q_lens = [1] * (len(lengths) - 1) + [data.draw(st.sampled_from([1, 3]))]
        batch = world.batch(list(zip(q_lens, lengths.values(), strict=True)), np.array(written, int).reshape(-1, 2).T)
        batch.rows = np.array(list(lengths), np.int32)
        assert tree.plan(batch, shape) == shape
        plan, members, limits = tree._plan, tree._members, tree._captured_limits(shape)
        assert plan is not None and members is not None
        assert members.requests.rows.tolist() == list(lengths)
        tokens = members.num_tokens
        expected = plan_tree(world.table, members.requests, tokens, 2, world.page, SHARE_ALL, limits, -np.inf)
        assert expected is not None and plan.sizes == expected.sizes
        for name in ("records", "queries", "merges", "slots"):
            assert np.array_equal(getattr(plan, name), getattr(expected, name))
        staged_items = zip(tree._runner._items, plan.sizes, strict=True)
        records = [staged.cpu().numpy()[: size * ITEM_FIELDS] for staged, size in staged_items]
        assert np.array_equal(np.concatenate(records), plan.records.ravel())
        assert np.array_equal(tree._runner._queries.cpu().numpy()[: len(plan.queries)], plan.queries)
        assert np.array_equal(tree._runner._slots.cpu().numpy()[: len(plan.slots)], plan.slots)


def test_a_write_in_a_step_without_a_tree_is_not_forgotten(plans: list[int]) -> None:
    world = World()
    world.tree.plan(world.batch(DECODES))
    world.table[1, :12] = world.table[11, 12:24]
    world.device_table.copy_(torch.from_numpy(world.table))
    world.check(world.batch([(40, 60)], written=([1] * 12, list(range(12)))))
    world.check(world.batch(DECODES))
    assert len(plans) == 2


def test_the_decision_for_the_flat_path_is_kept(plans: list[int]) -> None:
    world = World(costs=TreeCosts(tree_layer=1e12))
    for growth in range(3):
        world.tree.plan(world.batch([(1, length + growth) for _, length in DECODES[:6]]))
    assert len(plans) == 1
    world.check(world.batch([(1, length + 3) for _, length in DECODES[:6]]))
    assert len(plans) == 1


def test_permuted_requests_get_the_same_results() -> None:
    world = World()
    batch = world.batch(DECODES)
    q = world.queries(batch)
    world.tree.plan(batch)
    straight = world.tree.run(0, q, q, q)
    order = np.random.default_rng(1).permutation(len(DECODES))
    batch.rows, batch.kv_lens = batch.rows[order], batch.kv_lens[order]
    world.tree.plan(batch)
    permuted = world.tree.run(0, q[torch.from_numpy(order)], q, q)
    torch.testing.assert_close(permuted, straight[torch.from_numpy(order)], atol=3e-6, rtol=3e-6)


class Recorder:
    """Records launches, and repeats them: what a CUDA graph does, with arguments instead of addresses."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.launches: list[tuple[Any, tuple[Any, ...], dict[str, Any]]] = []
        launch = triton_launch.Kernel.__call__

        def record(kernel: Any, *args: Any, **options: Any) -> None:
            self.launches.append((kernel, args, options))
            launch(kernel, *args, **options)

        monkeypatch.setattr(triton_launch.Kernel, "__call__", record)


@pytest.mark.parametrize("shape", [StepShape(10, 0, 0), StepShape(10, 30, 4), StepShape(0, 40, 0, joint=12)])
def test_replay_equals_eager(shape: StepShape, monkeypatch: pytest.MonkeyPatch) -> None:
    world = World()
    tree, form = world.tree, world.tree.forms(shape)[-1]
    assert form == replace(shape, tree=True)
    assert tree.plan(world.batch([(1, 1)]), form) == form  # what capturing stages
    q, out = torch.zeros(shape.num_tokens, 4, 32, device=DEVICE), torch.zeros(shape.num_tokens, 4, 32, device=DEVICE)
    recorder = Recorder(monkeypatch)
    tree.run(0, q, q, q, out)
    recorded = list(recorder.launches)
    chunks = [(4, 60), (2, 50), (20, 90), (4, 70)] if shape.tokens else []
    for decodes in (DECODES, DECODES[:5], [(1, length + 3) for _, length in DECODES[:5]]):
        batch = world.batch([*decodes, *chunks])
        real, n = world.queries(batch), len(decodes)
        chunk = shape.first_chunk(n)
        q.fill_(float("nan"))
        q[:n] = real[:n]
        q[chunk : chunk + len(real) - n] = real[n:]
        assert tree.plan(batch, shape) == form
        out.fill_(float("nan"))
        for kernel, args, options in recorded:
            kernel(*args, **options)
        replayed = out.clone()
        out.fill_(float("nan"))
        tree.run(0, q, q, q, out)
        chosen = torch.cat([out[:n], out[chunk : chunk + len(real) - n]])
        torch.testing.assert_close(chosen, world.expected(batch, real, 0), atol=3e-6, rtol=3e-6)
        assert torch.equal(replayed.nan_to_num(7.0), out.nan_to_num(7.0))  # to the bit
        assert not out[n:chunk].any() and not out[chunk + len(real) - n :].any()  # padding is 0


def test_records_of_the_plan_before_do_not_run() -> None:
    """A captured step launches a fixed number of items: those beyond its plan must have no queries."""
    world, shape = World(), StepShape(10, 0, 0, tree=True)
    for requests in (DECODES, DECODES[:2], DECODES[:5], DECODES[:1]):
        world.tree.plan(world.batch(requests), shape)
        plan = world.tree._plan
        assert plan is not None
        for staged, items in zip(world.tree._runner._items, plan.items, strict=True):
            records = staged.cpu().numpy().view(ITEM)
            assert np.array_equal(records[: len(items)], items)
            assert not records[len(items) :]["num_queries"].any()


def test_small_steps_have_no_tree_form() -> None:
    world = World()
    assert world.tree.forms(StepShape(4, 0, 0)) == [StepShape(4, 0, 0)]
    shape = StepShape(4, 0, 0)
    assert world.tree.plan(world.batch(DECODES[:4]), shape) == shape


def test_a_joint_step_that_no_plan_fits_runs_as_it_is() -> None:
    world = World()
    world.tree._limits = replace(world.tree._limits, slots=4)
    assert world.tree.plan(world.batch([*DECODES, (4, 60)]), StepShape(0, 40, 0, joint=12)) is None
    world.check(world.batch([*DECODES, (4, 60)]))


def test_a_decision_is_not_changed_for_a_small_gain(plans: list[int]) -> None:
    """A step changes to the tree path for at least the margin, and back only where nothing is gained."""
    world = World()
    tree, few, many = world.tree, world.batch([(1, 60)] * 3), world.batch([(1, 60)] * 8)

    def gain(batch: AttentionBatch) -> float:
        tree.plan(batch, StepShape(8, 0, 0, tree=True))
        assert tree._plan is not None
        return tree._plan.gain

    def takes_the_tree(batch: AttentionBatch) -> bool:
        tree.plan(batch)
        return tree._step is not None

    tree._costs = replace(tree._costs, tree_layer=0.0, flat_layer=0.0, in_turn=0.0)
    tree._costs = replace(tree._costs, margin=(gain(few) + gain(many)) / 2)
    assert not takes_the_tree(few)
    assert takes_the_tree(many)
    assert takes_the_tree(few)
    tree._costs = replace(tree._costs, tree_layer=1e9)
    assert not takes_the_tree(many)
    tree._costs = replace(tree._costs, tree_layer=0.0)
    assert not takes_the_tree(few)


def test_what_cannot_be_served_is_refused() -> None:
    world = World()
    with pytest.raises(ValueError, match="positive"):
        TreeAttention(world.pool, [LayerSpec(0.0)], 4, world.device_table, world.oracle, 64)
    world.tree.plan(world.batch(DECODES))
    with pytest.raises(ValueError, match="contiguous"):
        world.tree.run(0, torch.zeros(8, 4, 64, device=DEVICE)[..., ::2], world.table, world.table)  # type: ignore[arg-type]


def test_calibration_runs_both_paths(monkeypatch: pytest.MonkeyPatch) -> None:
    """On small forests, in the interpreter; what a launch takes is made up. The page table is restored."""
    world = World(specs=[LayerSpec(0.25), LayerSpec(0.2)])
    tree, rows, launched = world.tree, world.table.copy(), []

    def took(launch: Callable[[int], None]) -> float:
        for layer in range(2):
            launch(layer)
        launched.append(launch.__name__)
        return 1.0

    monkeypatch.setattr(tree_tuning, "milliseconds", took)
    monkeypatch.setattr(tree_tuning, "POINTS", (Forest(6, 0, 0, 20), Forest(6, 2, 32, 8), Forest(8, 1, 40, 12)))
    tree._calibrated(world.heads, world.device_table)
    assert launched == ["run_flat", "run_tree"] * 3
    assert np.array_equal(world.device_table.cpu().numpy(), rows)
    world.check(world.batch(DECODES))


def test_a_start_survives_a_calibration_that_fails(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(launch: Callable[[int], None]) -> float:
        raise RuntimeError("out of memory")

    world = World(specs=[LayerSpec(0.25), LayerSpec(0.2)])
    monkeypatch.setattr(tree_tuning, "milliseconds", fail)
    monkeypatch.setattr(tree_tuning, "POINTS", (Forest(6, 2, 32, 8),))
    costs = world.tree._costs
    assert world.tree._calibrated(world.heads, world.device_table) == costs
    assert "built-in costs" in caplog.text
    world.check(world.batch(DECODES))
