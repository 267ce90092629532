"""The GPU's attention backends against attention written out, in steps that mix decodes and chunks."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from branchwise.kernels.attention.base import AttentionBackend, AttentionBatch, LayerSpec, StepShape
from branchwise.kernels.attention.partial import attend_reference
from branchwise.kernels.kv_pool import KVLayout, KVPool

HEADS, KV_HEADS, PAGES = 8, 2, 700
SINKS = torch.linspace(-3.0, 6.0, HEADS, device="cuda") if torch.cuda.is_available() else None
SPECS = {
    "plain": [LayerSpec(0.125)],
    "window": [LayerSpec(0.125, window=100), LayerSpec(0.125)],
    "softcap": [LayerSpec(0.2, softcap=20.0)],
    "sinks": [LayerSpec(0.125, window=100, sinks=SINKS), LayerSpec(0.125, sinks=SINKS)],
    "both": [LayerSpec(0.2, window=100, softcap=20.0), LayerSpec(0.2, softcap=20.0)],
}
# (query tokens, tokens in all): decodes first
STEPS = {
    "decodes": [(1, 1), (1, 17), (1, 900), (1, 16), (1, 333)],
    "chunks": [(64, 64), (5, 300), (130, 1000), (700, 700)],
    "both": [(1, 40), (1, 800), (33, 33), (2, 700), (200, 450)],
}


class World:
    def __init__(self, backend: str, specs: list[LayerSpec], page: int, dim: int = 64) -> None:
        torch.manual_seed(0)
        self.specs, self.page, self.dim = specs, page, dim
        self.pool = torch.randn(
            len(specs), 2, PAGES * 16 // page + 1, page, KV_HEADS, dim, device="cuda", dtype=torch.bfloat16
        )
        rows = 40
        self.table = np.zeros((rows + 1, 1024 // page), np.int32)
        self.table[-1] = self.pool.shape[2] - 1
        self.device_table = torch.from_numpy(self.table).cuda()
        self.backend = self._make(backend, rows)

    def _make(self, backend: str, rows: int) -> AttentionBackend:
        if backend == "triton":
            from branchwise.kernels.attention.triton_backend import TritonAttention

            return TritonAttention(KVPool(self.pool), self.specs, HEADS)
        if backend == "tree":
            from branchwise.kernels.attention.tree_backend import TreeAttention
            from branchwise.kernels.attention.tree_costs import TreeCosts

            flat, always = self._make("triton", rows), TreeCosts(flat=1.0, partial=0.0, tree_layer=-1e12)
            return TreeAttention(KVPool(self.pool), self.specs, HEADS, self.device_table, flat, 2048, always)
        pytest.importorskip("flashinfer")
        from branchwise.kernels import triton_ops
        from branchwise.kernels.attention.flashinfer_backend import FlashInferAttention

        return FlashInferAttention(KVPool(self.pool), self.specs, HEADS, self.device_table, triton_ops, rows)

    def step(self, requests: list[tuple[int, int]], shape: StepShape | None = None) -> None:
        """Runs one step of ``requests`` over pages scattered anew, the first few shared, and checks every layer."""
        rng = np.random.default_rng(len(requests))
        q_lens, kv_lens = (np.array(column, np.int32) for column in zip(*requests, strict=True))
        rows = rng.permutation(len(self.table) - 1)[: len(requests)].astype(np.int32)
        pages = iter(rng.permutation(self.pool.shape[2] - 1).tolist())
        common = [next(pages) for _ in range(96 // self.page)]
        for row, q_len, kv_len in zip(rows, q_lens, kv_lens, strict=True):
            count, shared = -(-int(kv_len) // self.page), common[: int(kv_len - q_len) // self.page]
            self.table[row, :count] = shared + [next(pages) for _ in range(count - len(shared))]
        self.device_table.copy_(torch.from_numpy(self.table))
        decodes = int((np.cumsum(q_lens != 1) == 0).sum())
        batch = AttentionBatch(rows, q_lens, kv_lens, decodes, self.page, self.device_table, self.table)
        tokens = int(q_lens.sum())
        q = torch.randn(tokens, HEADS + 2 * KV_HEADS, self.dim, device="cuda", dtype=torch.bfloat16)[:, :HEADS]
        self.backend.plan(batch, shape)
        given = q
        if shape is not None:
            given = torch.randn(shape.num_tokens, HEADS + 2, self.dim, device="cuda", dtype=torch.bfloat16)[:, :HEADS]
            chunk = shape.first_chunk(decodes)
            given[:decodes] = q[:decodes]
            given[chunk : chunk + tokens - decodes] = q[decodes:]
        slots = torch.from_numpy(batch.query_slots()).cuda()
        for layer, spec in enumerate(self.specs):
            flat = self.pool[layer].flatten(1, 2)
            out = self.backend.run(layer, given, flat[0, slots], flat[1, slots])
            if shape is not None:
                out = torch.cat([out[:decodes], out[chunk : chunk + tokens - decodes]])
            at = 0
            for i, (q_len, kv_len) in enumerate(requests):
                expected = self._expected(layer, spec, q[at : at + q_len], int(rows[i]), kv_len)
                torch.testing.assert_close(out[at : at + q_len].float(), expected, atol=0.02, rtol=0.02)
                at += q_len

    def _expected(self, layer: int, spec: LayerSpec, q: torch.Tensor, row: int, kv_len: int) -> torch.Tensor:
        pages = torch.from_numpy(self.table[row, : -(-kv_len // self.page)].astype(np.int64)).cuda()
        k, v = (x[pages].flatten(0, 1)[:kv_len].float().transpose(0, 1) for x in self.pool[layer])
        group = HEADS // KV_HEADS
        k, v = (x.repeat_interleave(group, 0)[None] for x in (k, v))
        query = torch.arange(kv_len - len(q), kv_len, device="cuda")[:, None]
        key = torch.arange(kv_len, device="cuda")
        hidden = (key > query) | (key <= query - (spec.window or kv_len + 1))
        mask = torch.where(hidden, float("-inf"), 0.0)[None, None]
        out, lse = attend_reference(q.float().transpose(0, 1)[None], k, v, spec.scale, spec.softcap, mask, False)
        if spec.sinks is not None:
            out = out * torch.sigmoid(lse - spec.sinks[:, None])[..., None]
        return out[0].transpose(0, 1)


@pytest.mark.parametrize("backend", ["flashinfer", "triton", "tree"])
@pytest.mark.parametrize("page", [16, 1])
@pytest.mark.parametrize("specs", SPECS)
def test_every_kind_of_step(backend: str, specs: str, page: int) -> None:
    world = World(backend, SPECS[specs], page)
    for requests in STEPS.values():
        world.step(requests)


@pytest.mark.parametrize("backend", ["flashinfer", "triton", "tree"])
@pytest.mark.parametrize("specs", ["plain", "both", "sinks"])
def test_padded_steps(backend: str, specs: str) -> None:
    world = World(backend, SPECS[specs], 16)
    if not world.backend.captures:
        pytest.skip(f"{backend} does not capture")
    world.step(STEPS["decodes"], StepShape(8, 0, 0))
    world.step(STEPS["both"], StepShape(16, 256, 8))
    world.step(STEPS["chunks"], StepShape(4, 1024, 30))
    if world.backend.joint:
        world.step(STEPS["both"], StepShape(0, 512, 0, joint=16))
        world.step(STEPS["chunks"], StepShape(0, 1024, 0, joint=16))


@pytest.mark.parametrize("backend", ["flashinfer", "triton", "tree"])
def test_heads_of_128_and_long_chunks(backend: str) -> None:
    """Long chunks take `fa3` on Hopper, others the tree's widest tile."""
    world = World(backend, SPECS["plain"], 16, dim=128)
    world.step([(1, 500), (900, 900), (1000, 1020)])
    chunks = [(1, 500), (1, 700), (64, 900), (200, 1020), (33, 700), (128, 1000)]
    world.step(chunks)
    if world.backend.joint:
        world.step(chunks, StepShape(0, 512, 0, joint=16))


