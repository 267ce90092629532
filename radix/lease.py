"""A lease: a running request's claim on its pages."""

from __future__ import annotations

from dataclasses import dataclass

from .explain import Explanation
from .node import Int32, Namespace, Node
from .scores import Scores


@dataclass(slots=True, eq=False)
class Lease:
    """Made by `RadixTree.match` and ended by `RadixTree.release`, exactly once.

    The *path* is the part in the tree: locked, shared, read-only. The pages after it are *owned*: reserved by this
    lease, written by its request alone, and not in the tree until published. Arrays read from a lease are never
    modified in place: a change replaces the array.
    """

    namespace: Namespace
    priority: int
    page_size: int
    length: int  # tokens of the path: a multiple of page_size
    hit: int  # tokens that need no computation: the path at match time, and what is copied
    pages: Int32  # path pages, then owned pages, in order of position
    copy: tuple[int, int] | None  # (page, k): copy that page to the first owned one; its first k tokens are valid
    report: Explanation
    node: Node  # internal: where the path ends
    source: Node | None  # internal: the node of the copied page, locked until the next publish or release
    grown: Node | None = None  # internal: the node that this lease added
    scores_ahead: tuple[int, Scores] | None = None  # internal: (position, score) of a token whose page is not reserved
    released: bool = False

    @property
    def owned(self) -> int:
        """Number of pages of this lease that are not in the tree."""
        return len(self.pages) - self.length // self.page_size
