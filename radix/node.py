"""One node of the tree: a run of whole pages, or one partial page."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice, takewhile
from types import MappingProxyType
from typing import Any

import numpy as np
import numpy.typing as npt
from sortedcontainers import SortedList

Int32 = npt.NDArray[np.int32]
Namespace = tuple[str, str]  # (owner, salt); no lookup crosses from one namespace to another

DEFAULT: Namespace = ("", "")
TOKEN_BYTES = 4
SIBLINGS = 32  # examined in either direction for a page with the same beginning
DEVICE, HOST, DISK = 0, 1, 2  # the memory tiers: see `tiers.Tier`
FILE = 3  # the other end of a transfer that concerns no tier: see `files`

EMPTY: Int32 = np.empty(0, np.int32)
EMPTY.setflags(write=False)
_NONE_BELOW: Any = (0, 0, 0)  # `Node.below` of all nodes without children
_CHILDLESS: Any = MappingProxyType({})  # shared by all leaves


def page_key(tokens: Int32) -> bytes:
    """Encodes up to a page of tokens big-endian, so that byte order is token order and prefixes stay prefixes."""
    return tokens.astype(">i4").tobytes()


def common_tokens(a: bytes, b: bytes) -> int:
    """Length in tokens of the longest common prefix of two keys."""
    n = min(len(a), len(b))
    differing = int.from_bytes(a[:n], "big") ^ int.from_bytes(b[:n], "big")
    return (8 * n - differing.bit_length()) // (8 * TOKEN_BYTES)


def join(arrays: list[Int32]) -> Int32:
    """Concatenates; no arrays give an empty one, which is shared and read-only."""
    return np.concatenate(arrays) if arrays else EMPTY


class Children(dict[bytes, "Node"]):
    """A node's children by key. The keys are sorted when neighbours are first looked up: most requests that end leave a
    partial page as an only child, and making an empty `SortedDict` for it was a third of the cost of ending them."""

    __slots__ = ("_order",)

    def __init__(self) -> None:
        self._order: SortedList | None = None

    @property
    def order(self) -> SortedList:
        """The keys, sorted."""
        if self._order is None:
            self._order = SortedList(self)
        return self._order

    def __setitem__(self, key: bytes, child: Node) -> None:
        if self._order is not None and key not in self:
            self._order.add(key)
        super().__setitem__(key, child)

    def __delitem__(self, key: bytes) -> None:
        super().__delitem__(key)
        if self._order is not None:
            self._order.remove(key)


class Node:
    """A run of tokens, int32 [n], and where their keys and values are: int32 [n / page_size] in each memory tier that
    has a copy, empty in the others. ``pages`` are page numbers on the device, ``host`` and ``disk`` slots of the lower
    tiers (`tiers.Tier`). A node has a copy in at least one tier; a copy is of all its pages.

    A *partial page* is a leaf with one page and fewer tokens than fit in it. ``serial`` identifies the position at
    which the node *ends*. It changes whenever that position moves, so that an `explain.EvictionRecord` entry about
    what followed a node never applies to another position.
    """

    __slots__ = (
        "below",
        "children",
        "created",
        "disk",
        "hits",
        "host",
        "key",
        "last_access",
        "locks",
        "pages",
        "parent",
        "priority",
        "serial",
        "tokens",
        "transfer",
    )

    def __init__(self, tokens: Int32, pages: Int32, key: bytes, parent: Node | None, serial: int | Namespace) -> None:
        self.tokens = tokens
        self.pages = pages
        self.key = key  # page_key of the first page: the key under which the parent files this node
        self.parent = parent
        self.children: Children = _CHILDLESS
        self.serial = serial
        self.host = self.disk = EMPTY
        self.below: list[int] = _NONE_BELOW  # children with a copy in each tier
        self.transfer: object = None  # the `moves.Transfer` that copies this node to a higher tier
        self.locks = 0  # leases, holds and transfers whose path includes this node, and leases that copy from it
        self.hits = 0  # matches that reused this node
        self.priority = 0  # the highest priority of the requests that used it
        self.created = 0  # logical time
        self.last_access = 0  # logical time

    def add_child(self, child: Node) -> None:
        """Files ``child`` under its key and becomes its parent."""
        if self.children is _CHILDLESS:
            self.children, self.below = Children(), [0, 0, 0]
        self.children[child.key] = child
        child.parent = self

    def remove_child(self, child: Node) -> None:
        """Removes a child; its ``parent`` is left as it is."""
        del self.children[child.key]
        if not self.children:
            self.children, self.below = _CHILDLESS, _NONE_BELOW

    def covering(self, key: bytes, but: Node | None = None) -> Node | None:
        """A child other than ``but`` on the device whose first page begins with ``key``. Children that share the key
        are neighbours, and the nearest are examined."""
        _, after = self.nearest_first(key)
        beginning = takewhile(lambda child: child.key.startswith(key), islice(after, SIBLINGS))
        return next((child for child in beginning if child is not but and len(child.pages)), None)

    def nearest_first(self, key: bytes) -> tuple[Iterator[Node], Iterator[Node]]:
        """The children before ``key`` and those at or after it; in each, ever fewer leading tokens are shared."""
        children = self.children
        if not children:
            return iter(()), iter(())
        order = children.order
        at = order.bisect_left(key)
        before = (children[order[i]] for i in range(at - 1, -1, -1))
        after = (children[order[i]] for i in range(at, len(order)))
        return before, after

    def nearest_below(self, key: bytes) -> Node | None:
        """The child that only lower tiers have and that shares most leading tokens with ``key``, at least one. Of those
        that share some, the nearest are examined."""
        best, most = None, 0
        for side in self.nearest_first(key) if self.below[HOST] or self.below[DISK] else ():
            for child in islice(side, SIBLINGS):
                shared = common_tokens(child.key, key)
                if not shared:
                    break
                if not len(child.pages):
                    if shared > most:
                        best, most = child, shared
                    break
        return best

    def upwards(self, top: Node | None = None) -> Iterator[Node]:
        """This node and its ancestors, below ``top`` (None: up to and including the root)."""
        node: Node | None = self
        while node is not top and node is not None:
            yield node
            node = node.parent


class Root(Node):
    """The root of one namespace: no tokens, no pages. Its serial is the namespace, so records of it survive it."""

    __slots__ = ("namespace",)

    def __init__(self, namespace: Namespace) -> None:
        super().__init__(EMPTY, EMPTY, b"", None, namespace)
        self.namespace = namespace
