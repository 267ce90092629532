"""Every branch there is: its tokens, its hold on the tree, its age. Pure of sockets and text."""

from __future__ import annotations

import enum
import heapq
import itertools
from collections import OrderedDict
from collections.abc import Callable, Iterator

from ....radix.hold import Hold
from ....radix.node import Namespace
from ....radix.tree import RadixTree
from ...errors import InvalidRequest
from .ids import BranchIds
from .trail import EMPTY, Trail

MAX_FORK = 1024  # branches one fork may make


class State(enum.Enum):
    IDLE = enum.auto()
    GENERATING = enum.auto()
    SETTLING = enum.auto()  # generated: where the returned text ended is not known yet
    ENCODING = enum.auto()  # the text left at its end is being tokenized together with what is appended
    GONE = enum.auto()


class Branch:
    """One branch. Only the registry changes its hold and its age.

    ``remembered``: of its tokens, how many had their keys and values in the tree when it last ran; what of them must be
    computed once more is what eviction cost.
    """

    __slots__ = ("expires", "hold", "id", "namespace", "readers", "remembered", "rest", "run", "state", "trail", "ttl")

    def __init__(self, id: str, namespace: Namespace, trail: Trail, ttl: float) -> None:
        self.id = id
        self.namespace = namespace
        self.trail = trail
        self.rest = ""  # text after the tokens: what a stop string left of a token it cut
        self.remembered = 0
        self.hold: Hold | None = None
        self.state = State.IDLE
        self.run = 0  # the engine request whose output stays in it
        self.readers: set[int] = set()  # engine requests that leave nothing in it: scores, and further samples
        self.ttl = ttl  # seconds
        self.expires = 0.0  # on the registry's clock

    @property
    def at_work(self) -> bool:
        return self.state is not State.IDLE or bool(self.readers)


