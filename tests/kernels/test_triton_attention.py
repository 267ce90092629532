"""Triton's attention against the torch backend: on a GPU compiled, elsewhere in Triton's interpreter."""

from __future__ import annotations

from dataclasses import replace
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch

from branchwise.kernels.attention import split
from branchwise.kernels.attention.base import AttentionBatch, LayerSpec, StepShape
from branchwise.kernels.attention.torch_backend import TorchAttention
from branchwise.kernels.kv_pool import KVLayout, KVPool

pytest.importorskip("triton", reason="Triton is not installed")

import triton

from branchwise.kernels import triton_launch
from branchwise.kernels.attention.triton_backend import TritonAttention, tile_for
from branchwise.kernels.attention.triton_kernels import attend, merge

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
# float32 and float16: the interpreter multiplies the raw bits of bfloat16. Partial sums are float32 in either.
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3}
PAGES = 20


@pytest.fixture(autouse=True)
def short_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter is slow: keys are split from two blocks on."""
    monkeypatch.setattr(split, "MIN_KEYS", split.ALIGN)


class Case:
    """A pool, and a page table whose rows share some pages."""

    def __init__(
        self, seed: int, kv_heads: int, dim: int, page: int, layers: int = 1, dtype: torch.dtype = torch.float32
    ) -> None:
        self.rng = np.random.default_rng(seed)
        self.page, self.length = page, PAGES * page
        pages = 8 * PAGES + 1
        generator = torch.Generator().manual_seed(seed)
        pool = torch.randn((layers, 2, pages, page, kv_heads, dim), generator=generator)
        self.pool = pool.to(DEVICE, dtype)
        self.table = np.zeros((9, PAGES + 3), np.int32)
        self.table[:8, :PAGES] = (self.rng.permutation(pages - 1) + 1).reshape(8, PAGES)
        self.table[3, :5] = self.table[1, :5]
        self.device_table = torch.from_numpy(self.table).to(DEVICE)

    def batch(self, requests: list[tuple[int, int]]) -> AttentionBatch:
        """``requests``: (query tokens, tokens before), decodes first, in random rows of the page table."""
        q_lens = np.array([q for q, _ in requests], np.int32)
        return AttentionBatch(
            rows=self.rng.permutation(8)[: len(requests)].astype(np.int32),
            q_lens=q_lens,
            kv_lens=q_lens + np.array([before for _, before in requests], np.int32),
            num_decodes=int((np.cumsum(q_lens != 1) == 0).sum()),
            page_size=self.page,
            page_table=self.device_table,
            host_page_table=self.table,
        )

    def queries(self, batch: AttentionBatch, heads: int) -> torch.Tensor:
        """Rows strided, as they come out of the projection of queries, keys and values."""
        generator = torch.Generator().manual_seed(int(batch.kv_lens.sum()))
        tokens, dim = int(batch.q_lens.sum()), self.pool.shape[-1]
        q = torch.randn((tokens, heads + 2, dim), generator=generator)
        return q.to(DEVICE, self.pool.dtype)[:, :heads]

    def expected(self, specs: list[LayerSpec], batch: AttentionBatch, q: torch.Tensor, layer: int) -> torch.Tensor:
        reference = TorchAttention(KVPool(self.pool.float()), specs, q.shape[1], share=False)
        reference.plan(batch)
        slots = torch.from_numpy(batch.query_slots()).to(DEVICE)
        k, v = self.pool[layer].flatten(1, 2)[:, slots].float()
        return reference.run(layer, q.float().contiguous(), k, v)

    def poison(self, batch: AttentionBatch) -> None:
        """Fills everything that no request of the batch owns with NaN: the ends of pages, and page 0."""
        held = torch.zeros(self.pool.shape[2] * self.page, dtype=torch.bool)
        for row, length in zip(batch.rows, batch.kv_lens, strict=True):
            at = np.arange(length)
            held[self.table[row, at // self.page].astype(np.int64) * self.page + at % self.page] = True
        self.pool.flatten(2, 3)[:, :, ~held.to(DEVICE)] = float("nan")


PLAIN = LayerSpec(0.25)
SINKS = torch.tensor([-4.0, 0.5, 2.0, 9.0, 0.0, -1.0, 3.0], device=DEVICE)
SPECS = [
    PLAIN,
    LayerSpec(0.2, window=37),
    LayerSpec(0.3, softcap=4.0),
    LayerSpec(0.3, window=130, softcap=9.0),
    LayerSpec(0.25, sinks=SINKS),
    LayerSpec(0.2, window=37, sinks=SINKS),
]
STEPS = {
    "decodes": [(1, 0), (1, 63), (1, 64), (1, 310)],
    "one long decode": [(1, 319)],
    "chunks": [(40, 0), (3, 0), (2, 250)],
    "mixed": [(1, 100), (9, 100), (1, 17)],  # the last is a chunk of one token
}


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("heads, kv_heads, dim, page", [(4, 2, 32, 16), (7, 1, 24, 16)])
def test_every_kind_of_layer(heads: int, kv_heads: int, dim: int, page: int, step: str) -> None:
    case = Case(1, kv_heads, dim, page, layers=len(SPECS))
    batch, specs = case.batch(STEPS[step]), [s if s.sinks is None else replace(s, sinks=SINKS[:heads]) for s in SPECS]
    q = case.queries(batch, heads)
    expected = [case.expected(specs, batch, q, layer) for layer in range(len(specs))]
    case.poison(batch)
    attention = TritonAttention(KVPool(case.pool), specs, heads)
    attention.plan(batch)
    for layer in range(len(specs)):
        got = attention.run(layer, q, q, q)
        torch.testing.assert_close(got, expected[layer], atol=3e-6, rtol=3e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(
    "heads, kv_heads, dim, page", [(4, 4, 16, 16), (6, 2, 80, 16), (8, 1, 64, 16), (20, 1, 32, 16), (4, 2, 256, 16)]
)
def test_shapes_of_heads(heads: int, kv_heads: int, dim: int, page: int, dtype: torch.dtype) -> None:
    case = Case(2, kv_heads, dim, page, dtype=dtype)
    batch = case.batch([(1, 20), (1, 211), (9, 60), (5, 5)])
    q = case.queries(batch, heads)
    expected = case.expected([PLAIN], batch, q, 0).to(dtype)
    case.poison(batch)
    attention = TritonAttention(KVPool(case.pool), [PLAIN], heads)
    attention.plan(batch)
    out = torch.full((len(q), heads + 1, dim), 7.0, dtype=dtype, device=DEVICE)
    got = attention.run(0, q, q, q, out[:, :heads])
    assert got.data_ptr() == out.data_ptr() and bool((out[:, heads:] == 7.0).all())
    torch.testing.assert_close(got, expected, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])


@pytest.mark.parametrize("page", [1, 3, 16])
def test_sizes_of_pages(page: int) -> None:
    case = Case(3, 2, 16, page)
    longest = case.length
    batch = case.batch([(1, longest - 1), (1, 0), (min(longest, 9), 0), (2, longest - 2)])
    q = case.queries(batch, 4)
    expected = case.expected([PLAIN], batch, q, 0)
    case.poison(batch)
    attention = TritonAttention(KVPool(case.pool), [PLAIN], 4)
    attention.plan(batch)
    torch.testing.assert_close(attention.run(0, q, q, q), expected, atol=3e-6, rtol=3e-6)


def test_a_piece_serves_queries_of_requests_that_are_not_neighbours() -> None:
    """Requests 0 and 2 share five pages: one piece reads them for both, and their own keys are merged in."""
    case, heads = Case(7, 2, 16, 16), 4
    batch = case.batch([(1, 100), (1, 63), (1, 119)])
    batch.rows[:] = [1, 5, 3]
    q = case.queries(batch, heads)
    expected = case.expected([PLAIN], batch, q, 0)
    case.poison(batch)
    items = np.array(
        [  # row, query, num_queries, start, stop, full, partial, unused
            (1, 0, 2, 0, 80, 80, 0, 0),  # partial rows 0 and 1
            (1, 0, 1, 80, 101, 101, 2, 0),
            (3, 1, 1, 80, 120, 120, 3, 0),
            (5, 2, 1, 0, 64, 64, -1, 0),
        ],
        split.ITEM,
    )
    merges = np.array([(0, 2, 0, 2)], split.MERGE)
    queries, positions = np.array([0, 2, 1], np.int32), np.array([100, 63, 119], np.int32)
    given = [
        torch.from_numpy(array.view(np.int32)).to(DEVICE).contiguous() for array in (queries, positions, items, merges)
    ]
    partial, lse = torch.zeros(4, heads, 16, device=DEVICE), torch.zeros(4, heads, device=DEVICE)
    out, table = torch.empty(3, heads, 16, device=DEVICE), case.device_table
    k, v = case.pool[0]
    attend(
        (2, len(items), 1),
        (q, k, v, k, v, table, given[0], given[1], given[2], lse, out, partial, lse),
        (),
        (
            *(heads, 2, 16, 16, KVPool(case.pool).layer(0).strides, "plain", "plain"),
            *(q.stride(0), out.stride(0), table.stride(0), PLAIN.scale, 0.0, 0, False, "ieee", 16, 32, 16),
        ),
        warps=4,
    )
    merge(
        (heads, len(merges), 2),
        (partial, lse, given[0], given[3], lse, out),
        (),
        (heads, 16, out.stride(0), False, 16, 16),
        warps=4,
    )
    torch.testing.assert_close(out, expected, atol=3e-6, rtol=3e-6)


def test_extreme_scores() -> None:
    """One key far above all others, in the first block, the last, or a piece of its own: no overflow, no nan."""
    case = Case(4, 1, 16, 16)
    batch = case.batch([(1, 200), (1, 250), (1, 300)])
    flat = case.pool[0].flatten(1, 2)
    for row, at in zip(batch.rows, (0, 250, 128), strict=True):
        flat[0, int(case.table[row, at // 16]) * 16 + at % 16] = 1e3
    q = case.queries(batch, 2) * 100
    q[:, 1] *= -1  # that key's weight is 0 for one of the heads
    expected = case.expected([PLAIN], batch, q, 0)
    attention = TritonAttention(KVPool(case.pool), [PLAIN], 2)
    attention.plan(batch)
    torch.testing.assert_close(attention.run(0, q, q, q), expected, atol=1e-4, rtol=1e-4)


class Recorder:
    """Records launches and repeats them, like a CUDA graph, with arguments instead of addresses."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.launches: list[tuple[Any, tuple[Any, ...], dict[str, Any]]] = []
        launch = triton_launch.Kernel.__call__

        def record(kernel: Any, *args: Any, **options: Any) -> None:
            self.launches.append((kernel, args, options))
            launch(kernel, *args, **options)

        monkeypatch.setattr(triton_launch.Kernel, "__call__", record)

    def replay(self) -> None:
        for kernel, args, options in list(self.launches):
            kernel(*args, **options)