@pytest.mark.parametrize("choice", ["auto", "fp8"])
@pytest.mark.parametrize("page", [16, 1])
def test_many_readers_of_a_prefix(choice: str, page: int) -> None:
    """The widest tile of tree attention, which on Hopper is `attend_wide`: full and cut off tiles of rows and keys,
    partial results, and chunks whose rows see different keys. Two runs of a step have the same bits."""
    from branchwise.kernels.attention.tree_backend import TreeAttention
    from branchwise.kernels.attention.tree_costs import TreeCosts
    from branchwise.kernels.attention.tree_plan import TreeRequests, plan_tree
    from branchwise.kernels.attention.triton_backend import TritonAttention

    heads, count, prefix = 32, 40, 1000 // page * page
    layout = KVLayout.of(choice, 1, page, KV_HEADS, 128, torch.bfloat16)  # 16 query heads a key head
    for q_len in (1, 9):
        own = -(-(30 + q_len) // page)
        shared = prefix // page
        pool = KVPool.allocate(layout, shared + count * own + 1, torch.device("cuda"))
        torch.manual_seed(0)
        slots = torch.arange(pool.num_pages * page, device="cuda")
        k, v = (torch.randn(len(slots), KV_HEADS, 128, device="cuda", dtype=torch.bfloat16) for _ in range(2))
        pool.layer(0).write(slots, k, v)
        table = np.zeros((count + 1, 1024), np.int32)
        order = np.random.default_rng(0).permutation(pool.num_pages - 1)
        table[:count, :shared] = order[:shared]
        table[:count, shared : shared + own] = order[shared:].reshape(count, own)
        device_table, spec = torch.from_numpy(table).cuda(), LayerSpec(128**-0.5)
        flat = TritonAttention(pool, [spec], heads)
        tree = TreeAttention(pool, [spec], heads, device_table, flat, 512, TreeCosts())
        kv_lens = np.arange(count) % 23 + prefix + q_len
        rows, lengths = np.arange(count, dtype=np.int32), np.full(count, q_len)
        requests = TreeRequests(rows, np.arange(count) * q_len, lengths, kv_lens)
        total, runner = count * q_len, tree._runner
        plan = plan_tree(table, requests, total, 16, page, tree._costs, tree._limits, -np.inf)
        assert plan is not None and plan.sizes[-1] > 0
        runner.load(plan, total)
        runner.advance((kv_lens[:, None] - q_len + np.arange(q_len)).ravel())
        q = torch.randn(total, heads, 128, device="cuda", dtype=torch.bfloat16)
        outs = [torch.full_like(q, torch.nan) for _ in range(8)]
        for out in outs:
            runner.run(0, spec, q, out, tuple(plan.sizes), total)
        assert all(torch.equal(out, outs[0]) for out in outs)
        expected = torch.empty_like(q)
        flat.plan(
            AttentionBatch(rows, lengths.astype(np.int32), kv_lens.astype(np.int32), 0, page, device_table, table)
        )
        flat.run(0, q, q, q, expected)
        torch.testing.assert_close(outs[0], expected, atol=4e-3, rtol=2e-2)
