"""Attention on a GPU by FlashInfer (Ye et al., 2025): `fa2` with tensor cores for decodes and short chunks, `fa3` for
long chunks on Hopper.

A step takes two calls a layer: one for its decodes (query tiles of 16 rows, long keys split over the device), one for
its chunks. One kernel lays out the page indices from the page table on the device; the host only sends the number of
pages of each request.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..arrays import Int32
from ..base import Ops
from ..kv_pool import KVPool
from ..staging import Fence, Staging
from .base import AttentionBatch, LayerSpec, StepShape, padded, split_step
from .flashinfer_module import FlashInferKernel, PagedCall, Variant, build, build_later

TILES = (16, 64, 128)  # rows of `fa2`'s query tiles: query tokens times the heads of a group
CTAS_PER_PROCESSOR = 2  # thread blocks `fa2` fills a device with by splitting keys
INT_WORKSPACE_BYTES = 8 * 1024 * 1024
FA3_HEAD_DIM = 128
# Query tokens: from about here `fa3` (tiles of 128 rows of one head) beats `fa2` (which packs heads).
LONG_CHUNK = 512


_LayerKind = tuple[int | None, float | None]  # window and soft-cap: layers that agree on them are planned together


@dataclass(slots=True)
class _Planned:
    """A padded `RequestGroup`: what the host plans from, and what every layer reads on the device.

    All are int32. Each ``indptr`` is ``[R + 1]``; ``kv_indices`` has the pages of all requests; the others are ``[R]``.
    """

    calls: dict[_LayerKind, PagedCall]
    tokens: slice  # of the step's query tokens
    host_qo_indptr: Int32
    host_kv_indptr: Int32
    host_kv_lens: Int32
    rows: Tensor
    qo_indptr: Tensor
    kv_indptr: Tensor
    kv_indices: Tensor
    last_page_lens: Tensor


class FlashInferAttention:
    """See `AttentionBackend`. Allocates all its memory at construction; addresses never change.

    Args:
        pool: bfloat16 or float16, on a CUDA device.
        layers: one spec a layer.
        num_heads: query heads, a multiple of kv_heads.
        table: int32 ``[rows, columns]``, the page table on the device.
        ops: `triton_ops` (or its torch twin, in tests).
        max_requests: the most requests in a step.
        captured: the most decodes, chunk tokens and chunks of a captured step.
    """

    captures = True
    joint = False
    saved_keys = 0

    def __init__(
        self,
        pool: KVPool,
        layers: list[LayerSpec],
        num_heads: int,
        table: Tensor,
        ops: Ops,
        max_requests: int,
        captured: tuple[int, int, int] = (512, 1024, 64),
    ) -> None:
        self._pool, self._layers, self._table, self._ops = pool, layers, table, ops
        layout, device = pool.layout, pool.device
        page_size, kv_heads, head_dim = layout.page_size, layout.kv_heads, layout.head_dim
        self._page_size = page_size
        variants = dict.fromkeys(
            Variant(kernel, layout.dtype, head_dim, spec.window is not None, spec.softcap is not None)
            for spec in layers
            for kernel in kernels(device, spec, head_dim)
        )
        build([variant for variant in variants if variant.kernel == "fa2"])
        # `fa3` takes a minute to compile the first time. Until then `fa2` serves long chunks.
        self._fa3 = build_later([variant for variant in variants if variant.kernel == "fa3"])
        size = workspace_bytes(num_heads, kv_heads, head_dim, _processors(device), *captured)
        workspace = torch.zeros(size, dtype=torch.uint8, device=device)

        # Neither function refers to the backend: the cycle would keep the pool's memory after the backend.
        def call(kernel: str, spec: LayerSpec, causal: bool) -> PagedCall:
            found = [v for v in variants if v.kernel == kernel and _fits(v, spec)]
            ints = torch.empty(INT_WORKSPACE_BYTES, dtype=torch.uint8, device=device)
            pinned = torch.empty(INT_WORKSPACE_BYTES, dtype=torch.uint8, pin_memory=device.type == "cuda")
            return PagedCall(found[0], spec.window, causal, num_heads, kv_heads, page_size, workspace, (ints, pinned))

        kinds = {_kind(spec): spec for spec in layers}
        self._decode = {kind: call("fa2", spec, causal=False) for kind, spec in kinds.items()}
        self._short = {kind: call("fa2", spec, causal=True) for kind, spec in kinds.items()}
        self._long = self._short

        def fa3_calls() -> dict[_LayerKind, PagedCall]:
            found = ((kind, spec) for kind, spec in kinds.items() if "fa3" in kernels(device, spec, head_dim))
            return {kind: call("fa3", spec, causal=True) for kind, spec in found}

        self._fa3_calls: Callable[[], dict[_LayerKind, PagedCall]] | None = fa3_calls
        self._ints = Staging(8 * max_requests + 64, torch.int32, device)
        # Requests that share a prefix each list its pages.
        most = max_requests * table.shape[1]
        self._decode_indices, self._chunk_indices = (
            torch.zeros(most, dtype=torch.int32, device=device) for _ in range(2)
        )
        self._scratch_row = len(table) - 1
        self._copied = Fence(device)  # the last plan's copies to the device
        self._planned: list[_Planned] = []

    def forms(self, shape: StepShape) -> list[StepShape]:
        """See `AttentionBackend.forms`."""
        return [shape]

    def plan(self, batch: AttentionBatch, shape: StepShape | None = None) -> StepShape | None:
        """See `AttentionBackend.plan`."""
        self._copied.wait()
        self._ints.begin()
        self._planned = []
        decodes, chunks = split_step(batch, shape)
        if decodes is not None:
            size = decodes.max_requests
            rows, kv_lens = padded(decodes.rows, size, self._scratch_row), padded(decodes.kv_lens, size, 1)
            self._add(self._decode, decodes.tokens, rows, np.ones(size, np.int32), kv_lens, self._decode_indices)
        if chunks is not None:
            long = shape is None and chunks.mean_q_len(self._scratch_row) >= LONG_CHUNK
            calls = self._long_calls() if long else self._short
            rows, q_lens, kv_lens = (
                padded(x, chunks.max_requests) for x in (chunks.rows, chunks.q_lens, chunks.kv_lens)
            )
            self._add(calls, chunks.tokens, rows, q_lens, kv_lens, self._chunk_indices)
        self._ints.send()
        for p in self._planned:
            longest = int(np.diff(p.host_kv_indptr).max())
            self._ops.page_indices(self._table, p.rows, p.kv_indptr, longest, p.kv_indices)
            qo_indptr, kv_indptr = torch.from_numpy(p.host_qo_indptr), torch.from_numpy(p.host_kv_indptr)
            kv_lens_on_host, tokens = torch.from_numpy(p.host_kv_lens), p.tokens.stop - p.tokens.start
            for call in p.calls.values():
                call.plan(qo_indptr, kv_indptr, kv_lens_on_host, tokens, capture=shape is not None)
        self._copied.record()
        return shape

    def run(self, layer: int, q: Tensor, k: Tensor, v: Tensor, out: Tensor | None = None) -> Tensor:
        """See `AttentionBackend.run`."""
        if out is None:
            out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        spec = self._layers[layer]
        kv = self._pool.layer(layer)
        lse = None if spec.sinks is None else torch.zeros(q.shape[:2], dtype=torch.float32, device=q.device)
        for p in self._planned:
            p.calls[_kind(spec)].run(
                q[p.tokens],
                kv.k,
                kv.v,
                out[p.tokens],
                p.qo_indptr,
                p.kv_indptr,
                p.kv_indices,
                p.last_page_lens,
                spec.scale,
                spec.softcap or 0.0,
                lse if lse is None else lse[p.tokens],
            )
        if lse is not None and spec.sinks is not None:
            self._ops.apply_sinks(out, lse, spec.sinks)
        return out

    def _long_calls(self) -> dict[_LayerKind, PagedCall]:
        if self._fa3_calls is not None and self._fa3.done():
            if self._fa3.exception() is None:
                self._long = self._short | self._fa3_calls()
            self._fa3_calls = None
        return self._long

    def _add(
        self,
        calls: dict[_LayerKind, PagedCall],
        tokens: slice,
        rows: Int32,
        q_lens: Int32,
        kv_lens: Int32,
        kv_indices: Tensor,
    ) -> None:
        page, put = self._page_size, self._ints.put
        num_pages = -(-kv_lens // page)
        qo_indptr, kv_indptr = _indptr(q_lens), _indptr(num_pages)
        last_page_lens = kv_lens - (num_pages - 1) * page
        on_device = put(rows), put(qo_indptr), put(kv_indptr), kv_indices, put(last_page_lens)
        self._planned.append(_Planned(calls, tokens, qo_indptr, kv_indptr, kv_lens, *on_device))


def workspace_bytes(
    num_heads: int, kv_heads: int, head_dim: int, processors: int, decodes: int, chunk_tokens: int, chunks: int
) -> int:
    """Bytes of `fa2`'s partial results, as its planner lays them out: float32 rows of head_dim values and one sum for
    each query tile and head. A captured step has as many tiles as its shape can need; a step that is not captured has
    partial results only where it splits keys, and then at most the tiles that fill the device's ``processors``."""
    group = num_heads // kv_heads
    filling = CTAS_PER_PROCESSOR * processors // kv_heads

    def rows(tile: int, tokens: int, requests: int) -> int:
        return tile * max(-(-tokens * group // tile) + requests, filling)

    decode_tile = next((tile for tile in TILES if group <= tile), TILES[-1])
    most = max(rows(decode_tile, decodes, decodes), rows(TILES[-1], chunk_tokens, chunks))
    return num_heads * most * (head_dim + 1) * 4 + 1024 * 1024


def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def kernels(device: torch.device, spec: LayerSpec, head_dim: int) -> list[FlashInferKernel]:
    """Which of FlashInfer's kernels serve a layer: `fa2` everywhere, also `fa3` on Hopper for plain heads of 128.

    Compiling `fa3` takes a minute the first time, so layers with other head sizes, a window or a soft-cap use `fa2`
    alone.
    """
    plain = spec.window is None and spec.softcap is None and head_dim == FA3_HEAD_DIM
    return ["fa2", "fa3"] if plain and torch.cuda.get_device_capability(device)[0] == 9 else ["fa2"]


def _kind(spec: LayerSpec) -> _LayerKind:
    return spec.window, spec.softcap


def _fits(variant: Variant, spec: LayerSpec) -> bool:
    return variant.window == (spec.window is not None) and variant.softcap == (spec.softcap is not None)


def _indptr(lengths: Int32) -> Int32:
    return np.concatenate([np.zeros(1, np.int32), np.cumsum(lengths, dtype=np.int32)])
