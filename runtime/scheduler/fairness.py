"""Fairness between owners (API keys): the requests of one do not wait until those of another have ended.

Owners share what is scarce by max-min fairness: rows at admission, pages at admission, and the tokens of a step between
prompts. With one owner nothing here has any effect.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from .ledger import Ledger
from .policy import Key, in_order
from .request import Request
from .rows import PREFILL
from .waiting import Columns

_PROMPT_PART = 4  # while several owners have requests, prompts get one part in so many of a step's budget,
_PROMPT_LEAST = 256  # and at least so many tokens: shorter steps compute less in the same time
_FIRST_RUN = 32  # tokens that a retracted request may compute before it can yield again; doubled each time


class Fairness:
    """Divides rows, pages and tokens between the owners of the ledger's requests."""

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger
        self._rows = ledger.rows

    @property
    def contended(self) -> bool:
        """Whether requests of several owners are unfinished."""
        return len(self._ledger.owners) > 1

    def in_order(self, waiting: Columns, keys: Sequence[Key]) -> Iterable[int]:
        """Positions of ``waiting`` in an order that gives the next row to the owner with the fewest. Each owner's keep
        the order of ``keys`` (see `policy.in_order`)."""
        if not self.contended:
            return in_order(keys)
        order = np.lexsort(keys[::-1])
        owner = waiting.owner[order]
        sizes = np.bincount(owner, minlength=len(waiting.owners))
        running = np.array([self._ledger.running[name] for name in waiting.owners])
        by_owner = np.argsort(owner, kind="stable")
        rows = np.empty(len(order), np.int64)  # of its owner, once all that precede the request have one
        rows[by_owner] = np.arange(len(order)) + np.repeat(running - np.cumsum(sizes) + sizes, sizes)
        found: list[int] = order[np.argsort(rows, kind="stable")].tolist()
        return found

    def someone_may_take(self) -> bool:
        """Whether an owner has waiting requests and so few rows that others may have to yield."""
        ledger = self._ledger
        few = self._few_rows
        return self.contended and any(ledger.running[o] < min(n, few) for o, n in ledger.owners.items())

    def yielding(self, request: Request, pages: int, chunked: Iterable[int]) -> Request | None:
        """The running request to retract so that ``request``, which needs ``pages`` more, can be admitted, or None.

        An owner may take up to half of an equal share of rows and pages from owners above an equal share; the other
        half is left to the ends of requests, so that a burst does not retract half of all. The youngest yields, and
        only if it has computed enough since it was last retracted: each request yields a logarithmic number of times.
        ``chunked``: rows that must stay, as the step computes a part of their prompts.
        """
        ledger, rows = self._ledger, self._rows
        owner, total = request.namespace[0], ledger.tree.allocator.total
        count = len(ledger.owners)
        if count < 2 or ledger.running[owner] >= self._few_rows:
            return None
        held: dict[str, int] = {}
        running = ledger.rows.running()
        for each in running:
            name = each.namespace[0]
            held[name] = held.get(name, 0) + int(rows.pages[each.row])
        if held.get(owner, 0) + pages > total // (2 * count):
            return None
        kept = set(chunked)
        most_rows, most_pages = rows.max_rows // count, total // count
        for each in reversed(running):
            name, row = each.namespace[0], each.row
            above = ledger.running[name] > most_rows if not rows.has_free else held[name] > most_pages
            ran = int(rows.length[row] - rows.entered[row])
            if (
                name != owner
                and above
                and row not in kept
                and (not each.retractions or ran >= _FIRST_RUN << min(each.retractions, 20))
            ):
                return each
        return None

    def prompt_budget(self, budget: int) -> int:
        """How many of a step's ``budget`` tokens prompts may have. Less while several owners have requests: the prompts
        of one make each token of the others later by a step's time (stall-free batching, Sarathi-Serve, OSDI 2024)."""
        return min(budget, max(_PROMPT_LEAST, budget // _PROMPT_PART)) if self.contended else budget

    def prompt_shares(self, budget: int) -> dict[str, int]:
        """How many of the step's ``budget`` tokens the running prompts of each owner may have. Empty: no limit."""
        if not self.contended or not np.any(self._rows.phase == PREFILL):
            return {}
        work: dict[str, int] = {}
        rows = self._rows
        for row in rows.in_order(PREFILL).tolist():
            owner = rows.request(row).namespace[0]
            work[owner] = work.get(owner, 0) + int(rows.length[row] - rows.computed[row])
        if rows.has_free or self.someone_may_take():
            for owner, tokens in self._ledger.waiting.work().items():
                work[owner] = work.get(owner, 0) + tokens
        shares: dict[str, int] = {}
        for i, (owner, tokens) in enumerate(sorted(work.items(), key=lambda item: (item[1], item[0]))):
            shares[owner] = min(tokens, budget // (len(work) - i))
            budget -= shares[owner]
        return shares

    @property
    def _few_rows(self) -> int:
        return max(1, self._rows.max_rows // (2 * len(self._ledger.owners)))
