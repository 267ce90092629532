"""All branches: their tokens, holds and expiry. No sockets, no text."""

from __future__ import annotations

import enum
import heapq
import itertools
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator

from ....radix.hold import Hold
from ....radix.node import Namespace
from ....radix.tree import RadixTree
from ...errors import InvalidRequest
from ...shared_tokens import EMPTY, SharedTokens
from .ids import BranchIds

MAX_FORK = 1024  # branches per fork


class BranchState(enum.Enum):
    IDLE = enum.auto()
    GENERATING = enum.auto()
    SETTLING = enum.auto()  # generation has ended; the detokenizer has not reported yet where the returned text ends
    ENCODING = enum.auto()  # the text at its end is being tokenized together with what is appended
    GONE = enum.auto()


class BranchRecord:
    """One branch. Only the registry changes its hold and its expiry.

    ``remembered``: how many of its tokens were cached when it last ran. Those of them that must be computed again are
    what eviction cost.
    """

    __slots__ = ("expires", "hold", "id", "namespace", "readers", "remembered", "rest", "run", "state", "tokens", "ttl")

    def __init__(self, id: str, namespace: Namespace, tokens: SharedTokens, ttl: float) -> None:
        self.id = id
        self.namespace = namespace
        self.tokens = tokens
        self.rest = ""  # text after the tokens: the part before a stop string of a token that it cut
        self.remembered = 0
        self.hold: Hold | None = None
        self.state = BranchState.IDLE
        self.run = 0  # id of the engine request whose output is appended to it
        self.readers: set[int] = set()  # ids of engine requests that append nothing: scores, and further samples
        self.ttl = ttl  # seconds
        self.expires = 0.0  # on the registry's clock

    @property
    def is_busy(self) -> bool:
        return self.state is not BranchState.IDLE or bool(self.readers)


