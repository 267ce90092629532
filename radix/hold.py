"""A hold: what keeps a cached prefix from eviction while nobody runs on it. Sharing it is counting."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .node import Int32, Namespace, Node


@dataclass(slots=True, eq=False)
class Hold:
    """Made by `RadixTree.hold` and ended by `RadixTree.unhold`, once for each of its ``count`` sharers.

    It reads nothing and writes nothing: whoever wants the pages matches them, as for any other prefix. ``node`` is
    where the locked path ends: after the last whole page, or one page beyond, of which the first tokens are held.
    """

    namespace: Namespace
    tokens: int  # cached tokens that stay: whole pages, and the first tokens of one page more
    node: Node  # the tree's
    count: int = 1  # sharers
    pinned: bool = False  # a promise: whoever frees memory must leave it alone

    @property
    def pages(self) -> Int32:
        """The pages it keeps, in order: the same ones as long as it lasts."""
        return np.concatenate([node.pages for node in reversed(list(self.node.upwards()))])
