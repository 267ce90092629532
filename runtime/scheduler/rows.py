"""The running requests, one row each, as arrays: planning a decode step touches arrays, not requests."""

from __future__ import annotations

import numpy as np

from ..step import PENDING, Int32
from .request import Request

FREE, PREFILL, DECODE = 0, 1, 2


class Rows:
    """Structure of arrays over the rows of the page table, [max_rows] each.

    For a running request: ``computed <= length``. Tokens below ``computed`` have their KV written or scheduled;
    ``length`` counts its tokens, those sampled but not yet known to the host included. In PREFILL, all of
    them are known; in DECODE, ``length == computed + 1``: exactly the last token still has no KV.
    """

    def __init__(self, max_rows: int) -> None:
        self.max_rows = max_rows
        self.phase = np.zeros(max_rows, dtype=np.int8)
        self.computed = np.zeros(max_rows, dtype=np.int32)
        self.length = np.zeros(max_rows, dtype=np.int32)
        self.limit = np.zeros(max_rows, dtype=np.int32)
        self.prompt_len = np.zeros(max_rows, dtype=np.int32)
        self.held = np.zeros(max_rows, dtype=np.int32)  # pages in the row's lease
        self.last_token = np.zeros(max_rows, dtype=np.int32)  # the token to feed next, or PENDING
        self.order = np.zeros(max_rows, dtype=np.int64)  # admission number: smaller is older
        self.constrained = np.zeros(max_rows, dtype=np.bool_)  # the request has a matcher
        self.blocked = np.zeros(max_rows, dtype=np.bool_)  # and must not decode before it knows what may come next
        self.requests: list[Request | None] = [None] * max_rows
        self._free = list(range(max_rows - 1, -1, -1))
        self._admissions = 0

    def __len__(self) -> int:
        return self.max_rows - len(self._free)

    @property
    def has_free(self) -> bool:
        return bool(self._free)

    def take(self, request: Request, computed: int) -> int:
        """Gives ``request`` a row; ``computed`` of its tokens already have KV."""
        row = self._free.pop()
        self.requests[row] = request
        self.phase[row] = PREFILL
        self.computed[row] = computed
        self.length[row] = request.num_tokens
        self.limit[row] = request.limit
        self.prompt_len[row] = request.prompt_len
        self.held[row] = 0
        self.last_token[row] = PENDING
        self.constrained[row] = request.matcher is not None
        self.blocked[row] = False
        self._admissions += 1
        self.order[row] = self._admissions
        return row

    def lengthen(self, request: Request) -> None:
        """A decoding row's request has got more known tokens: they are computed like a prompt's."""
        row = request.row
        self.phase[row] = PREFILL
        self.length[row] = request.num_tokens
        self.last_token[row] = PENDING  # the one drawn after them comes next

    def give_back(self, row: int) -> None:
        """The row is reusable at once: whatever a step in flight still does to it on the device comes before
        anything a later step does, and results are matched by request, never by row."""
        self.requests[row] = None
        self.phase[row] = FREE
        self.held[row] = 0
        self._free.append(row)

    def in_order(self, phase: int) -> Int32:
        """Rows in ``phase``, oldest admission first."""
        rows = np.flatnonzero(self.phase == phase).astype(np.int32)
        return rows[np.argsort(self.order[rows], kind="stable")]

    def request(self, row: int) -> Request:
        request = self.requests[row]
        if request is None:
            raise LookupError(f"row {row} is free")
        return request

    def running(self) -> list[Request]:
        """Running requests, oldest admission first."""
        rows = np.flatnonzero(self.phase != FREE)
        return [self.request(row) for row in rows[np.argsort(self.order[rows], kind="stable")].tolist()]
