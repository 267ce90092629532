"""`SharedTokens`: every sequence keeps its tokens, whatever is appended to its relatives."""

from __future__ import annotations

import numpy as np

from branchwise.runtime.shared_tokens import _MAX_DEPTH, EMPTY


def array(tokens: list[int]) -> np.ndarray:
    return np.array(tokens, np.int32)


def test_every_sequence_keeps_its_tokens() -> None:
    tokens, expected, made = EMPTY, [], []
    for i in range(3 * _MAX_DEPTH):
        piece = list(range(i, i + i % 5))
        tokens, expected = tokens.extended(array(piece)), expected + piece
        made.append((tokens, list(expected)))
    for tokens, expected in made:
        assert tokens.array().tolist() == expected and tokens.length == len(expected)
        assert tokens._depth <= _MAX_DEPTH
        for n in (0, 1, 3, 8, 10_000):
            assert tokens.last(n).tolist() == (expected[-n:] if n else [])
    assert tokens.array(array([7])).tolist() == [*expected, 7]
    assert tokens.array().dtype == tokens.last(8).dtype == EMPTY.last(8).dtype == np.int32
