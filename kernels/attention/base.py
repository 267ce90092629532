"""What an attention backend is: planned once a step, run once a layer (FlashInfer's split; Ye et al., 2025)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt
from torch import Tensor

Int32 = npt.NDArray[np.int32]
Int64 = npt.NDArray[np.int64]


class Unavailable(Exception):
    """A backend cannot be used here. The message says why, in one line."""


@dataclass(frozen=True, slots=True)
class LayerSpec:
    """What differs between a model's layers, as far as attention can tell."""

    scale: float  # multiplies q·k
    window: int | None = None  # a token sees the last ``window`` tokens, itself included; None: all of them
    softcap: float | None = None  # scores become softcap * tanh(score / softcap) (Gemma 2)


@dataclass(slots=True)
class AttentionBatch:
    """One step's requests (R) and where their keys and values lie. Host arrays but for the page table.

    The query tokens of request i are the last ``q_lens[i]`` of its ``kv_lens[i]`` tokens; queries are concatenated in
    request order. The first ``num_decodes`` requests have one query token each.
    """

    rows: Int32  # [R] rows of the page table
    q_lens: Int32  # [R]
    kv_lens: Int32  # [R] tokens once this step's are written
    num_decodes: int
    page_table: Tensor  # int32 [max_rows, max_pages], on the device
    host_page_table: Int32  # the same on the host; on a CPU the same memory


@dataclass(frozen=True, slots=True)
class StepShape:
    """The padded shape of a step that runs as a CUDA graph.

    Query tokens 0 … decodes - 1 are the decodes, then come ``tokens`` tokens of at most ``requests`` chunks. What a
    step has less of is padding: a decode that pads reads the first token of the page table's last row, which belongs to
    no request.
    """

    decodes: int
    tokens: int
    requests: int

    @property
    def num_tokens(self) -> int:
        return self.decodes + self.tokens

    @property
    def num_outputs(self) -> int:
        """The most requests that can sample."""
        return self.decodes + self.requests


class AttentionBackend(Protocol):
    """Attention over a paged KV pool ``[layers, 2, pages, page_size, kv_heads, head_dim]``.

    Built with the pool, one `LayerSpec` a layer and the number of query heads.
    """

    captures: bool  # whether a step's `run` calls can be captured in a CUDA graph and replayed after another `plan`

    def plan(self, batch: AttentionBatch, shape: StepShape | None = None) -> None:
        """Everything about the step that does not depend on a layer's values. Replaces the previous plan.

        ``shape``: the step is padded to it, and what is planned is read from the same addresses as in any other step of
        this shape. Only where ``captures``.
        """
        ...

    def run(self, layer: int, q: Tensor, k: Tensor, v: Tensor, out: Tensor | None = None) -> Tensor:
        """Attends. The step's own keys and values are in the pool already.

        Args:
            layer: index of the layer.
            q: ``[T, heads, head_dim]``, rotated. Rows may be strided.
            k, v: ``[T, kv_heads, head_dim]``, what the step wrote, for backends that would rather not gather it.
            out: where to put the result.

        Returns:
            ``[T, heads, head_dim]``, in ``q``'s dtype.
        """
        ...


def query_slots(batch: AttentionBatch, page_size: int) -> Int64:
    """Pool slots of every query token, int64 ``[T]``: page * page_size + offset."""
    positions = ranges((batch.kv_lens - batch.q_lens).astype(np.int64), batch.q_lens.astype(np.int64))
    pages = batch.host_page_table[np.repeat(batch.rows, batch.q_lens), positions // page_size]
    return pages.astype(np.int64) * page_size + positions % page_size


def ranges(starts: Int64, lengths: Int64) -> Int64:
    """``starts[0] … starts[0] + lengths[0] - 1``, then the same for the next, concatenated."""
    return np.arange(int(lengths.sum())) + np.repeat(starts - (np.cumsum(lengths) - lengths), lengths)
