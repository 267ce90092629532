"""Turns what a radix tree says about pages into KV events about blocks."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import numpy.typing as npt

from ...radix.events import ROOT, PagesEntered, PagesLeft
from ...radix.node import DEFAULT, Namespace
from ...radix.tree import RadixTree
from .hashes import block_hashes, root_hash
from .kv_events import MEDIUM_DEVICE, AllBlocksCleared, BlockRemoved, BlockStored, KVEventBatch, KVSnapshot

Uint64 = npt.NDArray[np.uint64]


class PageHashes:
    """The block hash of each page of a tree, by page number, so that neither the parent of an event nor a removal needs
    the tokens before it. A block is a whole page: partial pages are left out, since other engines have none."""

    def __init__(self, tree: RadixTree) -> None:
        self._page_size = tree.page_size
        self._hashes = np.zeros(tree.allocator.total, np.uint64)

    def enter(self, event: PagesEntered) -> list[int]:
        """The hashes of the blocks that entered."""
        whole = len(event.tokens) // self._page_size
        if not whole:
            return []
        parent = self.parent(event)
        after = root_hash(event.namespace) if parent is None else parent
        hashes = block_hashes(event.tokens, self._page_size, after)
        self._hashes[event.pages[:whole]] = hashes
        return hashes

    def of(self, event: PagesEntered | PagesLeft) -> Uint64:
        """The hashes of blocks that have entered: uint64 [n]."""
        return self._hashes[event.pages[: len(event.tokens) // self._page_size]]

    def parent(self, event: PagesEntered | PagesLeft) -> int | None:
        """The hash of the block before those of an event; None at the start of a prompt."""
        return None if event.parent == ROOT else int(self._hashes[event.parent])


class BlockEvents:
    """Subscribes to a tree, and collects events until `take`."""

    def __init__(self, tree: RadixTree) -> None:
        self._tree = tree
        self._hashes = PageHashes(tree)
        self._events: list[BlockStored | BlockRemoved | AllBlocksCleared] = []
        self._flushed = False
        tree.subscribe(self)

    def pages_entered(self, event: PagesEntered) -> None:
        size, hashes = self._tree.page_size, self._hashes.enter(event)
        if hashes:
            parent, salt = self._hashes.parent(event), salt_name(event.namespace)
            tokens = event.tokens[: len(hashes) * size].tolist()
            self._events.append(BlockStored(hashes, parent, tokens, size, None, MEDIUM_DEVICE, salt))

    def pages_left(self, event: PagesLeft) -> None:
        self._flushed |= event.reason == "flushed"
        hashes = self._hashes.of(event).tolist()
        if not hashes:
            return
        if self._events and isinstance(self._events[-1], BlockRemoved):
            self._events[-1].block_hashes += hashes
        else:
            self._events.append(BlockRemoved(hashes, MEDIUM_DEVICE))

    def take(self) -> KVEventBatch | None:
        """The events since the last call, or None."""
        if not self._events:
            return None
        events, self._events = self._events, []
        if self._flushed and not self._tree.cached:
            events = [AllBlocksCleared()]
        self._flushed = False
        return KVEventBatch(time.time(), events, 0)

    def contents(self) -> list[tuple[str | None, int | None, bytes, bytes]]:
        """All blocks, parents before children: (cache_salt, parent's hash, hashes as uint64, tokens as int32).

        The compact form of `snapshot`: this runs between two steps, so it makes no object for each token.
        """
        size = self._tree.page_size
        found: list[tuple[str | None, int | None, bytes, bytes]] = []
        for event in self._tree.structure.contents():
            hashes = self._hashes.of(event)
            if len(hashes):
                tokens = event.tokens[: len(hashes) * size].astype("<i4").tobytes()
                salt, parent = salt_name(event.namespace), self._hashes.parent(event)
                found.append((salt, parent, hashes.astype("<u8").tobytes(), tokens))
        return found


def snapshot(facts: dict[str, Any]) -> KVSnapshot:
    """A snapshot from ``seq``, ``block_size`` and ``contents`` (`BlockEvents.contents`)."""
    events: list[BlockStored | BlockRemoved | AllBlocksCleared] = [
        BlockStored(
            np.frombuffer(hashes, "<u8").tolist(),
            parent,
            np.frombuffer(tokens, "<i4").tolist(),
            facts["block_size"],
            None,
            MEDIUM_DEVICE,
            salt,
        )
        for salt, parent, hashes, tokens in facts["contents"]
    ]
    return KVSnapshot(facts["seq"], facts["block_size"], KVEventBatch(time.time(), events, 0))


def salt_name(namespace: Namespace) -> str | None:
    """A namespace as the ``cache_salt`` of an event. Owner and salt are digests already."""
    return None if namespace == DEFAULT else "/".join(namespace)
