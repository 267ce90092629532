"""A hold: protects a cached prefix from eviction while no request runs on it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .node import Int32, Namespace, Node


@dataclass(slots=True, eq=False)
class Hold:
    """Made by `RadixTree.hold` and ended by `RadixTree.unhold`, once for each of its ``count`` sharers.

    A hold gives no access to pages: a request matches them like any other prefix. ``node`` is where the locked path
    ends: after the last whole page, or one page further if the hold ends inside a page.
    """

    namespace: Namespace
    tokens: int  # tokens protected: whole pages, and the first tokens of one more page
    node: Node  # internal
    count: int = 1  # sharers
    pinned: bool = False  # must not be given up to free memory

    @property
    def pages(self) -> Int32:
        """The protected pages in order. They stay the same while the hold lasts."""
        return np.concatenate([node.pages for node in reversed(list(self.node.upwards()))])
