"""The torch backend against float64 attention, computed token by token from plain lists of keys."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch

from branchwise.kernels.attention import torch_backend
from branchwise.kernels.attention.base import AttentionBatch, LayerSpec
from branchwise.kernels.attention.partial import attend
from branchwise.kernels.attention.torch_backend import TorchAttention, length_buckets
from branchwise.kernels.kv_pool import KVPool

DIM = 16


def oracle(q: np.ndarray, k: np.ndarray, v: np.ndarray, spec: LayerSpec) -> np.ndarray:
    """The last ``len(q)`` tokens ``[Q, H, D]`` attend to all ``[L, Hkv, D]``, in float64."""
    group, length = q.shape[1] // k.shape[1], len(k)
    out = np.zeros(q.shape)
    for i in range(len(q)):
        position = length - len(q) + i
        first = 0 if spec.window is None else max(0, position - spec.window + 1)
        for head in range(q.shape[1]):
            keys, values = (x[first : position + 1, head // group].astype(np.float64) for x in (k, v))
            scores = keys @ q[i, head].astype(np.float64) * spec.scale
            if spec.softcap is not None:
                scores = spec.softcap * np.tanh(scores / spec.softcap)
            sink = 0.0 if spec.sinks is None else np.exp(spec.sinks[head].item() - scores.max())
            weights = np.exp(scores - scores.max())
            out[i, head] = weights @ values / (weights.sum() + sink)
    return out


@dataclass
class Request:
    pages: list[int]
    k: np.ndarray  # every token so far, [L, Hkv, D]
    v: np.ndarray


class World:
    """A pool filled with large values, and requests that grow in it and share pages."""

    def __init__(self, seed: int, specs: list[LayerSpec], heads: int, kv_heads: int, page: int, share: bool) -> None:
        self.rng = np.random.default_rng(seed)
        self.specs, self.heads, self.kv_heads, self.page = specs, heads, kv_heads, page
        self.free = (self.rng.permutation(4000 // page) + 1).tolist()
        data = torch.full((len(specs), 2, len(self.free) + 1, page, kv_heads, DIM), 1e4)  # page 0 stays poison
        self.pool = KVPool(data)
        self.backend = TorchAttention(self.pool, specs, heads, share=share)
        self.table = np.zeros((16, 800 // page + 1), np.int32)
        self.requests: dict[int, Request] = {}

    def begin(self, row: int, parent: int | None = None, pages: int = 0) -> None:
        """An empty request, or one that shares the first pages of another."""
        mine = Request([], np.zeros((0, self.kv_heads, DIM), np.float32), np.zeros((0, self.kv_heads, DIM), np.float32))
        if parent is not None:
            other, tokens = self.requests[parent], pages * self.page
            mine = Request(other.pages[:pages], other.k[:tokens], other.v[:tokens])
        self.requests[row] = mine
        self.table[row] = 0
        self.table[row, : len(mine.pages)] = mine.pages

    def step(self, chunks: list[tuple[int, int]], tolerance: float = 2e-5) -> None:
        """``chunks``: (row, number of new tokens). Checks every layer's output."""
        shape = (sum(n for _, n in chunks), self.heads, DIM)
        q_lens = np.array([n for _, n in chunks], np.int32)
        batch = AttentionBatch(
            rows=np.array([row for row, _ in chunks], np.int32),
            q_lens=q_lens,
            kv_lens=np.array([len(self.requests[row].k) + n for row, n in chunks], np.int32),
            num_decodes=int((np.cumsum(q_lens != 1) == 0).sum()),
            page_size=self.page,
            page_table=torch.from_numpy(self.table),
            host_page_table=self.table,
        )
        q, k, v = (
            self.rng.normal(size=(shape[0], h, DIM)).astype(np.float32) for h in (self.heads, *[self.kv_heads] * 2)
        )
        at = 0
        for row, n in chunks:
            request = self.requests[row]
            request.k, request.v = (
                np.concatenate([request.k, k[at : at + n]]),
                np.concatenate([request.v, v[at : at + n]]),
            )
            while len(request.pages) * self.page < len(request.k):
                request.pages.append(self.free.pop())
            self.table[row, : len(request.pages)] = request.pages
            at += n
        self.backend.plan(batch)
        slots = torch.from_numpy(batch.query_slots())
        with torch.inference_mode():
            for layer, spec in enumerate(self.specs):
                self.pool.layer(layer).write(slots, torch.from_numpy(k), torch.from_numpy(v))
                out = self.backend.run(layer, *(torch.from_numpy(x) for x in (q, k, v))).numpy()
                at = 0
                for row, n in chunks:
                    expected = oracle(q[at : at + n], self.requests[row].k, self.requests[row].v, spec)
                    np.testing.assert_allclose(out[at : at + n], expected, atol=tolerance)
                    at += n


