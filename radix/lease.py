"""A lease: the only way to hold pages."""

from __future__ import annotations

from dataclasses import dataclass

from .explain import Explanation
from .node import Int32, Namespace, Node


@dataclass(slots=True, eq=False)
class Lease:
    """A request's hold on its pages. Made by `RadixTree.match`, ended by `RadixTree.release`, exactly once.

    The *path* is the part that is in the tree: locked, shared, read-only. The pages after it are *owned*: reserved by
    this lease, written by its request alone, and not in the tree until published. Arrays read from a lease are never
    modified afterwards: a change puts a new array in their place.
    """

    namespace: Namespace
    priority: int
    page_size: int
    length: int  # tokens of the path: a multiple of page_size
    hit: int  # tokens whose computation the match saved: the path at match time, and what is copied
    pages: Int32  # [path pages + owned pages], in the order of their positions
    copy: tuple[int, int] | None  # (page, k): copy that page into the first owned one and k of its tokens are valid
    report: Explanation
    node: Node  # the tree's: where the path ends
    source: Node | None  # the tree's: the node of the copied page, locked until the next publish or release
    grown: Node | None = None  # the tree's: the node this lease itself added
    released: bool = False

    @property
    def owned(self) -> int:
        """Pages this lease holds that are not in the tree."""
        return len(self.pages) - self.length // self.page_size