@pytest.mark.parametrize("layers", [[PLAIN], [LayerSpec(0.3, window=70), PLAIN]])
def test_a_shape_is_planned_again_and_replayed(layers: list[LayerSpec], monkeypatch: pytest.MonkeyPatch) -> None:
    case, heads, shape = Case(5, 2, 16, 16, layers=len(layers)), 4, StepShape(decodes=3, tokens=8, requests=2)
    steps = [
        [(1, 100), (1, 200), (1, 30), (8, 10)],
        [(1, 3), (4, 150), (3, 0)],
        [(1, 0), (1, 318)],
    ]
    attention = TritonAttention(KVPool(case.pool), layers, heads, max_requests=8, max_tokens=64)
    q, out = torch.zeros(11, heads, 16, device=DEVICE), torch.zeros(len(layers), 11, heads, 16, device=DEVICE)
    recorder = Recorder(monkeypatch)
    for requests in steps:
        batch = case.batch(requests)
        n, real = batch.num_decodes, case.queries(batch, heads)
        q.fill_(float("nan"))
        q[:n] = real[:n]
        q[3 : 3 + len(real) - n] = real[n:]
        attention.plan(batch, shape)
        out.fill_(float("nan"))
        if not recorder.launches:
            for layer in range(len(layers)):
                attention.run(layer, q, q, q, out[layer])
            recorded = len(recorder.launches)
        else:
            recorder.replay()
            del recorder.launches[recorded:]
        replayed = out.clone()
        for layer in range(len(layers)):
            attention.run(layer, q, q, q, out[layer])
        del recorder.launches[recorded:]
        assert torch.equal(replayed, out)  # to the bit, what is launched now
        chosen = torch.cat([out[:, :n], out[:, 3 : 3 + len(real) - n]], dim=1)
        for layer in range(len(layers)):
            expected = case.expected(layers, batch, real, layer)
            torch.testing.assert_close(chosen[layer], expected, atol=3e-6, rtol=3e-6)
        assert not out[:, n:3].any() and not out[:, 3 + len(real) - n :].any()  # padding is 0, never what was there


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE.type != "cuda", reason="needs a CUDA device")
def test_graph_replay_equals_eager() -> None:
    case, heads, shape = Case(6, 2, 128, 16, dtype=torch.float16), 8, StepShape(decodes=4, tokens=64, requests=2)
    attention = TritonAttention(KVPool(case.pool), [PLAIN], heads, max_requests=8, max_tokens=64)
    q = torch.randn(68, heads, 128, device=DEVICE, dtype=torch.float16)
    out = torch.empty_like(q)
    attention.plan(case.batch([(1, 300), (64, 100)]), shape)
    attention.run(0, q, q, q, out)  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        attention.run(0, q, q, q, out)
    for requests in ([(1, 300), (1, 250), (1, 310), (1, 7), (60, 260)], [(1, 3), (9, 9), (50, 0)], [(1, 0)]):
        attention.plan(case.batch(requests), shape)
        out.fill_(float("nan"))
        graph.replay()
        replayed = out.clone()
        attention.run(0, q, q, q, out)
        assert torch.equal(replayed, out)


