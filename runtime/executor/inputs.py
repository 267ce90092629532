"""A step's arrays on the device: one packed copy, at addresses that a captured step can rely on."""

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

    ids: Tensor  # [T], PENDING where the row's last token is meant
    positions: Tensor  # [T]
    slots: Tensor  # [T]
    rows: Tensor  # [T], page-table row of each token
    outputs: Tensor  # [O], query tokens whose hidden states are wanted: those that sample, in order, come first
    sampled_rows: Tensor  # [S], page-table rows that sample


class InputStaging:
    """Lays out and copies the inputs of one step after another.

    Args:
        device: where the steps run.
        scratch_slot: where padding tokens write their keys and values.
        max_tokens, max_requests: the most of a step, padding included. The buffer never moves: graphs read it.
    """

    def __init__(self, device: torch.device, scratch_slot: int, max_tokens: int, max_requests: int) -> None:
        # Four arrays of all tokens; outputs, which may be every token too; rows.
        self._staging = Staging(5 * max_tokens + 3 * max_requests, torch.int64, device)
        self._scratch_slot = scratch_slot

    def stage(
        self, plan: StepPlan, batch: AttentionBatch, shape: StepShape | None, extra_outputs: list[Int64]
    ) -> StepInputs:
        """``shape``: padded to it. ``extra_outputs``: more query tokens whose hidden states are wanted."""
        starts = np.cumsum(plan.q_lens, dtype=np.int64) - plan.q_lens  # first query token of each request
        positions = np.arange(plan.num_tokens) + np.repeat(plan.kv_lens - plan.q_lens - starts, plan.q_lens)
        slots = batch.query_slots()
        rows = np.repeat(plan.rows, plan.q_lens)
        outputs = np.concatenate([(starts + plan.q_lens - 1)[plan.samples], *extra_outputs])
        tokens, num_outputs = plan.num_tokens, len(outputs)
        if shape is not None:
            tokens, num_outputs = shape.num_tokens, shape.num_outputs
            outputs = np.where(outputs >= plan.num_decodes, outputs + (shape.decodes - plan.num_decodes), outputs)
        self._staging.begin()

        def put(array: npt.NDArray[np.integer], pad: int = 0) -> Tensor:
            if shape is not None:  # decodes and chunks have regions of their own
                n, given = plan.num_decodes, array
                array = np.full(tokens, pad, np.int64)
                array[:n] = given[:n]
                array[shape.decodes : shape.decodes + len(given) - n] = given[n:]
            return self._staging.put(array)

        inputs = StepInputs(
            ids=put(plan.token_ids),
            positions=put(positions),
            slots=put(slots, self._scratch_slot),
            rows=put(rows),
            outputs=self._staging.put(outputs, num_outputs),
            sampled_rows=self._staging.put(plan.rows[plan.samples]),
        )
        self._staging.send()
        return inputs


class PageTable:
    """``[rows, columns]`` page numbers, on the host and on the device; on a CPU they are the same memory.

    The last row belongs to no request: it names the pool's last page, which nobody owns.
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
