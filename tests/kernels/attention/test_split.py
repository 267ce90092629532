"""Pieces of attention: whatever the step, every visible key is read exactly once for every query."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from branchwise.kernels.attention.split import (
    ALIGN,
    FIRST,
    MERGE_COUNT,
    MERGE_FIRST,
    MERGE_SLOT,
    MERGE_TOKENS,
    MIN_KEYS,
    POSITION,
    ROW,
    SLOT,
    START,
    STOP,
    TOKENS,
    Bounds,
    cut,
)

requests = st.lists(st.tuples(st.integers(1, 90), st.integers(0, 6000)), max_size=12)  # (query tokens, tokens before)


@settings(max_examples=150, deadline=None)
@given(
    requests=requests,
    padding=st.integers(0, 40),
    window=st.none() | st.integers(1, 3000),
    tile=st.integers(1, 32),
    target=st.integers(1, 200),
    first=st.integers(0, 50),
    data=st.data(),
)
def test_every_visible_key_once(
    requests: list[tuple[int, int]],
    padding: int,
    window: int | None,
    tile: int,
    target: int,
    first: int,
    data: st.DataObject,
) -> None:
    q_lens = np.array([q for q, _ in requests] + [padding], np.int64)
    kv_lens = np.array([q + before for q, before in requests] + [0], np.int64)
    rows = np.array(data.draw(st.permutations(range(len(q_lens)))), np.int64)
    firsts = first + np.cumsum(q_lens) - q_lens
    bounds = Bounds.of(len(q_lens), int(q_lens.sum()), tile, target)
    pieces = cut(rows, firsts, q_lens, kv_lens, window, tile, target)
    items = pieces.items
    assert len(items) <= bounds.items and len(pieces.merges) <= bounds.merges

    padded = cut(rows, firsts, q_lens, kv_lens, window, tile, target, bounds)
    assert len(padded.items) == bounds.items and len(padded.merges) == bounds.merges
    assert np.array_equal(padded.items[: len(items)], items) and not padded.items[len(items) :].any()
    assert np.array_equal(padded.merges[: len(pieces.merges)], pieces.merges)
    assert not padded.merges[len(pieces.merges) :].any()

    lengths = items[:, STOP] - items[:, START]
    assert (np.diff(lengths) <= 0).all()
    assert (items[:, START] % ALIGN == 0).all()
    assert (items[:, TOKENS] >= 1).all() and (items[:, TOKENS] <= tile).all()
    slots_used: list[int] = []
    tokens_seen: list[int] = []
    merges = {int(merge[MERGE_FIRST]): merge for merge in pieces.merges}
    assert len(merges) == len(pieces.merges)
    for start in np.unique(items[:, FIRST]).tolist():
        mine = items[items[:, FIRST] == start]
        mine = mine[np.argsort(mine[:, START], kind="stable")]
        request = int(np.searchsorted(firsts[q_lens > 0], start, side="right")) - 1
        request = int(np.flatnonzero(q_lens > 0)[request])
        tokens, position = int(mine[0, TOKENS]), int(mine[0, POSITION])
        assert (mine[:, [ROW, TOKENS, POSITION]] == [rows[request], tokens, position]).all()
        tokens_seen += range(start, start + tokens)
        assert start + tokens <= firsts[request] + q_lens[request]
        if kv_lens[request] == 0:
            assert mine[:, STOP].tolist() == [0] and mine[:, SLOT].tolist() == [-1]
            continue
        # Ranges follow one another from the first visible key (or a little before) to the last.
        assert position == kv_lens[request] - q_lens[request] + start - firsts[request]
        assert (mine[1:, START] == mine[:-1, STOP]).all()
        assert mine[-1, STOP] == position + tokens
        lowest = 0 if window is None else max(position - window + 1, 0)
        assert lowest - ALIGN < mine[0, START] <= lowest
        if len(mine) == 1:
            assert mine[0, SLOT] == -1 and start not in merges
            continue
        merge = merges[start]
        assert merge[[MERGE_TOKENS, MERGE_COUNT]].tolist() == [tokens, len(mine)]
        assert mine[:, SLOT].tolist() == [merge[MERGE_SLOT] + i * tokens for i in range(len(mine))]
        slots_used += [slot + i for slot in mine[:, SLOT].tolist() for i in range(tokens)]
    assert sorted(tokens_seen) == list(range(first, first + int(q_lens.sum())))
    assert len(set(slots_used)) == len(slots_used)
    assert max(slots_used, default=0) < Bounds.partial_rows(tile, target)


def test_a_long_request_is_spread_over_the_device() -> None:
    one = np.ones(1, np.int64)
    pieces = cut(one, 0 * one, one, 32768 * one, None, 1, 132)
    assert 100 <= len(pieces.items) <= 132
    assert (pieces.items[:, STOP] - pieces.items[:, START]).min() > MIN_KEYS / 2


def test_what_fills_the_device_is_not_split() -> None:
    ones = np.ones(256, np.int64)
    pieces = cut(np.arange(256), np.arange(256), ones, 1152 * ones, None, 1, 132)
    assert len(pieces.items) == 256 and not len(pieces.merges)
