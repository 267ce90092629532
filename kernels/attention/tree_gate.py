"""From how many tokens on a shared prefix is read once: the choice that `TreeCosts` lead to, for people to read."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from ..arrays import Int32
from .tree_costs import TreeCosts
from .tree_plan import TreeLimits, TreeRequests, plan_tree

READERS = (8, 32, 128)
PREFIXES = tuple(128 << i for i in range(9))
TAIL = 256


class Forest(NamedTuple):
    """Requests in groups that share ``prefix`` tokens, each with a ``tail`` of its own. 0 groups: nothing is shared."""

    requests: int
    groups: int
    prefix: int
    tail: int

    def table(self, page_size: int) -> Int32:
        """Its page table, of pages numbered in order."""
        shared, own = self.prefix // page_size, -(-self.tail // page_size)
        owns = self.groups * shared + np.arange(self.requests * own).reshape(self.requests, own)
        if not self.groups:
            return owns.astype(np.int32)
        group = np.arange(self.requests) * self.groups // self.requests
        return np.concatenate([group[:, None] * shared + np.arange(shared), owns], axis=1).astype(np.int32)

    def decodes(self) -> TreeRequests:
        """One query token each."""
        n = self.requests
        lengths = np.full(n, self.prefix + self.tail, np.int64)
        return TreeRequests(np.arange(n, dtype=np.int32), np.arange(n), np.ones(n, np.int64), lengths)


def pays_from(readers: int, group: int, page_size: int, costs: TreeCosts, limits: TreeLimits) -> int | None:
    """The shortest of `PREFIXES` that so many requests with tails of `TAIL` tokens read once; None: none of them."""
    for prefix in PREFIXES:
        forest = Forest(readers, 1, prefix, TAIL)
        table, requests = forest.table(page_size), forest.decodes()
        if plan_tree(table, requests, readers, group, page_size, costs, limits, costs.margin) is not None:
            return prefix
    return None


def describe(group: int, page_size: int, costs: TreeCosts, limits: TreeLimits) -> str:
    """``8 requests read a shared prefix once from 2,048 tokens on, 32 from 512, 128 from 128``."""
    found = {readers: pays_from(readers, group, page_size, costs, limits) for readers in READERS}
    parts = [f"{readers} from {prefix:,}" for readers, prefix in found.items() if prefix is not None]
    if not parts:
        return f"no prefix of up to {PREFIXES[-1]:,} tokens is read once"
    first, *others = parts
    readers, _, prefix_text = first.partition(" from ")
    return ", ".join([f"{readers} requests read a shared prefix once from {prefix_text} tokens on", *others])
