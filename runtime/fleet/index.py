"""Which replicas have which prefixes cached, from their KV events."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import numpy.typing as npt

from .kv_events import LEVELS, SLOWEST, BlockRemoved, IndexEvent, StoredHashes

Int64 = npt.NDArray[np.int64]
Float64 = npt.NDArray[np.float64]
CREDITS = (1.0, 0.75, 0.25)  # of a block on the device, in host memory and on a disk, as in Dynamo's router
_NONE: Mapping[int, int] = {}


class InFlightBlocks:
    """Blocks of the prompts that a router has sent to replicas and that have not ended: they are cached there, or will
    be once the prompt is computed, which no event has announced yet."""

    def __init__(self) -> None:
        self.holders: dict[int, int] = {}  # by block hash, a bit set of replicas
        self._more: dict[tuple[int, int], int] = {}  # (hash, replica) -> prompts beyond the first

    def add(self, replica: int, hashes: Iterable[int]) -> None:
        """A prompt with these blocks was sent to the replica."""
        bit, holders, more = 1 << replica, self.holders, self._more
        for each in hashes:
            known = holders.get(each, 0)
            if known & bit:
                more[each, replica] = more.get((each, replica), 0) + 1
            else:
                holders[each] = known | bit

    def remove(self, replica: int, hashes: Iterable[int]) -> None:
        """The prompt has ended. Each `add` is undone by one call with the same arguments."""
        bit, holders, more = 1 << replica, self.holders, self._more
        for each in hashes:
            if (count := more.get((each, replica), 0)) > 1:
                more[each, replica] = count - 1
            elif count:
                del more[each, replica]
            elif left := holders[each] & ~bit:
                holders[each] = left
            else:
                del holders[each]


class PrefixIndex:
    """Block hashes of many replicas, numbered 0 .. n - 1.

    For each hash and level of memory (`kv_events.LEVELS`), a bit set (a Python integer) of the replicas that have the
    block there. A tree holds a block only with all that precede it, so the set of a block is within that of the block
    before, and `overlap` finds where it shrinks by galloping instead of looking at every block. About 150 bytes a
    distinct block and level.
    """

    def __init__(self) -> None:
        self._holders: list[dict[int, int]] = [{} for _ in range(SLOWEST + 1)]
        self._blocks: list[dict[int, set[int]]] = [{} for _ in range(SLOWEST + 1)]  # by replica, to remove it

    def __len__(self) -> int:
        return sum(map(len, self._holders))

    def blocks(self, replica: int) -> int:
        """Blocks that the replica has, one on two levels counted twice."""
        return sum(len(blocks.get(replica, ())) for blocks in self._blocks)

    def apply(self, replica: int, events: Iterable[IndexEvent]) -> None:
        """Applies one batch of a replica's events. Storing a block twice or removing an unknown one has no effect."""
        for event in events:
            if isinstance(event, StoredHashes):
                self.store(replica, event.block_hashes, event.medium)
            elif isinstance(event, BlockRemoved):
                self.remove(replica, event.block_hashes, event.medium)
            else:
                self.clear(replica)

    def store(self, replica: int, hashes: Iterable[int], medium: str | None = None) -> None:
        """Adds blocks of a replica in a medium. An unknown medium counts as the slowest."""
        level = LEVELS.get(medium, SLOWEST)
        bit, holders, blocks = 1 << replica, self._holders[level], self._blocks[level].setdefault(replica, set())
        for each in hashes:
            holders[each] = holders.get(each, 0) | bit
            blocks.add(each)

    def remove(self, replica: int, hashes: Iterable[int], medium: str | None = None) -> None:
        """Removes blocks of a replica from a medium."""
        self._remove(replica, hashes, LEVELS.get(medium, SLOWEST))

    def _remove(self, replica: int, hashes: Iterable[int], level: int) -> None:
        bit, holders, blocks = 1 << replica, self._holders[level], self._blocks[level].setdefault(replica, set())
        for each in hashes:
            blocks.discard(each)
            left = holders.get(each, 0) & ~bit
            if left:
                holders[each] = left
            else:
                holders.pop(each, None)

    def clear(self, replica: int) -> None:
        """Removes all blocks of a replica."""
        for level, blocks in enumerate(self._blocks):
            if replica in blocks:
                self._remove(replica, tuple(blocks[replica]), level)
                del blocks[replica]

    def credit(self, hashes: Sequence[int], replicas: int, in_flight: Mapping[int, int] = _NONE) -> Float64:
        """Leading blocks of a prompt that each replica has, in blocks on the device: float64 [replicas]. Blocks that
        only a slower level has count less (`CREDITS`). ``in_flight``: see `overlap`."""
        found = self.overlap(hashes, replicas, 0, in_flight)
        total = found.astype(np.float64)
        for level in range(1, SLOWEST + 1):
            if self._holders[level]:
                further = np.maximum(self.overlap(hashes, replicas, level, in_flight), found)
                total += (further - found) * CREDITS[level]
                found = further
        return total

    def overlap(
        self, hashes: Sequence[int], replicas: int, slowest: int = 0, in_flight: Mapping[int, int] = _NONE
    ) -> Int64:
        """Number of leading blocks of a prompt that each replica has on levels up to ``slowest``: int64 [replicas].
        ``in_flight``: by block hash, a bit set of replicas that count as having it too (`InFlightBlocks`)."""
        found = np.zeros(replicas, np.int64)
        levels = [holders for holders in (*self._holders[: slowest + 1], in_flight) if holders]

        def having(block: int) -> int:
            having = 0
            for holders in levels:
                having |= holders.get(hashes[block], 0)
            return having

        depth, end = 0, len(hashes)
        mask = having(0) if end else 0
        while mask:
            # All of ``mask`` have blocks 0 .. depth. Find the last block that they all have.
            known, step = depth, 1
            while known + step < end and having(known + step) & mask == mask:
                known += step
                step *= 2
            while step > 1:
                step //= 2
                if known + step < end and having(known + step) & mask == mask:
                    known += step
            further = having(known + 1) & mask if known + 1 < end else 0
            found[_members(mask & ~further, replicas)] = known + 1
            depth, mask = known + 1, further
        return found


def _members(mask: int, replicas: int) -> npt.NDArray[np.bool_]:
    """A bit set as bool [replicas]."""
    data = np.frombuffer(mask.to_bytes(-(-max(replicas, mask.bit_length()) // 8), "little"), np.uint8)
    return np.unpackbits(data, count=replicas, bitorder="little").view(np.bool_)
