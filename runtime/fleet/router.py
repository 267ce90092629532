"""One router: its index, its estimate of each replica's load, its choices. No I/O, and no clock: callers pass times."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from .choice import DEFAULT_WEIGHTS, Loads, Weights, choose
from .index import InFlightBlocks, PrefixIndex

WINDOW = 300.0  # seconds over which work counts as recent
_MEAN_RATE = 0.01  # of the running mean of prompt lengths


@dataclass(slots=True, eq=False)
class Sent:
    """A request that this router has sent to a replica. Counted until `FleetRouter.ended`, or until the replica is
    removed."""

    replica: int
    queued: float  # tokens still to be computed before its first token
    blocks: Sequence[int]  # hashes of its prompt's blocks that no event had announced


class FleetRouter:
    """Chooses replicas, numbered 0 .. n - 1, by `choice.choose`.

    The load of a replica is this router's unfinished requests to it, and what the replica's last report shows beyond
    those: other routers' requests. ``index`` follows the replicas' events. A replica is *unsure* while events of
    it are missing: it counts as having nothing cached. ``seed``: of the order in which replicas of equal cost and
    recent work are chosen; by default every router has another.
    """

    def __init__(
        self, block_size: int, replicas: int = 0, weights: Weights = DEFAULT_WEIGHTS, seed: int | None = None
    ) -> None:
        self.block_size = block_size
        self.index = PrefixIndex()
        self.unsure = np.zeros(0, np.bool_)
        self.allowed = np.zeros(0, np.bool_)  # may be chosen: neither dead, draining nor full
        self._weights = weights
        self._random = random.Random(seed)
        self._in_flight = InFlightBlocks()
        self._unfinished: list[set[Sent]] = []  # by replica
        self._order = np.zeros(0)  # breaks ties: the lowest is chosen
        self._loads = np.zeros((5, 0))  # own queued, own running, others' queued, others' running, recent
        self._mean_prompt = 0.0
        self._decayed = 0.0  # seconds: when ``recent`` was last decayed
        for _ in range(replicas):
            self.add()

    def __len__(self) -> int:
        return len(self.allowed)

    def add(self) -> int:
        """Adds a replica and returns its number.

        It starts with the mean recent work of the others: with none, it would get every new prompt.
        """
        number = len(self)
        column = np.zeros((5, 1))
        column[4] = self._loads[4][self.allowed].mean() if self.allowed.any() else 0.0
        self._loads = np.concatenate((self._loads, column), axis=1)
        self._order = np.append(self._order, self._random.random())
        self.unsure = np.append(self.unsure, False)
        self.allowed = np.append(self.allowed, True)
        self._unfinished.append(set())
        return number

    def forget(self, replica: int) -> None:
        """Removes a replica. Its number is unused until `reset`. Its requests no longer count: those of a replica that
        drains go on, and would otherwise count for the next one with its number."""
        self.index.clear(replica)
        for sent in tuple(self._unfinished[replica]):
            self.ended(sent)
        self._loads[:, replica] = 0.0
        self.allowed[replica] = False

    def reset(self, replica: int) -> None:
        """Gives a removed replica's number to a new one."""
        self.forget(replica)
        if self.allowed.any():
            self._loads[4, replica] = self._loads[4][self.allowed].mean()
        self.allowed[replica], self.unsure[replica] = True, False

    def cached(self, prompt_tokens: int, hashes: Sequence[int]) -> npt.NDArray[np.int64]:
        """Tokens of a prompt that each replica has cached, whole blocks: int64 [n]. Those that it has below its device
        count less, since they must be copied: see `index.CREDITS`. Those of a prompt that this router has sent there
        count as cached: the replica computes them before, and they count in its queue."""
        found = self.index.credit(hashes, len(self), self._in_flight.holders)
        found = (found * self.block_size).astype(np.int64)
        found[self.unsure] = 0
        return np.minimum(found, prompt_tokens)

    def choose(
        self, now: float, prompt_tokens: int, hashes: Sequence[int], allowed: npt.NDArray[np.bool_] | None = None
    ) -> tuple[int, int]:
        """The replica for a prompt, and the tokens of it that are cached there. ``allowed`` bool [n]: those that may be
        chosen, by default `allowed`. Raises ValueError if there is none."""
        cached = self.cached(prompt_tokens, hashes)
        self._decay(now)
        may = self.allowed if allowed is None else allowed
        own_queued, own_running, queued, running, recent = self._loads
        loads = Loads(own_queued + queued, own_running + running, recent)
        mean = self._mean_prompt or float(prompt_tokens)
        replica = choose(prompt_tokens, cached, loads, mean, may, self._weights, self._order)
        return replica, int(cached[replica])

    def sent(self, replica: int, prompt_tokens: int, cached_tokens: int, hashes: Sequence[int] = ()) -> Sent:
        """Counts a request that was sent to a replica, until `started` and `ended`, or only `ended`, or `withdrawn`.
        ``hashes``: of its prompt's blocks."""
        computed, blocks = float(prompt_tokens - cached_tokens), hashes[cached_tokens // self.block_size :]
        self._in_flight.add(replica, blocks)
        self._loads[0, replica] += computed
        self._loads[4, replica] += computed
        self._mean_prompt += (_MEAN_RATE if self._mean_prompt else 1.0) * (prompt_tokens - self._mean_prompt)
        sent = Sent(replica, computed, blocks)
        self._unfinished[replica].add(sent)
        return sent

    def started(self, sent: Sent) -> None:
        """The request's first token has arrived: its prompt is computed."""
        if sent in self._unfinished[sent.replica] and sent.queued >= 0:
            self._loads[0, sent.replica] -= sent.queued
            self._loads[1, sent.replica] += 1
            sent.queued = -1.0

    def ended(self, sent: Sent) -> None:
        """The request has finished or failed. Idempotent; without effect once the replica is removed."""
        if sent in self._unfinished[sent.replica]:
            self._unfinished[sent.replica].remove(sent)
            self._in_flight.remove(sent.replica, sent.blocks)
            row, amount = (0, sent.queued) if sent.queued >= 0 else (1, 1.0)
            self._loads[row, sent.replica] -= amount

    def withdrawn(self, sent: Sent) -> None:
        """The replica did not take the request, so it has not computed the prompt: it does not count as recent work
        either."""
        if sent in self._unfinished[sent.replica]:
            self._loads[4, sent.replica] = max(0.0, self._loads[4, sent.replica] - max(0.0, sent.queued))
            self.ended(sent)

    def report(self, replica: int, queued: float, running: float) -> None:
        """A replica's report: prompt tokens to compute, and running requests. The excess over this router's own was
        sent by other routers."""
        self._loads[2, replica] = max(0.0, queued - self._loads[0, replica])
        self._loads[3, replica] = max(0.0, running - self._loads[1, replica])

    def _decay(self, now: float) -> None:
        if now > self._decayed:
            self._loads[4] *= math.exp((self._decayed - now) / WINDOW)
            self._decayed = now
