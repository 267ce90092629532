"""What an attention backend is: planned once a step, run once a layer (FlashInfer's split; Ye et al., 2025)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt
from torch import Tensor

Int32 = npt.NDArray[np.int32]


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


class AttentionBackend(Protocol):
    """Attention over a paged KV pool ``[layers, 2, pages, page_size, kv_heads, head_dim]``.

    Built with the pool, one `LayerSpec` a layer and the number of query heads.
    """

    def plan(self, batch: AttentionBatch) -> None:
        """Everything about the step that does not depend on a layer's values. Replaces the previous plan."""
        ...

    def run(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Writes ``k`` and ``v`` of every query token to the pool, then attends.

        Args:
            layer: index of the layer.
            q: ``[T, heads, head_dim]``, rotated.
            k, v: ``[T, kv_heads, head_dim]``, ``k`` rotated.

        Returns:
            ``[T, heads, head_dim]``, in ``q``'s dtype.
        """
        ...
