"""The contract of an attention backend: planned once a step, run once a layer (FlashInfer's split; Ye et al., 2025)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from torch import Tensor

from ..arrays import Int32, Int64, ranges
from .sharing import SharedRuns, shared_runs


class Unavailable(Exception):
    """A backend cannot be used here. The message says why, in one line."""


@dataclass(frozen=True, slots=True)
class LayerSpec:
    """The attention settings that differ between a model's layers."""

    scale: float  # multiplies q·k
    window: int | None = None  # a token sees the last ``window`` tokens, itself included; None: all of them
    softcap: float | None = None  # scores become softcap * tanh(score / softcap) (Gemma 2)
    # float32 [heads], attention sinks (Xiao et al., 2024; GPT-OSS): a learned logit of each query head that joins the
    # softmax's denominator. Applied once to the whole softmax, never to partial results: out * sigmoid(lse - sink).
    sinks: Tensor | None = field(default=None, compare=False)


@dataclass(slots=True)
class AttentionBatch:
    """One step's requests (R), and where their keys and values are. All arrays but ``page_table`` are on the host.

    The query tokens of request i are the last ``q_lens[i]`` of its ``kv_lens[i]`` tokens; queries are concatenated in
    request order. The first ``num_decodes`` requests have one query token each.
    """

    rows: Int32  # [R] rows of the page table
    q_lens: Int32  # [R]
    kv_lens: Int32  # [R] tokens once this step's are written
    num_decodes: int
    page_size: int
    page_table: Tensor  # int32 [max_rows, max_pages], on the device; the last row is the scratch page's
    host_page_table: Int32  # the same on the host; on a CPU the same memory
    # Rows and columns of the page table that were written since the last step; None: anything may have been.
    written: tuple[Int32, Int32] | None = None
    _shared: dict[int, SharedRuns] = field(default_factory=dict, init=False, repr=False)

    def slots(self, rows: Int32, positions: Int64) -> Int64:
        """The pool slot of each position of a page-table row, int64 ``[n]``: page * page_size + offset."""
        column, offset = np.divmod(positions, self.page_size)
        return self.host_page_table[rows, column] * np.int64(self.page_size) + offset

    def query_slots(self) -> Int64:
        """`slots` of every query token, int64 ``[T]``."""
        return self.slots(self.rows.repeat(self.q_lens), ranges(self.kv_lens - self.q_lens, self.q_lens))

    def shared_runs(self, min_saved: int) -> SharedRuns:
        """The runs of pages that several requests see in full with all of their query tokens.

        Found at the first call of a step, from page identity; later calls return the same object.

        Args:
            min_saved: a run is taken if it saves the reads of at least so many tokens (see `sharing.shared_runs`).
        """
        found = self._shared.get(min_saved)
        if found is None:
            # A request's own query tokens see its newest pages in part only.
            limits = (self.kv_lens - self.q_lens).astype(np.int64) // self.page_size
            found = self._shared[min_saved] = shared_runs(
                self.host_page_table, self.rows, limits, -(-min_saved // self.page_size)
            )
        return found


@dataclass(frozen=True, slots=True)
class StepShape:
    """The padded shape of a step that runs as a CUDA graph.

    Query tokens 0 … decodes - 1 are the decodes, then come ``tokens`` tokens of at most ``requests`` chunks. A step
    with fewer is padded. A padding decode reads at most the first token of the scratch page, which no request owns.

    A *joint* shape has no places for decodes or chunks: any number of decodes come first among its ``tokens``, and any
    number of chunks follow without a gap.
    """

    decodes: int
    tokens: int
    requests: int
    tree: bool = False  # whether shared prefixes are read once: other kernels, so a graph of its own
    joint: int = 0  # of a joint shape: the most query tokens that can be sampled

    @property
    def num_tokens(self) -> int:
        """Query tokens of the padded step."""
        return self.decodes + self.tokens

    @property
    def num_outputs(self) -> int:
        """The most query tokens that can be sampled: one a request."""
        return self.joint or self.decodes + self.requests

    def first_chunk(self, num_decodes: int) -> int:
        """The first query token of the chunks of a step with so many decodes."""
        return max(self.decodes, num_decodes)


@dataclass(frozen=True, slots=True)
class RequestGroup:
    """The decodes or the chunks of a step: what a GPU backend attends with one call.

    The arrays have no padding. ``tokens`` and ``max_requests`` are the shape's where a step is padded to one, and
    otherwise those of the requests themselves.
    """

    rows: Int32  # [R] rows of the page table
    q_lens: Int32  # [R]
    kv_lens: Int32  # [R]
    tokens: slice  # of the step's query tokens
    max_requests: int

    @property
    def num_tokens(self) -> int:
        """Query tokens of the group, without padding."""
        return int(self.tokens.stop - self.tokens.start)

    def mean_q_len(self, scratch_row: int = -1) -> float:
        """Query tokens of the request that the average query token belongs to. Requests of the scratch row, which only
        fill the places of others, do not count."""
        lengths = self.q_lens[self.rows != scratch_row].astype(np.int64)
        return float((lengths * lengths).sum() / max(int(lengths.sum()), 1))


def split_step(batch: AttentionBatch, shape: StepShape | None) -> tuple[RequestGroup | None, RequestGroup | None]:
    """The step's decodes and chunks; None where it has no place for any."""
    n, total = batch.num_decodes, len(batch.rows)
    if shape is None:
        shape = StepShape(n, int(batch.q_lens[n:].sum()), total - n)

    def group(requests: slice, tokens: slice, max_requests: int) -> RequestGroup | None:
        if not max_requests:
            return None
        arrays = batch.rows[requests], batch.q_lens[requests], batch.kv_lens[requests]
        return RequestGroup(*arrays, tokens, max_requests)

    decodes = group(slice(0, n), slice(0, shape.decodes), shape.decodes)
    return decodes, group(slice(n, total), slice(shape.decodes, shape.num_tokens), shape.requests)


def padded(array: Int32, size: int, pad: int = 0) -> Int32:
    """``array`` filled up with ``pad`` to ``size`` elements."""
    return np.concatenate([array, np.full(size - len(array), pad, np.int32)])


class AttentionBackend(Protocol):
    """Attention over a `KVPool`. Built with the pool, one `LayerSpec` a layer and the number of query heads.

    On a GPU the caller makes the pool's device the thread's current one: at construction, for `plan` and for `run`.
    """

    captures: bool  # whether a step's `run` calls can be captured in a CUDA graph and replayed after another `plan`
    joint: bool  # whether captured steps with chunks have joint shapes
    saved_keys: int  # of the planned step: keys that are read once for several requests, for all of these but one

    def forms(self, shape: StepShape) -> list[StepShape]:
        """The forms in which steps of this shape are to be captured: itself, and those that `plan` may return."""
        ...

    def plan(self, batch: AttentionBatch, shape: StepShape | None = None) -> StepShape | None:
        """Prepares everything about the step that does not depend on a layer's values. Replaces the previous plan.

        Args:
            batch: the step's requests.
            shape: pad the step to it. Kernels then read the plan from the same addresses as in any other step of this
                shape. Only where ``captures``.

        Returns:
            The form of ``shape`` whose graph to replay; None where the step has to run as it is, without padding.
        """
        ...

    def run(self, layer: int, q: Tensor, k: Tensor, v: Tensor, out: Tensor | None = None) -> Tensor:
        """Attends. The step's own keys and values are already in the pool.

        Args:
            layer: index of the layer.
            q: ``[T, heads, head_dim]``, rotated. Rows may be strided.
            k, v: ``[T, kv_heads, head_dim]``, what the step wrote, for backends that do not read it from the pool.
            out: ``[T, heads, head_dim]``, where to put the result.

        Returns:
            ``[T, heads, head_dim]``, in ``q``'s dtype.
        """
        ...