def test_what_cannot_be_served_is_refused() -> None:
    pool = torch.zeros(1, 2, 2, 4, 2, 16, device=DEVICE)
    with pytest.raises(ValueError, match="3 and 2 heads"):
        TritonAttention(KVPool(pool), [PLAIN], 3)
    with pytest.raises(ValueError, match="8 channels"):
        TritonAttention(KVPool(pool[..., :8]), [PLAIN], 4)
    with pytest.raises(ValueError, match="positive"):
        TritonAttention(KVPool(pool), [LayerSpec(0.0)], 4)
    attention = TritonAttention(KVPool(pool), [PLAIN], 4)
    with pytest.raises(ValueError, match="contiguous"):
        attention.run(0, torch.zeros(3, 4, 32, device=DEVICE)[..., ::2], pool, pool)


def test_tiles_grow_with_the_queries() -> None:
    for dim in (64, 128, 256):
        layout = KVLayout(1, 16, 8, dim, torch.bfloat16)
        sizes = [tile_for(rows, layout).rows for rows in (1, 16, 17, 64, 65, 4096)]
        assert sizes == sorted(sizes) and sizes[0] == 16
    assert tile_for(4096, KVLayout(1, 16, 8, 128, torch.bfloat16)).rows == 128
    with mock.patch.object(triton.knobs.runtime, "interpret", False):
        tiles = [tile_for(rows, KVLayout.of("fp8", 1, 16, 8, 128, torch.bfloat16)) for rows in (4, 16, 4096)]
    assert [(tile.rows, tile.warps, tile.in_registers) for tile in tiles] == [(8, 1, 1), (16, 1, 1), (128, 8, 0)]
