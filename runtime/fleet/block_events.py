"""Turns what a radix tree says about pages into KV events about blocks."""

from __future__ import annotations

import time
from typing import Any

import numpy as np

from ...radix.events import ROOT, PagesEntered, PagesLeft
from ...radix.node import DEFAULT, Namespace
from ...radix.tree import RadixTree
from .hashes import block_hashes, root_hash
from .kv_events import MEDIUM_DEVICE, AllBlocksCleared, BlockRemoved, BlockStored, KVEventBatch, KVSnapshot


class BlockEvents:
    """Subscribes to a tree, and collects events until `take`. A block is a whole page: partial pages are left out,
    since other engines have none.

    It keeps one hash a page, so that neither the parent of an event nor a removal needs the tokens before it.
    """

    def __init__(self, tree: RadixTree) -> None:
        self._tree = tree
        self._hashes = np.zeros(tree.allocator.total, np.uint64)  # by page number
        self._events: list[BlockStored | BlockRemoved | AllBlocksCleared] = []
        self._flushed = False
        tree.subscribe(self)

    def pages_entered(self, event: PagesEntered) -> None:
        size = self._tree.page_size
        whole = len(event.tokens) // size
        if not whole:
            return
        parent = None if event.parent == ROOT else int(self._hashes[event.parent])
        tokens = event.tokens[: whole * size]
        hashes = block_hashes(tokens, size, root_hash(event.namespace) if parent is None else parent)
        self._hashes[event.pages[:whole]] = hashes
        stored = BlockStored(hashes, parent, tokens.tolist(), size, None, MEDIUM_DEVICE, salt_name(event.namespace))
        self._events.append(stored)

    def pages_left(self, event: PagesLeft) -> None:
        whole = len(event.tokens) // self._tree.page_size
        self._flushed |= event.reason == "flushed"
        if not whole:
            return
        hashes = self._hashes[event.pages[:whole]].tolist()
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
            whole = len(event.tokens) // size
            if whole:
                parent = None if event.parent == ROOT else int(self._hashes[event.parent])
                hashes = self._hashes[event.pages[:whole]].astype("<u8").tobytes()
                tokens = event.tokens[: whole * size].astype("<i4").tobytes()
                found.append((salt_name(event.namespace), parent, hashes, tokens))
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
