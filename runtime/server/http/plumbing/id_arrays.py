"""Parse JSON lists of token ids into arrays, without a Python object for each id."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any

import msgspec
import numpy as np

from ....chat.json_bounds import SLICE

Array = np.ndarray[Any, np.dtype[np.int64]]

# Fields that may hold thousands of ids: one list of them, or a list of such lists.
_FLAT = frozenset({"prompt", "input_ids", "token_ids", "tokens", "extend"})
_NESTED = frozenset({"prompt", "input_ids", "prompts", "continuations"})
_ID_BYTES = b"0123456789, \n\r\t"  # the bytes of a list of ids between its brackets
_LONG = 128  # mean bytes of a list from which an array is faster
_HUGE = 2**62  # a larger number may have been clipped to an int64


async def id_arrays(fields: Mapping[str, msgspec.Raw]) -> dict[str, Array | list[Array]]:
    """The fields of a body that are lists of non-negative integers, as an int64 array [n] or a list of such.

    The ids are not checked against a vocabulary. Yields to the event loop between slices.
    """
    found: dict[str, Array | list[Array]] = {}
    for name in fields.keys() & (_FLAT | _NESTED):
        raw = bytes(fields[name])
        brackets = raw.translate(None, _ID_BYTES) if raw[:1] == b"[" else b""
        if len(raw) > SLICE:
            await asyncio.sleep(0)
        lists = len(brackets) // 2 - 1  # inside the outer one
        ids: Array | list[Array] | None = None
        if brackets == b"[]" and name in _FLAT:
            ids = await _flat(raw[1:-1])
        elif name in _NESTED and len(raw) >= _LONG * lists > 0 and brackets == b"[" + b"[]" * lists + b"]":
            ids = await _nested(raw[1:-1])
        if ids is not None:
            found[name] = ids
    return found


async def _flat(inside: bytes) -> Array | None:
    """None if there are no ids or one is too large."""
    if not inside.strip():
        return None
    if len(inside) <= SLICE:
        return _small(np.fromstring(inside, np.int64, sep=","))
    ids: Array = np.empty(inside.count(b",") + 1, np.int64)
    start = filled = 0
    while start < len(inside):
        await asyncio.sleep(0)
        comma = inside.find(b",", start + SLICE)
        end = len(inside) if comma < 0 else comma
        part = np.fromstring(inside[start:end], np.int64, sep=",")
        ids[filled : filled + len(part)] = part
        start, filled = end + 1, filled + len(part)
    await asyncio.sleep(0)
    return _small(ids)


def _small(ids: Array) -> Array | None:
    return ids if ids.max() < _HUGE else None


async def _nested(inside: bytes) -> list[Array] | None:
    """None if an element is not a list, a list is empty, or an id is too large."""
    *lists, rest = inside.split(b"]")
    if rest.strip():
        return None
    found: list[Array] = []
    seen = 0
    for text in lists:
        head, bracket, ids = text.partition(b"[")
        if head.strip(b", \n\r\t") or not bracket:
            return None
        array = await _flat(ids)
        if array is None:
            return None
        found.append(array)
        seen += len(text)
        if seen > SLICE:
            await asyncio.sleep(0)
            seen = 0
    return found


def count_ids(arrays: Mapping[str, Array | list[Array]]) -> int:
    return sum(len(ids) if isinstance(ids, np.ndarray) else sum(map(len, ids)) for ids in arrays.values())
