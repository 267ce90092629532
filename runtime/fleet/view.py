"""A router's view of a changing fleet: the replicas, what each has cached, and its load."""

from __future__ import annotations

import hashlib
from collections.abc import Awaitable, Callable, Collection, Mapping
from typing import Any, Generic, NamedTuple, TypeVar

import msgspec
import numpy as np

from .follower import Follower, Sink
from .kv_events import IndexEvent
from .router import FleetRouter, Sent

K = TypeVar("K")


class ReplicaReport(msgspec.Struct, omit_defaults=True):
    """A replica's address and load, sent to routers about once a second."""

    url: str  # of its HTTP server
    kv_events: str  # address
    kv_events_replay: str | None = None
    kv_events_seq: int = -1  # number of the last batch that was published
    block_size: int = 16
    queued_tokens: float = 0.0  # of prompts, to compute
    running: float = 0.0  # requests
    full: bool = False  # its queue takes no more


class RoutingHint(msgspec.Struct, kw_only=True, omit_defaults=True):
    """The facts of a request that routing uses."""

    key: str = ""  # of the request: reports its first output to the router
    prompt_tokens: int = 0
    hashes: list[int] = []  # of its prompt's blocks
    instance: bytes | None = None  # tag of the replica that has its branch or pin; required
    session: str | None = None  # requests with the same one go to the same replica
    preferred: bytes | None = None  # tag of the session's replica, used while it takes requests
    failed: list[bytes] = []  # tags of replicas that have failed this request: others are chosen if there are any


class Choice(NamedTuple, Generic[K]):
    """A chosen replica, and the load counted for the request until it ends."""

    replica: K
    cached_tokens: int
    sent: Sent


SnapshotOf = Callable[[str], Awaitable[bytes]]  # from a replica's URL


class FleetView(Generic[K]):
    """Replicas are identified by keys that the caller chooses. Used on one event loop."""

    def __init__(self, snapshot: SnapshotOf, tag_of: Callable[[K], bytes], block_size: int = 16) -> None:
        """``snapshot(url)``: the body of that replica's snapshot. ``tag_of(key)``: `instance_tag` of its name."""
        self._snapshot, self._tag_of = snapshot, tag_of
        self.router = FleetRouter(block_size)
        self._numbers: dict[K, int] = {}
        self._free: list[int] = []
        self._followers: dict[K, tuple[str, Follower]] = {}

    def __contains__(self, key: K) -> bool:
        return key in self._numbers

    def update(self, members: Mapping[K, ReplicaReport | None]) -> None:
        """Sets the replicas, with their latest reports (None: not reported yet; routed to by load alone)."""
        for key in [key for key in self._numbers if key not in members]:
            self.remove(key)
        for key, report in members.items():
            number = self._numbers.get(key)
            if number is None:
                number = self._numbers[key] = self._free.pop() if self._free else self.router.add()
                self.router.reset(number)
                self.router.unsure[number] = True
            if report is None:
                continue
            self.router.block_size = report.block_size
            self.router.report(number, report.queued_tokens, report.running)
            self.router.allowed[number] = not report.full
            at, follower = self._followers.get(key, ("", None))
            if follower is None or at != report.kv_events:
                if follower is not None:
                    follower.stop()
                follower = self._follow(key, number, report)
            follower.published(report.kv_events_seq)

    def remove(self, key: K) -> None:
        """Removes a replica. No effect if it is unknown."""
        number = self._numbers.pop(key, None)
        if number is None:
            return
        _, follower = self._followers.pop(key, ("", None))
        if follower is not None:
            follower.stop()
        self.router.forget(number)
        self._free.append(number)

    def choose(self, now: float, hint: RoutingHint, among: Collection[K]) -> Choice[K] | None:
        """The replica for a request, of the known ones in ``among``; None if there is none.

        A request on a branch or a pin goes to the replica that made it, and nowhere else. A session goes to the replica
        that it prefers, or else to that of highest random weight (rendezvous hashing): every router chooses the same
        one without talking to others.
        """
        numbers = {number: key for key in among if (number := self._numbers.get(key)) is not None}
        if hint.instance is not None:
            keys = [key for key in numbers.values() if self._tag_of(key) == hint.instance]
            return self._sent(keys[0], hint) if keys else None
        if not numbers:
            return None
        if hint.failed:
            numbers = {
                number: key for number, key in numbers.items() if self._tag_of(key) not in hint.failed
            } or numbers
        known = np.zeros(len(self.router), np.bool_)
        known[list(numbers)] = True
        usable = known & self.router.allowed
        if not usable.any():  # all are full: one of them makes the request wait, or refuses it
            usable = known
        if hint.session is not None:
            session, keys = hint.session.encode(), [numbers[number] for number in np.flatnonzero(usable).tolist()]
            preferred = [key for key in keys if self._tag_of(key) == hint.preferred] or keys
            weight = {key: hashlib.blake2b(session + self._tag_of(key)).digest() for key in preferred}
            return self._sent(max(preferred, key=weight.__getitem__), hint)
        number, cached = self.router.choose(now, hint.prompt_tokens, hint.hashes, usable)
        return Choice(numbers[number], cached, self.router.sent(number, hint.prompt_tokens, cached, hint.hashes))

    def _sent(self, key: K, hint: RoutingHint) -> Choice[K]:
        number = self._numbers[key]
        cached = int(self.router.cached(hint.prompt_tokens, hint.hashes)[number])
        return Choice(key, cached, self.router.sent(number, hint.prompt_tokens, cached, hint.hashes))

    def started(self, choice: Choice[Any]) -> None:
        """The request's first output has come."""
        self.router.started(choice.sent)

    def ended(self, choice: Choice[Any]) -> None:
        """The request has ended. May be called more than once, and after its replica is gone."""
        self.router.ended(choice.sent)

    def withdrawn(self, choice: Choice[Any]) -> None:
        """The chosen replica did not take the request."""
        self.router.withdrawn(choice.sent)

    def close(self) -> None:
        """Stops following all replicas."""
        for key in list(self._numbers):
            self.remove(key)

    def _follow(self, key: K, number: int, report: ReplicaReport) -> Follower:
        follower = Follower(
            report.kv_events,
            report.kv_events_replay,
            lambda: self._snapshot(report.url),
            _Events(self.router, number),
        )
        self._followers[key] = report.kv_events, follower
        follower.start()
        return follower


class _Events(Sink):
    """One replica's events into the router's index."""

    def __init__(self, router: FleetRouter, number: int) -> None:
        self._router, self._number = router, number

    def apply(self, events: list[IndexEvent]) -> None:
        self._router.index.apply(self._number, events)

    def reset(self) -> None:
        self._router.index.clear(self._number)

    def sure(self, sure: bool) -> None:
        self._router.unsure[self._number] = not sure
