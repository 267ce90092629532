"""Converts a radix tree's page events into KV events about blocks."""

from __future__ import annotations

import time
from collections.abc import Iterator
from itertools import chain
from typing import Any

import numpy as np
import numpy.typing as npt

from ...radix.events import ROOT, CopiesEntered, CopiesLeft, Event, PagesEntered, PagesLeft
from ...radix.node import DEFAULT, DEVICE, DISK, HOST, Int32, Namespace
from ...radix.tree import RadixTree
from .hashes import block_hashes, root_hash
from .kv_events import (
    MEDIUM_DEVICE,
    MEDIUM_DISK,
    MEDIUM_HOST,
    AllBlocksCleared,
    BlockRemoved,
    BlockStored,
    KVEventBatch,
    KVSnapshot,
)

Uint64 = npt.NDArray[np.uint64]
Blocks = tuple[str, str | None, int | None, bytes, bytes]
MEDIA = {DEVICE: MEDIUM_DEVICE, HOST: MEDIUM_HOST, DISK: MEDIUM_DISK}


class PageHashes:
    """The block hash of each page of a tree, by its slot in each tier, so that neither the parent of an event nor a
    removal needs the tokens before it. A block is a whole page: partial pages are left out, since other engines have
    none."""

    def __init__(self, tree: RadixTree) -> None:
        self._page_size = tree.page_size
        self._hashes = {tier.number: np.zeros(tier.slots.total, np.uint64) for tier in tree.structure.tiers}

    def enter(self, event: PagesEntered | CopiesEntered) -> list[int]:
        """The hashes of the blocks that entered."""
        whole = len(event.tokens) // self._page_size
        if not whole:
            return []
        if event.copied is not None:  # they were hashed when they entered that tier
            tier, slots = event.copied
            hashes: list[int] = self._hashes[tier][slots[:whole]].tolist()
        else:
            parent = self.parent(event)
            after = root_hash(event.namespace) if parent is None else parent
            hashes = block_hashes(event.tokens, self._page_size, after)
        tier, slots = _place(event)
        self._hashes[tier][slots[:whole]] = hashes
        return hashes

    def of(self, event: PagesEntered | PagesLeft | CopiesEntered | CopiesLeft) -> Uint64:
        """The hashes of blocks that have entered: uint64 [n]."""
        tier, slots = _place(event)
        return self._hashes[tier][slots[: len(event.tokens) // self._page_size]]

    def parent(self, event: PagesEntered | CopiesEntered) -> int | None:
        """The hash of the block before those of an event; None at the start of a prompt."""
        if isinstance(event, CopiesEntered):
            before = event.before
        else:
            before = None if event.parent == ROOT else (DEVICE, event.parent)
        return None if before is None else int(self._hashes[before[0]][before[1]])


def _place(event: Event) -> tuple[int, Int32]:
    """The tier and the slots of an event."""
    return (event.tier, event.slots) if isinstance(event, CopiesEntered | CopiesLeft) else (DEVICE, event.pages)


class BlockEvents:
    """Subscribes to a tree and its lower tiers, and collects events until `take`. A block in several tiers was stored
    once in the medium of each."""

    def __init__(self, tree: RadixTree) -> None:
        self._tree = tree
        self._hashes = PageHashes(tree)
        self._events: list[BlockStored | BlockRemoved | AllBlocksCleared] = []
        self._flushed = False
        tree.subscribe(self._add, lower_tiers=True)

    def _add(self, event: Event) -> None:
        if isinstance(event, PagesEntered | CopiesEntered):
            self._stored(event)
        else:
            self._flushed |= isinstance(event, PagesLeft) and event.reason == "flushed"
            self._removed(event)

    def _stored(self, event: PagesEntered | CopiesEntered) -> None:
        size, hashes = self._tree.page_size, self._hashes.enter(event)
        if hashes:
            parent, salt = self._hashes.parent(event), salt_name(event.namespace)
            tokens = event.tokens[: len(hashes) * size].tolist()
            self._events.append(BlockStored(hashes, parent, tokens, size, None, MEDIA[_place(event)[0]], salt))

    def _removed(self, event: PagesLeft | CopiesLeft) -> None:
        hashes, medium = self._hashes.of(event).tolist(), MEDIA[_place(event)[0]]
        if not hashes:
            return
        last = self._events[-1] if self._events else None
        if isinstance(last, BlockRemoved) and last.medium == medium:
            last.block_hashes += hashes
        else:
            self._events.append(BlockRemoved(hashes, medium))

    def take(self) -> KVEventBatch | None:
        """The events since the last call, or None."""
        if not self._events:
            return None
        events, self._events = self._events, []
        if self._flushed and not any(tier.cached for tier in self._tree.structure.tiers):
            events = [AllBlocksCleared()]
        self._flushed = False
        return KVEventBatch(time.time(), events, 0)

    def contents(self) -> list[Blocks]:
        """All blocks, parents before children: (medium, cache_salt, parent's hash, hashes as uint64, tokens as int32).

        The compact form of `snapshot`: this runs between two steps, so it makes no object for each token.
        """
        size, structure = self._tree.page_size, self._tree.structure
        found: list[Blocks] = []
        events: Iterator[PagesEntered | CopiesEntered] = chain(structure.contents(), structure.copies())
        for event in events:
            hashes = self._hashes.of(event)
            if len(hashes):
                tokens = event.tokens[: len(hashes) * size].astype("<i4").tobytes()
                medium, salt = MEDIA[_place(event)[0]], salt_name(event.namespace)
                found.append((medium, salt, self._hashes.parent(event), hashes.astype("<u8").tobytes(), tokens))
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
            medium,
            salt,
        )
        for medium, salt, parent, hashes, tokens in facts["contents"]
    ]
    return KVSnapshot(facts["seq"], facts["block_size"], KVEventBatch(time.time(), events, 0))


def salt_name(namespace: Namespace) -> str | None:
    """A namespace as the ``cache_salt`` of an event. Owner and salt are digests already."""
    return None if namespace == DEFAULT else "/".join(namespace)