class Branches:
    """The registry. Errors are `InvalidRequest` with the HTTP status they become: 404, 409, 410, 429."""

    def __init__(
        self,
        tree: RadixTree,
        *,
        max_branches: int,
        ttl: float,
        now: Callable[[], float],
    ) -> None:
        self._tree = tree
        self._max = max_branches
        self._ttl = ttl
        self._now = now
        self._ids = BranchIds()
        self._branches: dict[str, Branch] = {}
        # Those with a hold, by last use. Of the idle ones the oldest loses it first, and only then do those at work.
        self._idle: OrderedDict[Branch, None] = OrderedDict()
        self._at_work: OrderedDict[Branch, None] = OrderedDict()
        self._deadlines: list[tuple[float, int, Branch]] = []  # heap; times may be outdated, but never too late
        self._serial = itertools.count()
        self.holds_lost = 0  # to memory pressure, ever

    def __len__(self) -> int:
        return len(self._branches)

    def __iter__(self) -> Iterator[Branch]:
        return iter(self._branches.values())

    # -- making and ending ---------------------------------------------------------------------------------------------

    def create(self, namespace: Namespace, trail: Trail = EMPTY, ttl: float | None = None) -> Branch:
        """A branch of these tokens, holding whatever of them the tree has.

        ``ttl``: seconds it lives after each use, at most the server's.
        """
        ttl = self._check_ttl(ttl)
        self._make_room(1)
        branch = Branch(self._ids.make(namespace[0], 1)[0], namespace, trail, ttl)
        self._add(branch)
        self.keep(branch)
        return branch

    def fork(self, branch: Branch, n: int, ttl: float | None = None) -> list[Branch]:
        """``n`` branches that are as this one is now. Nothing is copied or looked up: tokens and hold are shared."""
        if not 1 <= n <= MAX_FORK:
            raise InvalidRequest("n", f"must be between 1 and {MAX_FORK}, got {n}")
        ttl = branch.ttl if ttl is None else self._check_ttl(ttl)
        self._make_room(n)
        if branch.hold is not None:
            self._tree.share(branch.hold, n)
        children = []
        for id in self._ids.make(branch.namespace[0], n):
            child = Branch(id, branch.namespace, branch.trail, ttl)
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

    def _make_room(self, n: int) -> None:
        self.sweep()
        if len(self._branches) + n > self._max:
            raise InvalidRequest(
                None,
                f"there are {len(self._branches)} branches and {n} more would pass the limit of {self._max} "
                "(--max-branches); delete some, or try again when others have expired",
                status=429,
            )

    def _add(self, branch: Branch) -> None:
        self._branches[branch.id] = branch
        branch.expires = self._now() + branch.ttl
        heapq.heappush(self._deadlines, (branch.expires, next(self._serial), branch))
        self._file(branch)

    def remove(self, branch: Branch) -> None:
        """It is gone; whoever asks hears 410. Its requests are the caller's to end."""
        del self._branches[branch.id]
        self._let_go(branch)
        branch.state = State.GONE
        branch.trail = EMPTY
        if len(self._deadlines) > 2 * len(self._branches) + 64:  # most entries are of branches deleted early
            self._deadlines = [entry for entry in self._deadlines if entry[2].state is not State.GONE]
            heapq.heapify(self._deadlines)

    def sweep(self) -> float | None:
        """Ends what has expired. Returns the seconds until there may be more to end; None: there is nothing."""
        now = self._now()
        while self._deadlines:
            when, _, branch = self._deadlines[0]
            if branch.state is State.GONE:
                heapq.heappop(self._deadlines)
            elif when > now:
                return when - now
            elif branch.at_work or branch.expires > now:
                expires = now + branch.ttl if branch.at_work else branch.expires
                heapq.heapreplace(self._deadlines, (expires, next(self._serial), branch))
            else:
                heapq.heappop(self._deadlines)
                self.remove(branch)
        return None

    # -- using ---------------------------------------------------------------------------------------------------------

    def get(self, id: str, owner: str) -> Branch:
        """The branch, for a use of it. 410 if it has ended; 404 if it never was, or is another key's."""
        branch = self._branches.get(id)
        if branch is not None and branch.namespace[0] == owner:
            if branch.at_work or branch.expires > self._now():
                self.touch(branch)
                return branch
            self.remove(branch)
        elif branch is not None or not self._ids.made(id, owner):
            raise InvalidRequest("branch", f"{id[:64]} does not exist", status=404)
        raise InvalidRequest("branch", f"{id} has expired or was deleted", status=410)

    def touch(self, branch: Branch) -> None:
        """A use: it lives on, and is the last to lose its hold."""
        branch.expires = self._now() + branch.ttl
        self._file(branch)

    def keep(self, branch: Branch) -> None:
        """Takes a new hold: on what the tree has of the branch now."""
        hold = self._tree.hold(branch.trail.tokens(), branch.namespace) if branch.trail.length else None
        if hold is not None:
            branch.remembered = hold.tokens
        self._let_go(branch)
        branch.hold = hold
        self.touch(branch)

    def _file(self, branch: Branch) -> None:
        """Behind all others of its kind."""
        self._idle.pop(branch, None)
        self._at_work.pop(branch, None)
        if branch.hold is not None:
            (self._at_work if branch.at_work else self._idle)[branch] = None

    def _let_go(self, branch: Branch) -> None:
        hold, branch.hold = branch.hold, None
        self._idle.pop(branch, None)
        self._at_work.pop(branch, None)
        if hold is not None:
            self._tree.unhold(hold)

    # -- memory --------------------------------------------------------------------------------------------------------

    def relieve(self, pages: int, everything: bool) -> bool:
        """Takes holds away until ``pages`` could be reserved; True if they could. No branch loses its tokens.

        The idle ones longest unused go first; ``everything``: after them those at work, whose requests have leases of
        their own once they run.
        """
        for kind in (self._idle, self._at_work) if everything else (self._idle,):
            while kind and self._tree.available < pages:
                self._let_go(next(iter(kind)))
                self.holds_lost += 1
        return self._tree.available >= pages

    def forget(self) -> None:
        """No branch holds anything any more."""
        for branch in [*self._idle, *self._at_work]:
            self._let_go(branch)

    # -- looking -------------------------------------------------------------------------------------------------------

    @property
    def holding(self) -> int:
        """Branches with a hold."""
        return len(self._idle) + len(self._at_work)

    def resident(self, branch: Branch) -> int:
        """Tokens of it that the tree has now, held or not, those being written in this step among them."""
        return self._tree.peek(branch.trail.tokens(), branch.namespace, in_flight=True) if branch.trail.length else 0

    def check(self) -> None:
        """Raises RuntimeError if holds and branches do not add up. The tree's own check counts the locks."""
        counts: dict[Hold, int] = {}
        for branch in self:
            filed = (branch in self._idle, branch in self._at_work)
            expected = (False, False) if branch.hold is None else (not branch.at_work, branch.at_work)
            if filed != expected:
                raise RuntimeError(f"branch {branch.id}, {branch.state.name}, is filed as {filed}")
            if branch.hold is not None:
                counts[branch.hold] = counts.get(branch.hold, 0) + 1
        if counts != {hold: hold.count for hold in self._tree.holds if not hold.pinned}:
            raise RuntimeError("the tree's holds are not those of the branches")
