"""How many pages running requests will need, step by step, until each of them ends.

Adding up the growth of all of them, as if none ended before the others have grown, keeps short requests out of a pool
that is mostly free. So the need is simulated at the moment of each end (as in the Past-Future scheduler, ASPLOS 2025,
by the authors of LightLLM). The same simulation tells when a request that does not fit can start; until then a later
one may go first only if it ends before that (EASY backfilling, Lifka 1995).
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from .estimator import OutputEstimator
from .ledger import Ledger

NEVER = 1 << 40  # steps
_REFRESH = 16  # running requests whose exclusive pages are counted again for each forecast
_GROUPS = 16  # requests that end near each other are taken to end together, in as many groups

Ints = npt.NDArray[np.int64]


class Forecast:
    """The pages in use, beyond those in use now, until each running request has ended.

    Times are steps from now: a decoding request grows by a token a step. The arguments are arrays [n]: tokens now,
    tokens at the expected end, pages now, and pages that become available when the request ends.
    """

    def __init__(self, length: Ints, expected: Ints, pages: Ints, exclusive: Ints, page_size: int) -> None:
        self._page_size = page_size
        self._requests = np.stack([length, expected, pages, exclusive])
        self._simulate()

    def _simulate(self) -> None:
        """Sorts the requests by their ends, and counts the pages just before each group of them ends."""
        length, expected = self._requests[:2]
        self._requests = self._requests[:, np.argsort(expected - length, kind="stable")]
        length, expected, _, exclusive = self._requests
        count = min(length.size, _GROUPS)
        self._first = np.arange(count + 1) * length.size // max(1, count)  # of each group, and the number of requests
        self._ends = (expected - length)[self._first[1:] - 1]  # a group ends with its last
        self._freed = np.concatenate(([0], np.cumsum(exclusive)))[self._first]  # before each group, and after all
        ended = np.arange(length.size) < self._first[:-1, None]
        self._need = np.where(ended, 0, self._growth(self._ends[:, None])).sum(axis=1) - self._freed[:-1]

    def _growth(self, steps: Ints | int, first: int = 0) -> Ints:
        """Pages more than now of each request from ``first`` on, if it is still running after so many steps."""
        length, expected, pages, _ = self._requests[:, first:]
        growth: Ints = np.maximum(-(-np.minimum(length + steps, expected) // self._page_size) - pages, 0)
        return growth

    def peak(self, length: int, expected: int, have: int) -> int:
        """The most pages in use, beyond those in use now, until a request of ``length`` tokens that starts now ends
        with ``expected`` tokens. ``have``: its pages that are in use already."""
        steps = expected - length
        group = int(np.searchsorted(self._ends, steps))
        own = -(-(length + self._ends[:group]) // self._page_size) - have
        at_end = int(self._growth(steps, self._first[group]).sum() - self._freed[group]) + -(
            -expected // self._page_size
        )
        return max(at_end - have, int((self._need[:group] + np.maximum(own, 0)).max(initial=0)))

    def add(self, length: int, expected: int, pages: int, taken: int) -> None:
        """The request has started and has ``pages``; ``taken``: how many fewer are available since."""
        added = np.array([[length], [expected], [pages], [taken]])
        self._requests = np.concatenate((self._requests, added), axis=1)
        self._simulate()

    def start_of(self, pages: int, available: int) -> int:
        """Steps until so many pages are available. If they never are: until everything that runs now has ended."""
        if not self._ends.size:
            return 0
        after = np.append(self._need[1:], -self._freed[-1])
        enough = np.flatnonzero(after + pages <= available)
        return int(self._ends[enough[0]] if len(enough) else self._ends[-1])


class Reservations:
    """The pages reserved for running requests, while steps admit others beside them. `begin` it for each step."""

    def __init__(self, ledger: Ledger, estimator: OutputEstimator) -> None:
        self._ledger = ledger
        self._estimator = estimator
        self._page_size = ledger.page_size
        self._growth = 0  # pages of all running requests, as if none ended before the others
        self._forecast: Forecast | None = None
        self._cursor = 0

    def begin(self) -> None:
        """Takes the running requests as they are now."""
        self._growth = self._estimator.expected_pages(self._ledger.rows, self._page_size)
        self._forecast = None

    @property
    def forecast(self) -> Forecast:
        """Made only where pages are short: it costs more than the sum."""
        if self._forecast is None:
            rows = self._ledger.rows
            active = rows.active()
            self._count_exclusive(active)
            length, expected = rows.length[active].astype(np.int64), self._estimator.expected_lengths(rows, active)
            self._forecast = Forecast(
                length,
                np.maximum(expected, length),
                rows.pages[active].astype(np.int64),
                rows.exclusive[active].astype(np.int64),
                self._page_size,
            )
        return self._forecast

    def _count_exclusive(self, active: Ints) -> None:
        """Counts the exclusive pages of some of the requests again, in turn: counting all took half a millisecond."""
        ledger, count = self._ledger, len(active)
        for i in range(min(_REFRESH, count)):
            row = int(active[(self._cursor + i) % count])
            ledger.rows.exclusive[row] = ledger.tree.exclusive(ledger.lease(ledger.rows.request(row)))
        self._cursor += _REFRESH

    def demand(self, length: int, expected: int, have: int) -> int:
        """Pages that must be available to admit a request. Arguments as of `Forecast.peak`."""
        total = -(-max(length, expected) // self._page_size) - have + self._growth
        return total if total <= self._ledger.tree.available else min(total, self.forecast.peak(length, expected, have))

    def add(self, length: int, expected: int, pages: int, taken: int) -> None:
        """A request was admitted. Arguments as of `Forecast.add`."""
        self._growth += max(0, -(-expected // self._page_size) - pages)
        if self._forecast is not None:
            self._forecast.add(length, expected, pages, taken)
