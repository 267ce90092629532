"""Recorded arrivals of requests: prompts as ids of the blocks that they share, and lengths.

Two formats are read. Mooncake's (JSON lines; kvcache-ai/Mooncake, FAST '25): ``timestamp`` in ms, ``input_length``,
``output_length``, and ``hash_ids`` of 512-token blocks, global. Weka's (JSON lines, one session a line;
kv-cache-tester): requests with ``t`` in seconds from the session's start, ``in``, ``out``, and ids of 64-token blocks
of the session, as ``hash_ids`` or as inclusive ranges in ``hash_id_ranges``.
"""

from __future__ import annotations

import gzip
import json
import random
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ...radix.node import Int32
from ..errors import LoadError, why

MOONCAKE_BLOCK = 512
SESSION_HOURS = 8.0  # sessions of a trace without start times begin at random within so long
_MAX_TOKEN = 2**31 - 1


class Arrival(NamedTuple):
    """One request of a trace."""

    seconds: float
    session: int  # requests of one conversation, as far as the trace tells
    blocks: Int32  # [n] ids of the prompt's blocks
    block_size: int
    prompt_tokens: int  # at most n * block_size
    output_tokens: int

    def tokens(self) -> Int32:
        """Token ids for the prompt: two prompts share a prefix of them exactly where they share blocks."""
        first: Int32 = (self.blocks * np.int64(self.block_size) % (_MAX_TOKEN - self.block_size)).astype(np.int32)
        tokens: Int32 = np.add.outer(first, np.arange(self.block_size, dtype=np.int32))
        return tokens.reshape(-1)[: self.prompt_tokens]


def read_trace(path: Path, *, seed: int = 0, max_requests: int | None = None) -> list[Arrival]:
    """The arrivals of a trace in order. A name that ends in .gz is unpacked. Raises `LoadError`.

    ``seed``: of the start times of sessions that have none.
    """
    try:
        with gzip.open(path, "rt") if path.suffix == ".gz" else path.open() as lines:
            rows = [json.loads(line) for line in lines if line.strip()]
        arrivals = list(_mooncake(rows) if rows and "hash_ids" in rows[0] else _weka(rows, random.Random(seed)))
    except (OSError, EOFError, zlib.error) as error:  # the last two: of a packed file that is damaged
        raise LoadError(f"{path} cannot be read: {why(error, path)}") from error
    except (ValueError, KeyError, TypeError) as error:
        what = f"a line has no {error}" if isinstance(error, KeyError) else why(error, path)
        raise LoadError(f"{path} is not a trace in Mooncake's or Weka's format: {what}") from error
    if not arrivals:
        raise LoadError(f"{path} has no requests")
    arrivals.sort(key=lambda each: each.seconds)
    return arrivals[:max_requests]


def _mooncake(rows: list[dict[str, Any]]) -> Iterator[Arrival]:
    for row in rows:
        blocks = np.array(row["hash_ids"], np.int32)
        tokens = max(1, min(int(row["input_length"]), len(blocks) * MOONCAKE_BLOCK))
        # All prompts share the first block. The second tells conversations apart.
        session = int(blocks[min(1, len(blocks) - 1)])
        yield Arrival(row["timestamp"] / 1000, session, blocks, MOONCAKE_BLOCK, tokens, max(1, row["output_length"]))


def _weka(rows: list[dict[str, Any]], rng: random.Random) -> Iterator[Arrival]:
    first = 0  # ids are of one session: each session gets a range of its own
    for session, row in enumerate(rows):
        start, size, highest = rng.uniform(0, 3600 * SESSION_HOURS), int(row["block_size"]), 0
        for request in row["requests"]:
            ids = request.get("hash_ids")
            if ids is None:
                ids = [i for low, high in request.get("hash_id_ranges", ()) for i in range(low, high + 1)]
            if not ids:
                continue
            highest = max(highest, *ids)
            blocks = np.array(ids, np.int32) + np.int32(first)
            tokens = max(1, min(int(request["in"]), len(ids) * size))
            yield Arrival(start + request["t"], session, blocks, size, tokens, max(1, request["out"]))
        first += highest + 1
