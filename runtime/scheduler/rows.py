"""Running requests as arrays, one row each, so that planning a decode step touches arrays and no request objects."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from ..step import PENDING, Int32
from .request import Request

FREE, PREFILL, DECODE = 0, 1, 2


class Rows:
    """Structure of arrays over the rows of the page table, each [max_rows].

    For a running request ``computed <= length``. Tokens below ``computed`` have their KV written or scheduled.
    ``length`` counts all its tokens, also those sampled on the device and not yet read by the host. In PREFILL all of
    them are known; in DECODE ``length == computed + 1``: only the last token has no KV yet.
    """

    def __init__(self, max_rows: int) -> None:
        self.max_rows = max_rows
        self.phase = np.zeros(max_rows, dtype=np.int8)
        self.computed = np.zeros(max_rows, dtype=np.int32)
        self.length = np.zeros(max_rows, dtype=np.int32)
        self.limit = np.zeros(max_rows, dtype=np.int32)
        self.prompt_len = np.zeros(max_rows, dtype=np.int32)
        self.pages = np.zeros(max_rows, dtype=np.int32)  # pages in the row's lease
        # Pages that would become available if it ended, when last looked up; 0: not looked up yet.
        self.exclusive = np.zeros(max_rows, dtype=np.int32)
        self.entered = np.zeros(max_rows, dtype=np.int32)  # tokens that it had when it was admitted
        self.last_token = np.zeros(max_rows, dtype=np.int32)  # the next input token; PENDING: only on the device so far
        self.order = np.zeros(max_rows, dtype=np.int64)  # admission number: smaller is older; 0: free
        self.constrained = np.zeros(max_rows, dtype=np.bool_)  # the request has a matcher
        self.blocked = np.zeros(max_rows, dtype=np.bool_)  # must not decode until its next mask is known
        self.requests: list[Request | None] = [None] * max_rows
        self._free = list(range(max_rows - 1, -1, -1))
        self._admissions = 0

    def __len__(self) -> int:
        return self.max_rows - len(self._free)

    @property
    def has_free(self) -> bool:
        return bool(self._free)

    def take(self, request: Request, computed: int) -> int:
        """Assigns a free row to ``request``, of whose tokens ``computed`` have KV. Returns the row."""
        row = self._free.pop()
        self.requests[row] = request
        self.phase[row] = PREFILL
        self.computed[row] = computed
        self.length[row] = request.num_tokens
        self.limit[row] = request.limit
        self.prompt_len[row] = request.prompt_len
        self.pages[row] = 0
        self.exclusive[row] = 0
        self.entered[row] = request.num_tokens
        self.last_token[row] = PENDING
        self.constrained[row] = request.matcher is not None
        self.blocked[row] = False
        self._admissions += 1
        self.order[row] = self._admissions
        return row

    def lengthen(self, request: Request) -> None:
        """A decoding request was given more known tokens (jump-forward): they are computed like a prompt's."""
        row = request.row
        self.phase[row] = PREFILL
        self.length[row] = request.num_tokens
        self.last_token[row] = PENDING  # the token sampled after them comes next

    def give_back(self, row: int) -> None:
        """Frees the row for immediate reuse. Steps in flight may still use it on the device, but they run before
        any later step, and results are matched by request, never by row."""
        self.requests[row] = None
        self.phase[row] = FREE
        self.order[row] = 0
        self.pages[row] = 0
        self._free.append(row)

    def in_order(self, phase: int) -> Int32:
        """Rows in ``phase``, int32 [n], oldest admission first."""
        rows = np.flatnonzero(self.phase == phase).astype(np.int32)
        return rows[np.argsort(self.order[rows], kind="stable")]

    def active(self) -> npt.NDArray[np.int64]:
        """Rows of running requests, int64 [n], in no particular order."""
        return np.flatnonzero(self.phase != FREE)

    def request(self, row: int) -> Request:
        request = self.requests[row]
        if request is None:
            raise LookupError(f"row {row} is free")
        return request

    def running(self) -> list[Request]:
        """Running requests, oldest admission first."""
        rows = self.active()
        return [self.request(row) for row in rows[np.argsort(self.order[rows], kind="stable")].tolist()]
