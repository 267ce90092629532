"""`SharedTokens`: every sequence keeps its tokens, whatever is appended to its relatives."""

from __future__ import annotations

import numpy as np

from branchwise.runtime.shared_tokens import EMPTY, SharedTokens


def array(tokens: list[int]) -> np.ndarray:
    return np.array(tokens, np.int32)


def pieces(tokens: SharedTokens | None) -> int:
    return 0 if tokens is None else 1 + pieces(tokens._parent)


def test_every_sequence_keeps_its_tokens() -> None:
    tokens, expected, made = EMPTY, [], []
    for i in range(300):
        piece = list(range(i, i + i % 5))
        tokens, expected = tokens.extended(array(piece)), expected + piece
        made.append((tokens, list(expected)))
    for tokens, expected in made:
        assert tokens.array().tolist() == expected and tokens.length == len(expected)
        for n in (0, 1, 3, 8, 10_000):
            assert tokens.last(n).tolist() == (expected[-n:] if n else [])
    assert tokens.array(array([7])).tolist() == [*expected, 7]
    assert tokens.array().dtype == tokens.last(8).dtype == EMPTY.last(8).dtype == np.int32


def test_a_sequence_of_many_pieces_stays_shallow() -> None:
    """In whatever sizes it grows: equal, falling, rising or mixed."""
    random = np.random.default_rng(0)
    for sizes in ([1] * 2000, range(200, 0, -1), range(1, 200), random.integers(1, 100, 500)):
        tokens = EMPTY
        for size in sizes:
            tokens = tokens.extended(np.zeros(size, np.int32))
            assert pieces(tokens) <= np.log2(tokens.length) + 1


def test_forks_share_what_they_have_in_common() -> None:
    trunk = EMPTY.extended(array(list(range(1000))))
    forks = [trunk.extended(array([i])) for i in range(3)]
    assert all(fork._parent is trunk for fork in forks)
    assert [fork.array().tolist() for fork in forks] == [[*range(1000), i] for i in range(3)]