class Branches:
    """The registry. Errors are `InvalidRequest` with an HTTP status: 404, 410 or 429. ``ttl``, ``now``: seconds."""

    def __init__(
        self,
        tree: RadixTree,
        *,
        max_branches: int,
        max_per_key: int | None = None,
        ttl: float,
        now: Callable[[], float],
        instance: str = "",
    ) -> None:
        self._tree = tree
        self._max = max_branches
        self._max_per_key = max_branches if max_per_key is None else max_per_key
        self._by_owner: Counter[str] = Counter()
        self._ttl = ttl
        self._now = now
        self._ids = BranchIds(instance)
        self._branches: dict[str, BranchRecord] = {}
        # Branches with a hold, least recently used first. Idle ones give up theirs before busy ones do.
        self._idle: OrderedDict[BranchRecord, None] = OrderedDict()
        self._busy: OrderedDict[BranchRecord, None] = OrderedDict()
        self._deadlines: list[tuple[float, int, BranchRecord]] = []  # heap; an entry may be too early, never too late
        self._serial = itertools.count()
        self.holds_lost = 0  # given up because memory was short, in total

    def __len__(self) -> int:
        return len(self._branches)

    def __iter__(self) -> Iterator[BranchRecord]:
        return iter(self._branches.values())

    # -- creating and ending -------------------------------------------------------------------------------------------

    def create(self, namespace: Namespace, tokens: SharedTokens = EMPTY, ttl: float | None = None) -> BranchRecord:
        """A new branch of these tokens, with a hold on the cached part of them.

        ``ttl``: seconds until it expires after each use, at most the server's.
        """
        ttl = self._check_ttl(ttl)
        self._make_room(namespace[0], 1)
        branch = BranchRecord(self._ids.make(namespace[0], 1)[0], namespace, tokens, ttl)
        self._add(branch)
        self.renew_hold(branch)
        return branch

    def fork(self, branch: BranchRecord, n: int, ttl: float | None = None) -> list[BranchRecord]:
        """``n`` copies of the branch. They share its tokens and its hold; nothing is copied or looked up."""
        if not 1 <= n <= MAX_FORK:
            raise InvalidRequest("n", f"must be between 1 and {MAX_FORK}, got {n}")
        ttl = branch.ttl if ttl is None else self._check_ttl(ttl)
        self._make_room(branch.namespace[0], n)
        if branch.hold is not None:
            self._tree.share(branch.hold, n)
        children = []
        for id in self._ids.make(branch.namespace[0], n):
            child = BranchRecord(id, branch.namespace, branch.tokens, ttl)
            child.rest, child.remembered, child.hold = branch.rest, branch.remembered, branch.hold
            self._add(child)
            children.append(child)
        return children

    def _check_ttl(self, ttl: float | None) -> float:
        if ttl is None:
            return self._ttl
        if not 0 < ttl <= self._ttl:
            raise InvalidRequest(
                "ttl", f"must be greater than 0 and at most {self._ttl:g} seconds (--branch-ttl), got {ttl:g}"
            )
        return ttl

    def _make_room(self, owner: str, n: int) -> None:
        self.sweep()
        own, most = self._by_owner[owner], self._max_per_key
        if most < self._max and own + n > most:
            problem = (
                f"this key has {own} branches, and {n} more would exceed its limit of {most} (--max-branches-per-key)"
            )
        elif len(self) + n > self._max:
            problem = (
                f"there are {len(self)} branches, and {n} more would exceed the limit of {self._max} (--max-branches)"
            )
        else:
            return
        raise InvalidRequest(
            None, f"{problem}; delete some, or try again when others have expired", status=429, code="too_many_branches"
        )

    def _add(self, branch: BranchRecord) -> None:
        self._branches[branch.id] = branch
        self._by_owner[branch.namespace[0]] += 1
        branch.expires = self._now() + branch.ttl
        heapq.heappush(self._deadlines, (branch.expires, next(self._serial), branch))
        self._file(branch)

    def remove(self, branch: BranchRecord) -> None:
        """Ends the branch: `get` answers 410 from now on. The caller must end its requests."""
        del self._branches[branch.id]
        self._by_owner[branch.namespace[0]] -= 1
        if not self._by_owner[branch.namespace[0]]:
            del self._by_owner[branch.namespace[0]]
        self._drop_hold(branch)
        branch.state = BranchState.GONE
        branch.tokens = EMPTY
        if len(self._deadlines) > 2 * len(self._branches) + 64:  # most entries belong to branches deleted early
            self._deadlines = [entry for entry in self._deadlines if entry[2].state is not BranchState.GONE]
            heapq.heapify(self._deadlines)

    def sweep(self) -> float | None:
        """Ends expired branches. Returns the seconds until the next may expire; None: there are no branches."""
        now = self._now()
        while self._deadlines:
            when, _, branch = self._deadlines[0]
            if branch.state is BranchState.GONE:
                heapq.heappop(self._deadlines)
            elif when > now:
                return when - now
            elif branch.is_busy or branch.expires > now:
                expires = now + branch.ttl if branch.is_busy else branch.expires
                heapq.heapreplace(self._deadlines, (expires, next(self._serial), branch))
            else:
                heapq.heappop(self._deadlines)
                self.remove(branch)
        return None

    # -- use -----------------------------------------------------------------------------------------------------------

    def get(self, id: str, owner: str) -> BranchRecord:
        """The branch with this id; counts as a use. 410 if it has ended, 404 if it is unknown or another key's."""
        branch = self._branches.get(id)
        if branch is not None and branch.namespace[0] == owner:
            if branch.is_busy or branch.expires > self._now():
                self.touch(branch)
                return branch
            self.remove(branch)
        elif branch is not None or not self._ids.made(id, owner):
            raise InvalidRequest("branch", f"{id[:64]} does not exist", status=404)
        raise InvalidRequest("branch", f"{id} has expired or was deleted", status=410)

    def touch(self, branch: BranchRecord) -> None:
        """Counts a use: postpones the expiry, and makes it the last of its kind to give up its hold."""
        branch.expires = self._now() + branch.ttl
        self._file(branch)

    def renew_hold(self, branch: BranchRecord) -> None:
        """Replaces the branch's hold by one on what is cached of it now."""
        hold = self._tree.hold(branch.tokens.array(), branch.namespace) if branch.tokens.length else None
        if hold is not None:
            branch.remembered = hold.tokens
        self._drop_hold(branch)
        branch.hold = hold
        self.touch(branch)

    def _file(self, branch: BranchRecord) -> None:
        """Moves the branch to the end of the list of its kind."""
        self._idle.pop(branch, None)
        self._busy.pop(branch, None)
        if branch.hold is not None:
            (self._busy if branch.is_busy else self._idle)[branch] = None

    def _drop_hold(self, branch: BranchRecord) -> None:
        hold, branch.hold = branch.hold, None
        self._idle.pop(branch, None)
        self._busy.pop(branch, None)
        if hold is not None:
            self._tree.unhold(hold)

    # -- memory --------------------------------------------------------------------------------------------------------

    def relieve(self, pages: int, everything: bool) -> bool:
        """Gives up holds until ``pages`` can be reserved; returns whether they can. No branch loses its tokens.

        Least recently used first, idle branches only; ``everything``: then busy ones, whose requests have leases of
        their own once they run.
        """
        for kind in (self._idle, self._busy) if everything else (self._idle,):
            while kind and self._tree.available < pages:
                self._drop_hold(next(iter(kind)))
                self.holds_lost += 1
        return self._tree.available >= pages

    def forget(self) -> None:
        """Gives up the holds of all branches."""
        for branch in [*self._idle, *self._busy]:
            self._drop_hold(branch)

    # -- reading -------------------------------------------------------------------------------------------------------

    @property
    def holding(self) -> int:
        """Number of branches with a hold."""
        return len(self._idle) + len(self._busy)

    def resident(self, branch: BranchRecord) -> int:
        """Tokens of it that are cached now, held or not, including those that the step being planned writes."""
        return self._tree.peek_in_flight(branch.tokens.array(), branch.namespace)[1] if branch.tokens.length else 0

    def check(self) -> None:
        """Raises RuntimeError if holds and branches are inconsistent. The tree checks the locks."""
        if self._by_owner != Counter(branch.namespace[0] for branch in self):
            raise RuntimeError("the count of an owner's branches is wrong")
        counts: dict[Hold, int] = {}
        for branch in self:
            filed = (branch in self._idle, branch in self._busy)
            expected = (False, False) if branch.hold is None else (not branch.is_busy, branch.is_busy)
            if filed != expected:
                raise RuntimeError(f"branch {branch.id}, {branch.state.name}, is listed as (idle, busy) = {filed}")
            if branch.hold is not None:
                counts[branch.hold] = counts.get(branch.hold, 0) + 1
        if counts != {hold: hold.count for hold in self._tree.holds if not hold.pinned}:
            raise RuntimeError("the tree's holds are not those of the branches")
