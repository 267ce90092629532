"""A step's arrays on the device: one packed copy, at addresses that captured steps read."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ...kernels.attention.base import AttentionBatch, StepShape
from ...kernels.staging import Staging
from ..step import Int32, Int64, StepPlan


@dataclass(slots=True)
class StepInputs:
    """int64 on the device. T query tokens, padding included."""

    ids: Tensor  # [T], PENDING stands for the row's last token
    positions: Tensor  # [T]
    slots: Tensor  # [T]
    rows: Tensor  # [T], page-table row of each token
    outputs: Tensor  # [O], query tokens whose hidden states are computed: the samples come first, in order
    last_token_rows: Tensor  # [S], the row whose last token the sample becomes; else the scratch row


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
        positions = np.arange(plan.num_tokens) + np.repeat(plan.kv_lens - plan.q_lens - plan.query_starts, plan.q_lens)
        slots = batch.query_slots()
        rows = np.repeat(plan.rows, plan.q_lens)
        outputs = np.concatenate([plan.samples.astype(np.int64), *extra_outputs])
        tokens, num_outputs = plan.num_tokens, len(outputs)
        if shape is not None:
            tokens, num_outputs = shape.num_tokens, shape.num_outputs
            chunks = shape.first_chunk(plan.num_decodes)
            outputs = np.where(outputs >= plan.num_decodes, outputs + (chunks - plan.num_decodes), outputs)
        self._staging.begin()

        def put(array: npt.NDArray[np.integer], pad: int = 0) -> Tensor:
            if shape is not None:  # decodes and chunks have regions of their own
                n, given = plan.num_decodes, array
                array = np.full(tokens, pad, np.int64)
                array[:n] = given[:n]
                array[chunks : chunks + len(given) - n] = given[n:]
            return self._staging.put(array)

        inputs = StepInputs(
            ids=put(plan.token_ids),
            positions=put(positions),
            slots=put(slots, self._scratch_slot),
            rows=put(rows),
            outputs=self._staging.put(outputs, num_outputs),
            last_token_rows=self._staging.put(_last_token_rows(plan, self._scratch_row)),
        )
        self._staging.send()
        return inputs


def _last_token_rows(plan: StepPlan, scratch_row: int) -> Int64:
    """The page-table row of each request's last sample; the scratch row for the samples before it."""
    rows = plan.rows[plan.sampled_requests].astype(np.int64)
    rows[:-1][rows[:-1] == rows[1:]] = scratch_row
    return rows


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
