"""A step's arrays on the device: one packed copy, at addresses that captured steps read."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ...kernels.arrays import ranges
from ...kernels.attention.base import AttentionBatch, StepShape
from ...kernels.staging import Staging
from ..step import Int32, Int64, StepPlan


@dataclass(slots=True)
class StepInputs:
    """Tensors are int64 on the device. T query tokens, padding included."""

    ids: Tensor  # [T], PENDING stands for the row's last token
    positions: Tensor  # [T]
    slots: Tensor  # [T]
    rows: Tensor  # [T], page-table row of each token
    outputs: Tensor  # [O], query tokens whose hidden states are computed: the samples come first, in order
    last_token_rows: Tensor  # [S], the row whose last token the sample becomes; else the scratch row
    # Of each sample, on the host: its page-table row, and the position of the new token in its request.
    sample_rows: Int32  # [S]
    sample_positions: Int64  # [S]


class InputStaging:
    """Lays out a step's inputs and copies them to the device.

    Args:
        device: where the steps run.
        scratch_slot: where padding tokens write their keys and values.
        max_tokens, max_requests: of one step, padding included. The buffer never moves, because graphs read it.
    """

    def __init__(self, device: torch.device, scratch_slot: int, max_tokens: int, max_requests: int) -> None:
        # Five arrays of at most all tokens, and outputs, which may name a token twice; padding is one a request.
        self._staging = Staging(7 * max_tokens + 3 * max_requests, torch.int64, device)
        self._scratch_slot, self._scratch_row = scratch_slot, max_requests

    def stage(
        self, plan: StepPlan, batch: AttentionBatch, shape: StepShape | None, extra_outputs: list[Int64]
    ) -> StepInputs:
        """``shape``: pad to it. ``extra_outputs``: query tokens besides the samples whose hidden states are needed."""
        rows = plan.rows.repeat(plan.q_lens)
        positions = ranges(plan.kv_lens - plan.q_lens, plan.q_lens)
        slots = batch.slots(rows, positions)
        sample_rows, sample_positions = rows[plan.samples], positions[plan.samples] + 1
        outputs = np.concatenate([plan.samples, *extra_outputs])
        n, gap, tokens, num_outputs = plan.num_decodes, 0, plan.num_tokens, len(outputs)
        if shape is not None:
            tokens, num_outputs, gap = shape.num_tokens, shape.num_outputs, shape.first_chunk(n) - n
        if gap:
            outputs = np.where(outputs >= n, outputs + gap, outputs)
        self._staging.begin()

        def put(array: npt.NDArray[np.integer], pad: int = 0) -> Tensor:
            if gap:  # decodes and chunks have regions of their own
                array = np.concatenate([array[:n], np.full(gap, pad), array[n:]])
            return self._staging.put(array, tokens, pad)

        inputs = StepInputs(
            ids=put(plan.token_ids),
            positions=put(positions),
            slots=put(slots, self._scratch_slot),
            rows=put(rows),
            outputs=self._staging.put(outputs, num_outputs),
            last_token_rows=self._staging.put(_last_samples(sample_rows, self._scratch_row)),
            sample_rows=sample_rows,
            sample_positions=sample_positions,
        )
        self._staging.send()
        return inputs


def _last_samples(rows: Int32, scratch_row: int) -> Int32:
    """The row of each request's last sample; the scratch row for the samples before it."""
    found = rows.copy()
    found[:-1][rows[:-1] == rows[1:]] = scratch_row
    return found


class PageTable:
    """``[rows, columns]`` page numbers, on the host and on the device; on a CPU they are the same memory.

    The last row is the scratch row: no request's, and filled with the pool's last page, the scratch page.
    """

    def __init__(self, rows: int, columns: int, scratch_page: int, device: torch.device) -> None:
        self.host: Int32 = np.zeros((rows + 1, columns), np.int32)
        self.host[-1] = scratch_page
        self.device = torch.from_numpy(self.host).to(device)
        self._staging = Staging(4096, torch.int64, device)

    def write(self, rows: Int32, columns: Int32, pages: Int32) -> None:
        """``table[rows[i], columns[i]] = pages[i]``, in stream order on the device."""
        if not len(rows):
            return
        self.host[rows, columns] = pages
        if self.device.device.type != "cpu":
            self._staging.begin(2 * len(rows))
            at = self._staging.put(rows.astype(np.int64) * self.host.shape[1] + columns)
            values = self._staging.put(pages)
            self._staging.send()
            self.device.view(-1).index_copy_(0, at, values.int())
