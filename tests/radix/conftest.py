"""A tree with the few moves of a scheduler, so that a test reads as a story."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import pytest

from branchwise.radix import DEFAULT, Lease, Namespace, RadixTree


class Driver:
    """Wraps a tree; ``check()`` runs after every move."""

    def __init__(self, num_pages: int = 32, page_size: int = 4, policy: str = "lru", enabled: bool = True) -> None:
        self.tree = RadixTree(num_pages, page_size, policy, enabled)
        self.tree.begin_step()

    def match(
        self, tokens: Sequence[int], namespace: Namespace = DEFAULT, limit: int | None = None, priority: int = 0
    ) -> Lease:
        """Looks tokens up, as the scheduler does: all but the last may be reused, unless a limit says otherwise."""
        limit = len(tokens) - 1 if limit is None else limit
        lease = self.tree.match(array(tokens), namespace, limit, priority)
        self.tree.check()
        return lease

    def compute(self, lease: Lease, tokens: Sequence[int]) -> tuple[int, list[int]] | None:
        """Pages for the tokens, which are then published; the replaced pages, if any."""
        missing = -(-len(tokens) // self.tree.page_size) - len(lease.pages)
        assert self.tree.reserve(lease, max(0, missing)) is not None
        replaced = self.tree.publish(lease, array(tokens))
        self.tree.check()
        return None if replaced is None else (replaced[0], replaced[1].tolist())

    def release(self, lease: Lease, tokens: Sequence[int] | None = None) -> None:
        self.tree.release(lease, None if tokens is None else array(tokens))
        self.tree.check()

    def next_step(self) -> None:
        """The step planned so far runs and ends; another is planned."""
        self.tree.end_step(self.tree.begin_step() - 1)
        self.tree.check()

    def remember(self, tokens: Sequence[int], namespace: Namespace = DEFAULT, priority: int = 0) -> list[int]:
        """One request from arrival to end; the pages it had."""
        lease = self.match(tokens, namespace, priority=priority)
        self.compute(lease, tokens)
        pages = lease.pages.tolist()
        self.next_step()
        self.release(lease, tokens)
        self.next_step()
        return pages

    def fill(self) -> Lease:
        """A lease that holds every free page: from now on each reservation evicts."""
        lease = self.match([0])
        self.tree.reserve(lease, self.tree.allocator.free)
        return lease

    def peek(self, tokens: Sequence[int], namespace: Namespace = DEFAULT) -> int:
        return self.tree.peek(array(tokens), namespace)


def array(tokens: Sequence[int]) -> np.ndarray:
    return np.array(tokens, np.int32)


@pytest.fixture
def drive() -> Callable[..., Driver]:
    return Driver
