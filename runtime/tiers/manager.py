"""Which pages move between tiers, and which requests wait for them. Deterministic, on the scheduler's thread.

Everything that happens outside comes in through `poll`, whose result is an input of the planner (`apply`), and goes out
through `begin`. So a plan stays a function of its inputs.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import islice

from ...radix.moves import FULL, Reach, Transfer
from ...radix.node import DEVICE, DISK, HOST, Int32, Namespace, Node, Root
from ...radix.tree import RadixTree
from ..config import Preemption
from ..messages import Stats
from .copies import Ended, HostCopier, HostCopies
from .disk import DiskTier
from .gate import Gate
from .jobs import DiskJobs
from .none import NoTiers, Reason, Request, Served

logger = logging.getLogger(__name__)

_LOADS = 16  # transfers at once
_MOST_PAGES = 1024  # of one transfer: the first pages of a long prompt arrive while the rest is on its way
_ATTEMPTS = 8  # transfers in a row that bring a request no further: what arrives may be evicted before it is admitted
_VICTIMS = 8  # leaves of a nearly full host that are looked at, to be written to the disk
_LATE = 1.0  # seconds after which a copy is late, beyond four times its estimate
_SWAP_LATE = 60.0  # the same for a request that was preempted with --preemption swap
_WRITE_QUEUE = 4096  # prefixes queued for the disk


@dataclass(slots=True)
class Wait:
    """A queued request whose prefix is in lower tiers."""

    device: int  # tokens on the device when it was first looked up
    host: int
    disk: int
    transfer: Transfer | None = None
    claim: int = 0  # pages that it needs once its copies have arrived: others' copies must leave room for them
    deadline: float = 0.0
    attempts: int = 0
    missing: int = 0  # tokens left to copy at the last attempt, those on the disk twice
    reason: Reason = ""


class TierManager(NoTiers):
    """Made by the engine if there is a lower tier. ``now``: the scheduler's clock, in seconds."""

    exist = True

    def __init__(
        self,
        tree: RadixTree,
        host: HostCopier,
        disk: DiskTier | None,
        preemption: Preemption,
        now: Callable[[], float],
    ) -> None:
        self._tree = tree
        self._now = now
        self._host = host
        self._disk = disk
        self._preemption: Preemption = preemption
        self.gate = Gate(host.page_bytes, tree.page_size)
        self.tokens = {HOST: 0, DISK: 0}  # served to requests so far
        self.failures = 0  # copies that did not arrive whole
        self.late = 0  # waits given up
        self._ids: dict[int, Transfer] = {}
        self._next_id = 0
        self._distrusted: set[int] = set()
        self._loads: list[int] = []  # begun since `begin`
        self._disk_jobs: deque[tuple[int, int]] = deque()  # (calls of `store` whose copies must be made first, id)
        self._stores = 0
        self._waits: dict[int, Wait] = {}
        self._to_write: deque[tuple[Namespace, Int32]] = deque(maxlen=_WRITE_QUEUE)
        self._leaves: list[Node] | None = None  # what is left to write, once the engine stops
        self._step_ended: float | None = None  # None: the engine was idle since
        self.jobs = None if disk is None else DiskJobs(tree, disk, self._new_id, self._persist)
        if self.jobs is not None:
            self.jobs.compare_ranks()

    @property
    def busy(self) -> bool:
        """Whether copies are under way that requests may be waiting for."""
        return bool(self._ids) or (self.jobs is not None and self.jobs.busy)

    # ---- inputs ----

    def poll(self) -> list[Ended]:
        """The copies that have ended, for `apply`. Starts disk jobs whose host slots are ready."""
        ended = self._host.ended()
        if self._disk is not None and self._tree.structure.disk is not None:
            self._disk.delete(self._tree.structure.disk.take_freed())
            stored = self._host.stored()
            while self._disk_jobs and self._disk_jobs[0][0] <= stored:
                _, id = self._disk_jobs.popleft()
                if not self._start(id, self._ids[id]):
                    ended.append(Ended(id, 0, 0.0))
            ended += self._disk.ended()
        return ended

    def apply(self, ended: Sequence[Ended]) -> None:
        """Copies have ended: what arrived can be matched, what failed is a miss."""
        for end in ended:
            if self.jobs is not None and self.jobs.apply(end):
                continue
            transfer = self._ids.pop(end.id)
            if end.id in self._distrusted:
                self._distrusted.discard(end.id)
                end = end._replace(good=0, damaged=transfer.source == HOST)
            if end.good < len(transfer.target_slots):
                self.failures += 1
                if transfer.target == DISK:  # full, or failing: what is queued would fail too
                    self._to_write.clear()
                    self._leaves = None if self._leaves is None else []
            if transfer.target != DISK:
                self.gate.read(transfer.source, end.good, end.seconds)
            self._tree.end_transfer(transfer, end.good, end.damaged)
        if self._disk is not None and not any(each.target == DISK for each in self._ids.values()):
            self._write_next()

    def step_ended(self, prompt_tokens: int, tokens: int) -> None:
        """A step of ``tokens`` has ended, of which ``prompt_tokens`` of prompts."""
        now = self._now()
        if self._step_ended is not None:
            self.gate.computed(prompt_tokens, tokens, now - self._step_ended)
        self._step_ended = now

    def idle(self) -> None:
        """No step is running."""
        self._step_ended = None

    def distrust(self) -> None:
        """Discards copies under way: pages on the device, or copied from it lately, may be corrupt."""
        self._distrusted |= self._ids.keys()
        self._tree.take_stores()

    def count(self, totals: Stats) -> None:
        """Sets the counters of the lower tiers."""
        for tier in self._tree.structure.tiers:
            if tier.number == HOST:
                totals.host_pages_total, totals.host_pages_cached = tier.slots.total, tier.cached
            elif tier.number == DISK:
                totals.disk_pages_total, totals.disk_pages_cached = tier.slots.total, tier.cached
        totals.host_tokens, totals.disk_tokens = self.tokens[HOST], self.tokens[DISK]
        totals.tier_failures, totals.tier_late = self.failures, self.late

    # ---- requests ----

    def should_wait(self, request: Request) -> bool:
        """Whether a queued request that fits waits for a copy, which is begun if need be. If not, it is admitted with
        what is on the device and computes the rest."""
        now, wait = self._now(), self._waits.get(request.id)
        if wait is not None and wait.transfer is not None:
            if wait.transfer in self._tree.moves.active:
                if now < wait.deadline:
                    return True
                self.late += 1
                wait.reason, wait.transfer, wait.attempts, wait.claim = "late", None, _ATTEMPTS, 0
                return False
            wait.transfer = None
        if wait is not None and wait.attempts >= _ATTEMPTS:
            wait.claim = 0
            return False
        swapped = request.retractions > 0
        if swapped and self._preemption == "recompute":
            return False
        reach = self._tree.reach(request.tokens, request.namespace, request.reuse_limit)
        if wait is None or not wait.host + wait.disk:
            wait = self._waits[request.id] = Wait(reach.device, reach.host, reach.disk)
        if not reach.nodes:
            return False
        must = swapped and self._preemption == "swap"
        estimate = self.gate.seconds(*self._pages(reach), self._queued())
        if reach.transfer is None:
            if len(self._ids) >= _LOADS:
                wait.deadline = wait.deadline or now + _LATE + 4 * estimate
                return now < wait.deadline
            if self._crowded(wait, len(request.tokens)):
                return True
        wait.transfer = reach.transfer or self._copy(request, reach, wait, must)
        if wait.transfer is None:
            return False
        missing = reach.host + 2 * reach.disk
        wait.attempts = 1 if missing < wait.missing else wait.attempts + 1
        wait.missing = missing
        wait.claim = -(-len(request.tokens) // self._tree.page_size)
        wait.deadline = now + (_SWAP_LATE if must else _LATE) + 4 * estimate
        return True

    def served(self, request: Request, hit: int) -> Served:
        """The tiers from which an admitted request's ``hit`` tokens came."""
        wait = self._waits.get(request.id)
        if wait is None:
            return Served()
        wait.claim = wait.attempts = 0
        lower = max(0, hit - wait.device)
        host = min(lower, wait.host)
        served = Served(host, lower - host, wait.reason if hit < wait.device + wait.host + wait.disk else "")
        self.tokens[HOST] += served.host
        self.tokens[DISK] += served.disk
        return served

    def used(self, namespace: Namespace, prefix: Int32) -> None:
        """A request reuses a prefix: what is used twice is worth writing to the disk."""
        if self._disk is not None and len(prefix) and self._disk.keeps(namespace):
            self._to_write.append((namespace, prefix))

    def forget(self, request_id: int) -> None:
        """The request has ended."""
        self._waits.pop(request_id, None)

    def _crowded(self, wait: Wait, tokens: int) -> bool:
        """Whether copies of others would have to be evicted for this one before they are used. Never while nothing is
        under way: two requests whose copies were evicted again would wait for each other."""
        if not self._ids:
            return False
        claimed = sum(each.claim for each in self._waits.values() if each is not wait)
        under_way = sum(len(each.target_slots) for each in self._ids.values() if each.target == DEVICE)
        room = self._tree.available + under_way
        return claimed > 0 and claimed - (-tokens // self._tree.page_size) > room

    def _copy(self, request: Request, reach: Reach, wait: Wait, must: bool) -> Transfer | None:
        """Starts to copy the part after the device's from lower tiers. None: the request computes it instead."""
        room = self._tree.available
        missing = -(-(len(request.tokens) - reach.device) // self._tree.page_size)
        if missing > room:
            wait.reason = "full"
            return None  # it does not fit beside what runs: loading could only evict what others use
        if not must and not self.gate.pays(reach.host + reach.disk, *self._pages(reach), self._queued()):
            wait.reason = "slower"
            return None
        fetch = self._tree.moves.fetch(reach, _MOST_PAGES) if reach.disk else None
        if fetch is not None:
            self._begin(fetch)
        load = self._tree.moves.load(reach, min(_MOST_PAGES, room))
        if load is not None:
            self._begin(load)
        if load is None and fetch is None:
            wait.reason = "full"
        return load or fetch

    def _pages(self, reach: Reach) -> tuple[int, int]:
        size = self._tree.page_size
        return -(-reach.host // size), -(-reach.disk // size)

    def _queued(self) -> int:
        return sum(len(each.target_slots) for each in self._ids.values() if each.target != DISK)

    # ---- outputs ----

    def _new_id(self) -> int:
        self._next_id += 1
        return self._next_id

    def _begin(self, transfer: Transfer) -> None:
        id = self._new_id()
        self._ids[id] = transfer
        if transfer.target == DEVICE:
            self._loads.append(id)
        else:  # its slots on the host may be those of stores that are yet to be made
            self._disk_jobs.append((self._stores + 1, id))

    def begin(self) -> HostCopies | None:
        """The copies to start with the step that was planned last, if any: see `HostCopies`."""
        pages, slots, after = self._tree.take_stores()
        if not len(pages) and not self._loads and not (self._disk_jobs and self._disk_jobs[-1][0] > self._stores):
            return None
        self._stores += 1
        self.gate.stored += len(pages)
        keeps = self.gate.keeps_one_shot()
        if keeps is not None:
            self._tree.structure.keep_one_shot = keeps or self._preemption == "swap"
        copies = HostCopies(pages, slots, after)
        for id in self._loads:
            transfer = self._ids[id]
            copies.loads.append((id, transfer.source_slots, transfer.target_slots))
        self._loads = []
        return copies

    def _start(self, id: int, transfer: Transfer) -> bool:
        """Hands a copy between host and disk to the disk's threads. False: there is nothing to write any more."""
        if self._disk is None:
            raise RuntimeError("a copy to or from a disk, and there is no disk tier")
        if transfer.target == HOST:
            self._disk.read(id, transfer.source_slots, self._host.memory, transfer.target_slots)
            return True
        pages = self._tree.moves.describe(transfer)
        if pages is not None:
            self._disk.write(id, pages, transfer.target_slots, self._host.memory, transfer.source_slots)
        return pages is not None

    # ---- writing to the disk ----

    def _write_next(self) -> None:
        """Begins to write one prefix that was used twice, or the host's next victim when the host is nearly full."""
        moves, host = self._tree.moves, self._tree.structure.host
        while self._to_write:
            namespace, prefix = self._to_write.popleft()
            end = moves.end_of(namespace, prefix)
            begun = None if end is None else self._persist(end)
            if begun is not None:
                if begun.node is not end:
                    self._to_write.appendleft((namespace, prefix))  # a part of it was too much at once
                return
        while self._leaves:
            leaf = self._leaves.pop()
            begun = self._persist(leaf)
            if begun is not None:
                if begun.node is not leaf:
                    self._leaves.append(leaf)
                return
        if host is not None and host.slots.free < host.slots.total // FULL:
            for _, _, node in list(islice(host.leaves, _VICTIMS)):
                if not len(node.disk) and self._persist(node) is not None:
                    return

    def _persist(self, node: Node) -> Transfer | None:
        *_, root = node.upwards()
        if self._disk is None or not isinstance(root, Root) or not self._disk.keeps(root.namespace):
            return None
        transfer = self._tree.moves.persist(node, _MOST_PAGES)
        if transfer is not None:
            self._begin(transfer)
        return transfer

    def write_everything(self) -> bool:
        """Called again and again when the engine stops, with `poll`, `apply` and `begin` between: writes what the disk
        lacks, the latest used first. Returns whether there is more to do."""
        if self._disk is None:
            return False
        if self._leaves is None:
            self._leaves = sorted(self._tree.moves.leaves(), key=lambda node: node.last_access)
            self._write_next()
        return bool(self._ids or self._leaves or self._to_write)
