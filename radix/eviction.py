"""Eviction order: an index of the evictable leaves of a memory tier, sorted by the policy."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from sortedcontainers import SortedList

from .node import Node

Policy = Callable[[Node], Any]  # lower keys are evicted first; times are logical, so runs are reproducible


def lru(node: Node) -> int:
    """Least recently used."""
    return node.last_access


def lfu(node: Node) -> tuple[int, int]:
    """Least frequently used; ties by least recently used."""
    return node.hits, node.last_access


def fifo(node: Node) -> int:
    """First in, first out."""
    return node.created


def priority(node: Node) -> tuple[int, int]:
    """Lowest priority of the requests that used it; ties by least recently used."""
    return node.priority, node.last_access


POLICIES: dict[str, Policy] = {"lru": lru, "lfu": lfu, "fifo": fifo, "priority": priority}


class EvictionIndex:
    """The unlocked leaves in eviction order. Each change costs O(log n); nothing is scanned or rebuilt.

    A node's times, hits and priority change only while it is locked, and locked nodes are not indexed, so an entry's
    key never goes stale.
    """

    def __init__(self, policy: Policy) -> None:
        self._policy = policy
        self._leaves: SortedList = SortedList()  # (policy's key, serial, node): serials differ, nodes never compare

    def __len__(self) -> int:
        return len(self._leaves)

    def __iter__(self) -> Iterator[tuple[Any, Any, Node]]:
        return iter(self._leaves)

    def entry(self, node: Node) -> tuple[Any, Any, Node]:
        """The leaf's index entry: (policy's key, serial, node)."""
        return self._policy(node), node.serial, node

    def add(self, leaf: Node) -> None:
        """Adds an unlocked leaf."""
        self._leaves.add(self.entry(leaf))

    def remove(self, leaf: Node) -> None:
        """Removes a leaf. Raises ValueError if it is not indexed under its present key."""
        self._leaves.remove(self.entry(leaf))

    def pop_first(self) -> Node:
        """Removes the leaf to evict next, and returns it."""
        node: Node = self._leaves.pop(0)[2]
        return node

    def first(self) -> Node:
        """The leaf to evict next. Raises IndexError if there is none."""
        node: Node = self._leaves[0][2]
        return node
