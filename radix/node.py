"""One node of the tree: a run of whole pages, or a stub of less than one page."""

from __future__ import annotations

from collections.abc import Iterator
from types import MappingProxyType
from typing import Any

import numpy as np
import numpy.typing as npt
from sortedcontainers import SortedDict

Int32 = npt.NDArray[np.int32]
Namespace = tuple[str, str]  # (owner, salt): trees of different namespaces never meet

DEFAULT: Namespace = ("", "")
TOKEN_BYTES = 4

_CHILDLESS: Any = MappingProxyType({})  # shared by all leaves: a SortedDict of its own would cost 2 kB


def page_key(tokens: Int32) -> bytes:
    """Up to a page of tokens as big-endian bytes: byte order is then token order, and prefixes are prefixes."""
    return tokens.astype(">i4").tobytes()


def common_tokens(a: bytes, b: bytes) -> int:
    """Length in tokens of the longest common prefix of two keys."""
    n = min(len(a), len(b))
    differing = int.from_bytes(a[:n], "big") ^ int.from_bytes(b[:n], "big")
    return (8 * n - differing.bit_length()) // (8 * TOKEN_BYTES)


class Node:
    """A run of tokens and the pages that hold their keys and values.

    ``len(tokens) == page_size * len(pages)``, except for a *stub*: a leaf with one page and fewer tokens than it
    has room for. ``serial`` names the place where the node *ends*: it changes whenever that place moves, so a note
    about what once followed (see `explain.EvictionRecord`) can never be read at another place.
    """

    __slots__ = (
        "children",
        "created",
        "hits",
        "key",
        "last_access",
        "locks",
        "pages",
        "parent",
        "priority",
        "serial",
        "tokens",
    )

    def __init__(self, tokens: Int32, pages: Int32, key: bytes, parent: Node | None, serial: int | Namespace) -> None:
        self.tokens = tokens
        self.pages = pages
        self.key = key  # page_key of the first page: the name under which the parent knows this node
        self.parent = parent
        self.children: SortedDict = _CHILDLESS  # key -> Node
        self.serial = serial
        self.locks = 0  # leases whose path runs through here, or that copy from here
        self.hits = 0  # matches that reused this node
        self.priority = 0  # the highest of the requests that used it
        self.created = 0  # logical time
        self.last_access = 0  # logical time

    def adopt(self, child: Node) -> None:
        if self.children is _CHILDLESS:
            self.children = SortedDict()
        self.children[child.key] = child
        child.parent = self

    def disown(self, child: Node) -> None:
        del self.children[child.key]
        if not self.children:
            self.children = _CHILDLESS

    def neighbours(self, key: bytes) -> list[Node]:
        """The children just before and at or after a key: no other child shares more leading tokens with it."""
        if not self.children:
            return []
        at = self.children.bisect_left(key)
        return [self.children.peekitem(i)[1] for i in (at - 1, at) if 0 <= i < len(self.children)]

    def from_nearest(self, key: bytes) -> tuple[Iterator[Node], Iterator[Node]]:
        """The children before a key and those at or after it, each nearest first: ever fewer leading tokens shared."""
        children = self.children
        at = children.bisect_left(key) if children else 0
        before = (children.peekitem(i)[1] for i in range(at - 1, -1, -1))
        after = (children.peekitem(i)[1] for i in range(at, len(children)))
        return before, after

    def upwards(self, top: Node | None = None) -> Iterator[Node]:
        """This node and its ancestors, below ``top`` (None: up to and including the root)."""
        node: Node | None = self
        while node is not top and node is not None:
            yield node
            node = node.parent


class Root(Node):
    """The root of one namespace: no tokens, no pages. Its serial is the namespace, so notes about it outlive it."""

    __slots__ = ("namespace",)

    def __init__(self, namespace: Namespace) -> None:
        empty = np.empty(0, np.int32)
        super().__init__(empty, empty, b"", None, namespace)
        self.namespace = namespace
