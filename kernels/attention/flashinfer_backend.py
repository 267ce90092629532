"""Attention on a GPU by FlashInfer (Ye et al., 2025): `fa2` with tensor cores for decodes and short chunks, `fa3` for
long ones on Hopper.

A step is two calls a layer: its decodes (query tiles of 16 rows, long keys split over the device), then its chunks. The
index arrays are laid out from the page table by one kernel; the host only says how many pages each request has.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..base import Ops
from ..staging import Fence, Staging
from .base import AttentionBatch, Int32, LayerSpec, StepShape
from .flashinfer_module import Kernel, PagedCall, Variant, build

WORKSPACE_BYTES = 384 * 1024 * 1024
INT_WORKSPACE_BYTES = 8 * 1024 * 1024
FA3_HEAD_DIM = 128
# Query tokens: from about here `fa3` (tiles of 128 rows of one head) beats `fa2` (which packs heads).
LONG_CHUNK = 512


@dataclass(slots=True)
class _Members:
    """Some consecutive requests of a step: what every layer's call reads. Tensors are on the device."""

    tokens: slice  # of the step's query tokens
    qo_indptr: Tensor
    kv_indptr: Tensor
    kv_indices: Tensor
    last_page_lens: Tensor


class FlashInferAttention:
    """See `AttentionBackend`. All memory is allocated here, at addresses that stay.

    Args:
        pool: ``[layers, 2, pages, page_size, kv_heads, head_dim]``, bfloat16 or float16, on a CUDA device.
        layers: one spec a layer.
        num_heads: query heads, a multiple of kv_heads.
        table: int32 ``[rows, columns]``, the page table on the device.
        ops: `triton_ops` (or its torch twin, in tests).
        max_requests: the most requests in a step.
    """

    captures = True

    def __init__(
        self, pool: Tensor, layers: list[LayerSpec], num_heads: int, table: Tensor, ops: Ops, max_requests: int
    ) -> None:
        self._pool, self._layers, self._table, self._ops = pool, layers, table, ops
        _, _, _, self._page_size, kv_heads, head_dim = pool.shape
        device = pool.device
        variants = dict.fromkeys(
            Variant(kernel, pool.dtype, head_dim, spec.window is not None, spec.softcap is not None)
            for spec in layers
            for kernel in kernels(device, spec, head_dim)
        )
        build(list(variants))
        workspace = torch.zeros(WORKSPACE_BYTES, dtype=torch.uint8, device=device)

        def call(kernel: str, spec: LayerSpec, causal: bool) -> PagedCall:
            found = [v for v in variants if v.kernel == kernel and _fits(v, spec)]
            ints = torch.empty(INT_WORKSPACE_BYTES, dtype=torch.uint8, device=device)
            pinned = torch.empty(INT_WORKSPACE_BYTES, dtype=torch.uint8, pin_memory=device.type == "cuda")
            return PagedCall(
                found[0], spec.window, causal, num_heads, kv_heads, self._page_size, workspace, (ints, pinned)
            )

        # Layers that attend alike share their calls: a step plans each once.
        kinds = {_kind(spec): spec for spec in layers}
        self._decode = {kind: call("fa2", spec, causal=False) for kind, spec in kinds.items()}
        self._short = {kind: call("fa2", spec, causal=True) for kind, spec in kinds.items()}
        self._long = {
            kind: call("fa3", spec, causal=True)
            for kind, spec in kinds.items()
            if "fa3" in kernels(device, spec, head_dim)
        }
        self._ints = Staging(8 * max_requests + 64, torch.int32, device)
        columns = table.shape[1]
        # A page may be in many rows: requests that share a prefix each list it.
        self._indices = [torch.zeros(max_requests * columns, dtype=torch.int32, device=device) for _ in range(2)]
        self._scratch_row = len(table) - 1
        self._planned = Fence(device)  # the copies of the last plan have run
        self._decodes: _Members | None = None
        self._chunks: _Members | None = None
        self._chunk_calls = self._short

    def plan(self, batch: AttentionBatch, shape: StepShape | None = None) -> None:
        n = batch.num_decodes
        decodes = StepShape(n, 0, 0) if shape is None else shape
        chunk_lens = batch.q_lens[n:]
        num_chunks, chunk_tokens = len(chunk_lens), int(chunk_lens.sum())
        if shape is not None:
            num_chunks, chunk_tokens = shape.requests, shape.tokens
        capture = shape is not None
        self._planned.wait()
        self._ints.begin()
        self._decodes = self._chunks = None
        host: list[tuple[dict[tuple[int | None, float | None], PagedCall], list[Int32], int]] = []
        layouts = []
        if decodes.decodes:
            pad = decodes.decodes - n
            rows = np.concatenate([batch.rows[:n], np.full(pad, self._scratch_row, np.int32)])
            q_lens = np.ones(decodes.decodes, np.int32)
            kv_lens = np.concatenate([batch.kv_lens[:n], np.ones(pad, np.int32)])
            self._decodes, arrays, pages = self._members(slice(0, len(rows)), rows, q_lens, kv_lens, 0)
            host.append((self._decode, arrays, len(rows)))
            layouts.append((self._decodes, pages))
        if num_chunks:
            zeros = np.zeros(num_chunks - len(chunk_lens), np.int32)
            rows, q_lens, kv_lens = (np.concatenate([x[n:], zeros]) for x in (batch.rows, batch.q_lens, batch.kv_lens))
            start = decodes.decodes
            self._chunks, arrays, pages = self._members(slice(start, start + chunk_tokens), rows, q_lens, kv_lens, 1)
            long = not capture and bool(self._long) and _mean_length(chunk_lens) >= LONG_CHUNK
            self._chunk_calls = {**self._short, **self._long} if long else self._short
            host.append((self._chunk_calls, arrays, chunk_tokens))
            layouts.append((self._chunks, pages))
        self._ints.send()
        for members, (rows_on_device, most) in layouts:
            self._ops.page_indices(self._table, rows_on_device, members.kv_indptr, most, members.kv_indices)
        for calls, arrays, tokens in host:
            qo_indptr, kv_indptr, kv_lens_host = (torch.from_numpy(array) for array in arrays)
            for call in calls.values():
                call.plan(qo_indptr, kv_indptr, kv_lens_host, tokens, capture)
        self._planned.record()

    def run(self, layer: int, q: Tensor, k: Tensor, v: Tensor, out: Tensor | None = None) -> Tensor:
        if out is None:
            out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        spec = self._layers[layer]
        kind, (k_pages, v_pages) = _kind(spec), self._pool[layer]
        for members, calls in ((self._decodes, self._decode), (self._chunks, self._chunk_calls)):
            if members is not None:
                calls[kind].run(
                    q[members.tokens],
                    k_pages,
                    v_pages,
                    out[members.tokens],
                    members.qo_indptr,
                    members.kv_indptr,
                    members.kv_indices,
                    members.last_page_lens,
                    spec.scale,
                    spec.softcap or 0.0,
                )
        return out

    def _members(
        self, tokens: slice, rows: Int32, q_lens: Int32, kv_lens: Int32, which: int
    ) -> tuple[_Members, list[Int32], tuple[Tensor, int]]:
        """What the device reads, what the host plans from, and the rows on the device with a bound of their pages."""
        page = self._page_size
        num_pages = -(-kv_lens // page)
        qo_indptr, kv_indptr = _indptr(q_lens), _indptr(num_pages)
        last = (kv_lens - (num_pages - 1) * page).astype(np.int32)
        put = self._ints.put
        members = _Members(tokens, put(qo_indptr), put(kv_indptr), self._indices[which], put(last))
        return members, [qo_indptr, kv_indptr, kv_lens], (put(rows), int(num_pages.max(initial=1)))


def kernels(device: torch.device, spec: LayerSpec, head_dim: int) -> list[Kernel]:
    """Which of FlashInfer's kernels serve a layer: `fa2` anywhere, `fa3` on Hopper where it is worth its compiling.

    That takes a minute the first time: models whose heads are not of 128 channels, or which need a window or a
    soft-cap, do without.
    """
    plain = spec.window is None and spec.softcap is None and head_dim == FA3_HEAD_DIM
    return ["fa2", "fa3"] if plain and torch.cuda.get_device_capability(device)[0] == 9 else ["fa2"]


def _kind(spec: LayerSpec) -> tuple[int | None, float | None]:
    return spec.window, spec.softcap


def _fits(variant: Variant, spec: LayerSpec) -> bool:
    return variant.window == (spec.window is not None) and variant.softcap == (spec.softcap is not None)


def _indptr(lengths: Int32) -> Int32:
    return np.concatenate([np.zeros(1, np.int32), np.cumsum(lengths, dtype=np.int32)])


def _mean_length(lengths: Int32) -> float:
    """The length of the chunk that the average query token is in."""
    lengths = lengths.astype(np.int64)
    return float((lengths * lengths).sum() / max(int(lengths.sum()), 1))
