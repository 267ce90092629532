"""A driver for the tree with the operations of a scheduler, and a mirror made from events."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence

import numpy as np
import pytest

from branchwise.radix import DEFAULT, Event, Lease, Namespace, PagesEntered, PagesLeft, RadixTree

Prefix = tuple[Namespace, tuple[int, ...]]


class Mirror:
    """A copy of the tree, page by page, made from its events alone. An event that does not fit it is an error."""

    def __init__(self, page_size: int) -> None:
        self.page_size = page_size
        self.prefixes: dict[int, Prefix] = {}  # page -> every token up to its end
        self.left: Counter[str] = Counter()  # pages by the reason they left

    def __call__(self, event: Event) -> None:
        if isinstance(event, PagesEntered):
            self.pages_entered(event)
        elif isinstance(event, PagesLeft):
            self.pages_left(event)

    def pages_entered(self, event: PagesEntered) -> None:
        before = self._before(event)
        assert len(event.pages) == -(-len(event.tokens) // self.page_size) > 0
        for i, page in enumerate(event.pages.tolist(), start=1):
            assert page not in self.prefixes, "a page entered twice"
            self.prefixes[page] = event.namespace, before + tuple(event.tokens[: i * self.page_size].tolist())

    def pages_left(self, event: PagesLeft) -> None:
        before = self._before(event)
        self.left[event.reason] += len(event.pages)
        for i, page in enumerate(event.pages.tolist(), start=1):
            expected = event.namespace, before + tuple(event.tokens[: i * self.page_size].tolist())
            assert self.prefixes.pop(page) == expected
        tokens = before + tuple(event.tokens[: self.page_size].tolist())
        if len(tokens) % self.page_size == 0:
            orphans = [p for n, p in self.prefixes.values() if n == event.namespace and p[: len(tokens)] == tokens]
            assert not orphans, "pages left before those that continue them"

    def _before(self, event: PagesEntered | PagesLeft) -> tuple[int, ...]:
        if event.parent == -1:
            return ()
        namespace, tokens = self.prefixes[event.parent]
        assert namespace == event.namespace and len(tokens) % self.page_size == 0
        return tokens

    def compare(self, tree: RadixTree) -> None:
        """Compares the mirror with a walk of the tree, and with what a new subscriber receives."""
        found: dict[int, Prefix] = {}
        stack = [(namespace, (), node) for namespace, root in tree.roots.items() for node in root.children.values()]
        while stack:
            namespace, before, node = stack.pop()
            tokens = before + tuple(node.tokens.tolist())
            for i, page in enumerate(node.pages.tolist(), start=1):
                found[page] = namespace, tokens[: len(before) + i * self.page_size]
            stack += [(namespace, tokens, child) for child in node.children.values()]
        assert self.prefixes == found
        assert self.left["evicted"] + self.left["pruned"] + self.left["flushed"] == tree.evicted_total
        late = Mirror(self.page_size)
        tree.subscribe(late)
        tree.structure.events.unsubscribe(late)
        assert late.prefixes == found


class Driver:
    """Wraps a tree; after every move its `check` runs and it is compared with a `Mirror`."""

    def __init__(
        self, num_pages: int = 32, page_size: int = 4, policy: str = "lru", enabled: bool = True, host_slots: int = 0
    ) -> None:
        self.tree = RadixTree(num_pages, page_size, policy, enabled, host_slots=host_slots)
        self.mirror = Mirror(page_size)
        self.tree.subscribe(self.mirror)
        self.tree.begin_step()

    def check(self) -> None:
        self.tree.check()
        self.mirror.compare(self.tree)

    def match(
        self, tokens: Sequence[int], namespace: Namespace = DEFAULT, limit: int | None = None, priority: int = 0
    ) -> Lease:
        """Matches tokens as the scheduler does: all but the last may be reused, unless a limit is given."""
        limit = len(tokens) - 1 if limit is None else limit
        lease = self.tree.match(array(tokens), namespace, limit, priority)
        self.check()
        return lease

    def compute(self, lease: Lease, tokens: Sequence[int]) -> tuple[int, list[int]] | None:
        """Reserves pages for the tokens and publishes them; returns the replaced pages, if any."""
        missing = -(-len(tokens) // self.tree.page_size) - len(lease.pages)
        assert self.tree.reserve(lease, max(0, missing)) is not None
        replaced = self.tree.publish(lease, array(tokens))
        self.check()
        return None if replaced is None else (replaced[0], replaced[1].tolist())

    def release(self, lease: Lease, tokens: Sequence[int] | None = None) -> None:
        self.tree.release(lease, None if tokens is None else array(tokens))
        self.check()

    def next_step(self) -> None:
        """The step planned so far runs and ends; another is planned."""
        self.tree.end_step(self.tree.begin_step() - 1)
        self.check()

    def remember(self, tokens: Sequence[int], namespace: Namespace = DEFAULT, priority: int = 0) -> list[int]:
        """Runs one request from arrival to end; returns its pages."""
        lease = self.match(tokens, namespace, priority=priority)
        self.compute(lease, tokens)
        pages = lease.pages.tolist()
        self.next_step()
        self.release(lease, tokens)
        self.next_step()
        return pages

    def fill(self) -> Lease:
        """A lease of every free page: from now on each reservation evicts."""
        lease = self.match([0])
        self.tree.reserve(lease, self.tree.allocator.free)
        return lease

    def peek(self, tokens: Sequence[int], namespace: Namespace = DEFAULT) -> int:
        return self.tree.peek(array(tokens), namespace)


def array(tokens: Sequence[int]) -> np.ndarray:
    return np.array(tokens, np.int32)


@pytest.fixture
def mirror() -> type[Mirror]:
    return Mirror


@pytest.fixture
def drive() -> Callable[..., Driver]:
    return Driver