SINKS = torch.tensor([-4.0, 0.5, 2.0, 9.0, 0.0, -1.0, 3.0])
SPECS = {
    "full": [LayerSpec(0.25)],
    "window": [LayerSpec(0.25, window=20), LayerSpec(0.25)],
    "softcap": [LayerSpec(1.0, softcap=3.0)],
    "sinks": [LayerSpec(0.25, sinks=SINKS), LayerSpec(0.25, window=20, sinks=SINKS)],
    "all": [LayerSpec(0.3, window=33, softcap=2.0), LayerSpec(0.3, softcap=2.0), LayerSpec(0.3, window=7)],
}


@pytest.fixture(params=["shares", "does not share", "reads a span", "compiled"])
def share(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    if request.param == "compiled":
        request.getfixturevalue("compiled_kernels")
    # So that these small batches take every path: sharing, sub-batches, reading in place, blocks of a window.
    monkeypatch.setattr(torch_backend, "SHARE_TOKENS", 16)
    monkeypatch.setattr(torch_backend, "GATHER_BYTES", 200 * 2 * DIM * 4)
    monkeypatch.setattr(torch_backend, "RUN_TOKENS", 24)
    monkeypatch.setattr(torch_backend, "WINDOW_BLOCK", 11)
    monkeypatch.setattr(torch_backend, "SPAN_WASTE", 1e9 if request.param == "reads a span" else 0)
    monkeypatch.setattr(torch_backend, "SPAN_QUERIES", 64)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    return bool(request.param != "does not share")


@pytest.mark.parametrize("page", [1, 16])
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (6, 2), (7, 1)])
@pytest.mark.parametrize("kind", SPECS)
def test_random_ragged_batches(kind: str, heads: int, kv_heads: int, page: int, share: bool) -> None:
    """Requests start, branch at page borders, are extended and decode, in mixed steps."""
    specs = [s if s.sinks is None else replace(s, sinks=s.sinks[:heads]) for s in SPECS[kind]]
    world = World(heads, specs, heads, kv_heads, page, share)
    for row, n in ((0, 60), (1, 16), (2, 15)):
        world.begin(row)
        world.step([(row, n)])
    for row, parent, pages in ((3, 0, 48 // page), (4, 0, 48 // page), (5, 0, 32 // page), (6, 1, 16 // page)):
        world.begin(row, parent, pages)
    for _ in range(5):
        order = world.rng.permutation(7).tolist()
        lengths = world.rng.choice([1, 1, 1, 2, 5, 17, 17, 40], size=7).tolist()
        world.step(sorted(zip(order, lengths, strict=True), key=lambda chunk: chunk[1] != 1))
    world.step([(row, 1) for row in range(7)])


@pytest.mark.parametrize("page", [1, 16])
def test_lengths_around_a_page(page: int, share: bool) -> None:
    world = World(1, SPECS["window"], 4, 2, page, share)
    for row, length in enumerate(n for n in (page - 1, page, page + 1, 2 * page) if n):
        world.begin(row)
        world.step([(row, length)])
    for _ in range(page + 2):
        world.step([(row, 1) for row in world.requests])


def test_tree_of_three_levels(share: bool) -> None:
    """All requests share a root, groups share a branch, and one reads a prefix in the step that writes it."""
    world = World(2, SPECS["full"], 4, 2, 4, share)
    world.begin(0)
    world.step([(0, 64)])
    for row in (1, 2):
        world.begin(row, 0, 12)
        world.step([(row, 24)])
    for row in range(3, 9):
        world.begin(row, 1 + row % 2, 17)
    world.step([(row, 3 + row % 2) for row in range(3, 9)])
    for _ in range(3):
        world.step([(row, 1) for row in range(9)])
    world.begin(9, 0, 12)
    world.begin(10)
    world.step([(row, 1) for row in range(9)] + [(9, 40), (10, 70)])


def test_shared_pages_are_attended_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """8 decodes on one prefix gather its pages once, not 8 times."""
    gathered: list[int] = []
    attend = torch_backend.attend

    def counting(q: torch.Tensor, k: torch.Tensor, *rest: object, **named: object) -> object:
        gathered.append(k.shape[0] * k.shape[2])
        return attend(q, k, *rest, **named)  # type: ignore[arg-type]

    world = World(3, SPECS["full"], 4, 2, 16, share=True)
    world.begin(0)
    world.step([(0, 640)])
    for row in range(1, 8):
        world.begin(row, 0, 40)
        world.step([(row, 2)])
    monkeypatch.setattr(torch_backend, "attend", counting)
    world.step([(row, 1) for row in range(8)])
    assert sum(gathered) <= 640 + 8 * 16


def test_extreme_scores_stay_finite(share: bool) -> None:
    world = World(4, [LayerSpec(100.0)], 4, 2, 16, share)
    for row in range(3):
        world.begin(row)
        world.step([(row, 33)], tolerance=1e-3)  # scores of some 1000, rounded to float32
    world.begin(3, 0, 2)
    world.step([(0, 1), (1, 1), (2, 1), (3, 5)], tolerance=1e-3)


def test_bfloat16_is_as_exact_as_its_pool() -> None:
    """Parts are merged in float32: the result differs from float32 attention over the same values only by rounding."""
    torch.manual_seed(0)
    pool = torch.zeros(1, 2, 80, 16, 2, DIM, dtype=torch.bfloat16)
    table = np.arange(1, 61, dtype=np.int32)[None].repeat(3, axis=0)
    table[1:, 50:] = [[61, 62, 63, 64, 65, 66, 67, 68, 69, 70], [71, 72, 73, 74, 75, 76, 77, 78, 79, 0]]
    pool[:, :, 1:] = torch.randn(1, 2, 79, 16, 2, DIM, dtype=torch.bfloat16)
    batch = AttentionBatch(
        np.arange(3, dtype=np.int32),
        np.array([1, 1, 3], np.int32),
        np.array([830, 850, 880], np.int32),
        2,
        16,
        torch.from_numpy(table),
        table,
    )
    q, k, v = (torch.randn(5, heads, DIM).bfloat16() for heads in (4, 2, 2))
    results = []
    for dtype in (torch.bfloat16, torch.float32):
        own = KVPool(pool.to(dtype).clone())
        backend = TorchAttention(own, SPECS["full"], 4)
        backend.plan(batch)
        own.layer(0).write(torch.from_numpy(batch.query_slots()), k.to(dtype), v.to(dtype))
        results.append(backend.run(0, q.to(dtype), k.to(dtype), v.to(dtype)).float())
    assert (results[0] - results[1]).abs().max() < 0.01


def test_length_buckets_bound_padding() -> None:
    lengths = np.random.default_rng(0).integers(1, 5000, 300)
    some = np.arange(0, 300, 2)
    buckets = length_buckets(lengths, some)
    assert sorted(np.concatenate(buckets).tolist()) == some.tolist()
    assert len(buckets) <= 11
    for bucket in buckets:
        counted = np.maximum(lengths[bucket], 128)
        assert counted.max() <= 1.5 * counted.min() + 1


@pytest.mark.parametrize(("apart", "calls"), [(1, 1), (3, 2)])
def test_decodes_side_by_side_are_one_call(apart: int, calls: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two requests of 64 and 300 tokens, whose lengths are too different to be padded; a sixth of the span is free."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    world = World(5, SPECS["full"], 4, 2, 16, share=True)
    world.free = [page * apart for page in range(40, 1, -1)]
    for row, n in ((0, 63), (1, 299)):
        world.begin(row)
        world.step([(row, n)])
    counted = []
    attend = torch_backend.attend
    monkeypatch.setattr(torch_backend, "attend", lambda *given: counted.append(1) or attend(*given))
    world.step([(0, 1), (1, 1)])
    assert len(counted) == calls
    assert world.backend.saved_keys == 0


def test_nan_keys_of_a_request_do_not_reach_others() -> None:
    q, k, v = (torch.randn(1, 2, length, 16) for length in (4, 12, 12))
    mask = torch.full((1, 1, 4, 12), -torch.inf)
    mask[:, :, :2, :6], mask[:, :, 2:, 6:] = 0.0, 0.0
    expected = attend(q, k, v, 0.25, None, mask)
    v[:, :, 3] = torch.nan
    for found, right in zip(attend(q, k, v, 0.25, None, mask), expected, strict=True):
        torch.testing.assert_close(found[:, :, 2:], right[:, :, 2:])
    assert attend(q, k, v, 0.25, None, mask)[0][:, :, :2].isnan().all()


@pytest.mark.parametrize("softcap", [None, 30.0])
def test_keys_that_no_query_sees_may_hold_nan(softcap: float | None) -> None:
    q, k, v = (torch.randn(2, 2, length, 16) for length in (1, 12, 12))
    mask = torch.zeros(2, 1, 1, 12)
    mask[0, ..., 9:] = -torch.inf
    expected = attend(q, k, v, 0.25, softcap, mask)
    k[0, :, 9:], v[0, :, 9:] = torch.nan, torch.nan
    for found, right in zip(attend(q, k, v, 0.25, softcap, mask), expected, strict=True):
        torch.testing.assert_close(found, right)
    v[1, :, 3] = torch.nan
    assert attend(q, k, v, 0.25, softcap, mask)[0].isnan().any(dim=(1, 2, 3)).tolist() == [False, True]
