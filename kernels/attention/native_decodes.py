"""Attention of decodes straight from the pages, with the compiled kernel of `native`."""

from __future__ import annotations

import ctypes

import numpy as np
import torch
from torch import Tensor

from .. import native
from ..arrays import Int32
from ..kv_pool import KVPool
from .base import AttentionBatch, LayerSpec


class NativeDecodes:
    """The decodes of a step: runs of pages that several share are read once for all, then each one's other keys.

    Args:
        pool: plain keys and values, on a CPU.
        layers: one spec a layer.
        num_heads: query heads.
    """

    def __init__(self, pool: KVPool, layers: list[LayerSpec], num_heads: int) -> None:
        layout = pool.layout
        self._pool, self._specs, self._num_heads = pool, layers, num_heads  # whose memory the addresses below are
        self._layers = []
        for i, spec in enumerate(layers):
            kv, sinks = pool.layer(i), None if spec.sinks is None else spec.sinks.data_ptr()
            sizes = layout.page_size, num_heads, layout.kv_heads, layout.head_dim, layout.dtype == torch.bfloat16
            pointers = kv.k.data_ptr(), kv.v.data_ptr(), sinks
            self._layers.append(native.Layer(*pointers, *sizes, spec.scale, spec.softcap or 0.0))
        self._plans: dict[int | None, tuple[native.Plan, tuple[Int32, ...]]] = {}
        self._state = torch.empty(0)

    @staticmethod
    def fit(pool: KVPool) -> bool:
        """Whether the kernel reads this pool."""
        layout = pool.layout
        plain = not layout.quantized and layout.dtype in (torch.float32, torch.bfloat16)
        return plain and pool.device.type == "cpu" and layout.head_dim % native.LANES == 0

    def plan(self, batch: AttentionBatch, min_shared: int | None) -> int:
        """Plans for the step's decodes.

        Args:
            batch: the step's requests.
            min_shared: see `AttentionBatch.shared_runs`; None: read no pages for several requests at once.

        Returns:
            Keys that are read once for several requests, for all of these but one.
        """
        saved, count = 0, batch.num_decodes
        self._plans = {}
        stop = batch.kv_lens[:count]
        for window in dict.fromkeys(spec.window for spec in self._specs):
            start = np.zeros(count, np.int32)
            runs: list[tuple[Int32, int, int]] = []  # queries and pages
            if window is not None and (stop > window).any():
                start = np.maximum(stop - window, 0).astype(np.int32)
            elif min_shared is not None and count > 1:
                shared = batch.shared_runs(min_shared).among(np.arange(count))
                runs = [(run.members.astype(np.int32), run.start, run.stop) for run in shared.runs]
                start = (shared.covered * batch.page_size).astype(np.int32)
                saved = sum((len(queries) - 1) * (last - first) * batch.page_size for queries, first, last in runs)
            self._plans[window] = self._make(batch, runs, start, stop)
        needed = count * self._num_heads * (2 * self._pool.layout.head_dim + native.LANES)
        if self._state.numel() < needed:
            self._state = torch.empty(needed)
        return saved

    def run(self, layer: int, q: Tensor, out: Tensor) -> None:
        """Attends with the decodes' queries ``q`` ``[T, heads, dim]`` into ``out``, contiguous."""
        library = native.library()
        assert library is not None
        plan, _ = self._plans[self._specs[layer].window]
        queries = q.data_ptr(), q.stride(0), out.data_ptr()
        threads = torch.get_num_threads()
        library.attention(
            ctypes.byref(self._layers[layer]), ctypes.byref(plan), *queries, self._state.data_ptr(), threads
        )

    @staticmethod
    def _make(
        batch: AttentionBatch, runs: list[tuple[Int32, int, int]], start: Int32, stop: Int32
    ) -> tuple[native.Plan, tuple[Int32, ...]]:
        """The plan, and the arrays that it points to."""
        count, page = len(start), batch.page_size
        own = np.arange(count, dtype=np.int32)
        ones = np.ones(count, np.int32)
        queries, first, counts, rows = own, own, ones, batch.rows[:count]
        if runs:
            lengths = np.array([len(members) for members, _, _ in runs], np.int32)
            before = np.cumsum(lengths, dtype=np.int32)
            queries = np.concatenate([*(members for members, _, _ in runs), own])
            first = np.concatenate([before - lengths, own + before[-1]])
            counts = np.concatenate([lengths, ones])
            rows = np.concatenate([np.array([rows[members[0]] for members, _, _ in runs], np.int32), rows])
            start = np.concatenate([np.array([begin * page for _, begin, _ in runs], np.int32), start])
            stop = np.concatenate([np.array([end * page for _, _, end in runs], np.int32), stop])
        table = batch.host_page_table
        arrays = table, queries, first, counts, *(np.ascontiguousarray(x, np.int32) for x in (rows, start, stop))
        addresses = (array.ctypes.data for array in arrays)
        return native.Plan(*addresses, table.shape[1], len(runs), count), arrays
