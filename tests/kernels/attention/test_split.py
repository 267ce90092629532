"""Pieces of attention: whatever the step, every visible key is read exactly once for every query."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from branchwise.kernels.attention.split import ALIGN, ITEM, MERGE, MIN_KEYS, Bounds, cut

requests = st.lists(st.tuples(st.integers(1, 90), st.integers(0, 6000)), max_size=12)  # (query tokens, tokens before)


@settings(max_examples=150, deadline=None)
@given(
    requests=requests,
    padding=st.integers(0, 40),
    window=st.none() | st.integers(1, 3000),
    tile=st.integers(1, 32),
    target=st.integers(1, 200),
    data=st.data(),
)
def test_every_visible_key_once(
    requests: list[tuple[int, int]],
    padding: int,
    window: int | None,
    tile: int,
    target: int,
    data: st.DataObject,
) -> None:
    q_lens = np.array([q for q, _ in requests] + [padding], np.int64)
    kv_lens = np.array([q + before for q, before in requests] + [0], np.int64)
    rows = np.array(data.draw(st.permutations(range(len(q_lens)))), np.int64)
    firsts = np.cumsum(q_lens) - q_lens
    bounds = Bounds.of(len(q_lens), int(q_lens.sum()), tile, target)
    pieces = cut(rows, q_lens, kv_lens, window, tile, target)
    items = pieces.items
    assert len(items) <= bounds.items and len(pieces.merges) <= bounds.merges

    padded = cut(rows, q_lens, kv_lens, window, tile, target, bounds)
    assert len(padded.items) == bounds.items and len(padded.merges) == bounds.merges
    none = np.zeros(1, ITEM), np.zeros(1, MERGE)
    assert (padded.items[: len(items)] == items).all() and (padded.items[len(items) :] == none[0]).all()
    assert (padded.merges[: len(pieces.merges)] == pieces.merges).all()
    assert (padded.merges[len(pieces.merges) :] == none[1]).all()

    lengths = items["stop"] - items["start"]
    assert (np.diff(lengths) <= 0).all()
    assert (items["start"] % ALIGN == 0).all()
    assert (items["num_queries"] >= 1).all() and (items["num_queries"] <= tile).all()
    slots_used: list[int] = []
    tokens_seen: list[int] = []
    merges = {int(merge["query"]): merge for merge in pieces.merges}
    assert len(merges) == len(pieces.merges)
    for start in np.unique(items["query"]).tolist():
        mine = items[items["query"] == start]
        mine = mine[np.argsort(mine["start"], kind="stable")]
        request = int(np.searchsorted(firsts[q_lens > 0], start, side="right")) - 1
        request = int(np.flatnonzero(q_lens > 0)[request])
        tokens = int(mine["num_queries"][0])
        position = int(kv_lens[request] - q_lens[request] + start - firsts[request])  # of the first query
        assert (mine["row"] == rows[request]).all() and (mine["num_queries"] == tokens).all()
        tokens_seen += range(start, start + tokens)
        assert start + tokens <= firsts[request] + q_lens[request]
        if kv_lens[request] == 0:
            assert mine["stop"].tolist() == [0] and mine["partial"].tolist() == [-1]
            continue
        # Ranges follow one another from the first visible key (or a little before) to the last.
        assert (mine["start"][1:] == mine["stop"][:-1]).all()
        assert mine["stop"][-1] == position + tokens
        # Keys that need no mask: those that the first query sees, unless a window may hide them from the last.
        seen = 0 if window is not None else position + 1
        assert (mine["full"] == np.clip(seen, mine["start"], mine["stop"])).all()
        lowest = 0 if window is None else max(position - window + 1, 0)
        assert lowest - ALIGN < mine["start"][0] <= lowest
        if len(mine) == 1:
            assert mine["partial"][0] == -1 and start not in merges
            continue
        merge = merges[start]
        assert (merge["num_queries"], merge["num_pieces"]) == (tokens, len(mine))
        assert mine["partial"].tolist() == [merge["partial"] + i * tokens for i in range(len(mine))]
        slots_used += [slot + i for slot in mine["partial"].tolist() for i in range(tokens)]
    assert sorted(tokens_seen) == list(range(int(q_lens.sum())))
    assert len(set(slots_used)) == len(slots_used)
    assert max(slots_used, default=0) < Bounds.partial_rows(tile, target)


def test_a_long_request_is_spread_over_the_device() -> None:
    one = np.ones(1, np.int64)
    pieces = cut(one, one, 32768 * one, None, 1, 132)
    assert 100 <= len(pieces.items) <= 132
    assert (pieces.items["stop"] - pieces.items["start"]).min() > MIN_KEYS / 2


def test_what_fills_the_device_is_not_split() -> None:
    ones = np.ones(256, np.int64)
    pieces = cut(np.arange(256), ones, 1152 * ones, None, 1, 132)
    assert len(pieces.items) == 256 and not len(pieces.merges)
