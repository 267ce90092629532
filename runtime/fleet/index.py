"""Which replicas have which prefixes cached, from their KV events."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import numpy.typing as npt

from .kv_events import AllBlocksCleared, BlockRemoved, BlockStored

Int64 = npt.NDArray[np.int64]


class PrefixIndex:
    """Block hashes of many replicas, numbered 0 .. n - 1.

    For each hash, a bit set (a Python integer) of the replicas that have the block. A tree holds a block only with all
    that precede it, so the set of a block is within that of the block before, and `overlap` finds where it shrinks by
    galloping instead of looking at every block. About 150 bytes a distinct block.
    """

    def __init__(self) -> None:
        self._holders: dict[int, int] = {}
        self._blocks: dict[int, set[int]] = {}  # by replica, to remove it

    def __len__(self) -> int:
        return len(self._holders)

    def blocks(self, replica: int) -> int:
        """Blocks that the replica has."""
        return len(self._blocks.get(replica, ()))

    def apply(self, replica: int, events: Iterable[BlockStored | BlockRemoved | AllBlocksCleared]) -> None:
        """Follows one batch of a replica's events. A block that is stored twice or removed unseen has no effect."""
        for event in events:
            if isinstance(event, BlockStored):
                self.store(replica, event.block_hashes)
            elif isinstance(event, BlockRemoved):
                self.remove(replica, event.block_hashes)
            else:
                self.clear(replica)

    def store(self, replica: int, hashes: Iterable[int]) -> None:
        """The replica has these blocks now."""
        bit, holders, blocks = 1 << replica, self._holders, self._blocks.setdefault(replica, set())
        for each in hashes:
            holders[each] = holders.get(each, 0) | bit
            blocks.add(each)

    def remove(self, replica: int, hashes: Iterable[int]) -> None:
        """The replica has these blocks no longer."""
        bit, holders, blocks = 1 << replica, self._holders, self._blocks.setdefault(replica, set())
        for each in hashes:
            blocks.discard(each)
            left = holders.get(each, 0) & ~bit
            if left:
                holders[each] = left
            else:
                holders.pop(each, None)

    def clear(self, replica: int) -> None:
        """The replica has nothing, or is gone: its number may be used again."""
        self.remove(replica, tuple(self._blocks.pop(replica, ())))
        del self._blocks[replica]

    def overlap(self, hashes: Sequence[int], replicas: int) -> Int64:
        """How many of a prompt's first blocks each of ``replicas`` replicas has: int64 [replicas]."""
        found = np.zeros(replicas, np.int64)
        get, end = self._holders.get, len(hashes)
        depth = 0
        mask = get(hashes[0], 0) if end else 0
        while mask:
            # All of ``mask`` have blocks 0 .. depth. Find the last block that they all have.
            known, step = depth, 1
            while known + step < end and get(hashes[known + step], 0) & mask == mask:
                known += step
                step *= 2
            while step > 1:
                step //= 2
                if known + step < end and get(hashes[known + step], 0) & mask == mask:
                    known += step
            further = get(hashes[known + 1], 0) & mask if known + 1 < end else 0
            found[_members(mask & ~further, replicas)] = known + 1
            depth, mask = known + 1, further
        return found


def _members(mask: int, replicas: int) -> npt.NDArray[np.bool_]:
    """A bit set as bool [replicas]."""
    data = np.frombuffer(mask.to_bytes(-(-max(replicas, mask.bit_length()) // 8), "little"), np.uint8)
    return np.unpackbits(data, count=replicas, bitorder="little").view(np.bool_)
