"""KV events as vLLM and SGLang publish them, so that routers written for those follow this engine too.

A message on the wire is three frames: topic (empty), sequence number (8 bytes, big-endian), and a msgpack
`KVEventBatch`: an array ``[ts, events, rank]`` of maps tagged ``type``. Block hashes are unsigned 64-bit integers:
Dynamo rejects the batch of a byte-string hash.
"""

from __future__ import annotations

import msgspec

MEDIUM_DEVICE, MEDIUM_HOST, MEDIUM_DISK = "GPU", "CPU_PINNED", "DISK"  # SGLang's names; "GPU" is any device
# The media of this engine and of vLLM, as levels: 0 is the fastest.
LEVELS = {None: 0, MEDIUM_DEVICE: 0, MEDIUM_HOST: 1, "CPU": 1, MEDIUM_DISK: 2, "STORAGE": 2}
SLOWEST = 2
END_OF_REPLAY = (-1).to_bytes(8, "big", signed=True)


class KVEvent(msgspec.Struct, tag_field="type", tag=True, omit_defaults=True, gc=False):
    """Base of the events; ``type`` is the class name."""


class BlockStored(KVEvent):
    """Consecutive blocks entered a tier. ``token_ids`` [len(block_hashes) * block_size]."""

    block_hashes: list[int]
    parent_block_hash: int | None  # the block before the first; None at the start of a prompt
    token_ids: list[int]
    block_size: int
    lora_id: int | None
    medium: str | None = None
    cache_salt: str | None = None  # the namespace; None: the default one


class StoredHashes(KVEvent, tag="BlockStored"):
    """A `BlockStored` as an index reads it: decoding skips the tokens."""

    block_hashes: list[int]
    medium: str | None = None


class BlockRemoved(KVEvent):
    """Blocks left a tier; what continues them has left before."""

    block_hashes: list[int]
    medium: str | None = None


class AllBlocksCleared(KVEvent):
    """No tier has a block any more."""


IndexEvent = StoredHashes | BlockRemoved | AllBlocksCleared


class KVEventBatch(msgspec.Struct, array_like=True, gc=False):
    """The events of one step of the engine, in order."""

    ts: float  # Unix seconds
    events: list[BlockStored | BlockRemoved | AllBlocksCleared]
    data_parallel_rank: int | None = None


class KVSnapshot(msgspec.Struct):
    """Everything that is cached, as one batch, after the batches up to number ``seq`` (-1: none was published)."""

    seq: int
    block_size: int
    batch: KVEventBatch


def sequence_frame(number: int) -> bytes:
    """A sequence number as a frame."""
    return number.to_bytes(8, "big", signed=True)


def sequence_number(frame: bytes) -> int:
    """The number of a frame made by `sequence_frame`."""
    return int.from_bytes(frame, "big", signed=True)
