"""Hashes of KV blocks: whole pages of a prompt, each with all that precede it.

A hash names a prefix in KV events and in a router's index. Two prefixes with one hash could cost a router a wrong
choice, never a wrong answer: a replica's tree compares tokens.
"""

from __future__ import annotations

import numpy as np
import xxhash

from ...radix.node import DEFAULT, Int32, Namespace


def root_hash(namespace: Namespace) -> int:
    """The hash that precedes the first block of a prompt: of its namespace; 0 for the default one."""
    if namespace == DEFAULT:
        return 0
    owner, salt = namespace
    return xxhash.xxh3_64_intdigest(f"{len(owner)}:{owner}{salt}".encode())


def block_hashes(tokens: Int32, block_size: int, after: int = 0) -> list[int]:
    """The 64-bit hash of each whole block of ``tokens``, the first one following the block of hash ``after``.

    The hash of a block is xxh3_64 of its token ids (int32, little-endian), seeded by the hash before it.
    """
    data, step = np.asarray(tokens, "<i4").tobytes(), 4 * block_size
    hashes = []
    for start in range(0, len(data) - step + 1, step):
        after = xxhash.xxh3_64_intdigest(data[start : start + step], after)
        hashes.append(after)
    return hashes
