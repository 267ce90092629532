"""A branch's tokens as a linked list of immutable pieces, which forks share instead of copying."""

from __future__ import annotations

import numpy as np

from ...step import Int32

_MAX_DEPTH = 64  # pieces before they are joined: bounds the walk and the memory overhead


class Trail:
    """Tokens int32 [length]: a ``piece`` after a ``parent``. Immutable."""

    __slots__ = ("_depth", "_parent", "_piece", "length")

    def __init__(self, piece: Int32, parent: Trail | None = None) -> None:
        self._piece = piece
        self._parent = parent
        self._depth: int = 1 if parent is None else parent._depth + 1
        self.length: int = len(piece) + (0 if parent is None else parent.length)

    def then(self, piece: Int32) -> Trail:
        """A new trail: this one followed by ``piece``."""
        if not len(piece):
            return self
        if not self.length:
            return Trail(piece)
        if self._depth >= _MAX_DEPTH:
            return Trail(self.tokens(piece))
        return Trail(piece, self)

    def tokens(self, more: Int32 | None = None) -> Int32:
        """All tokens, followed by ``more``, as a new array int32 [length + len(more)]."""
        pieces = [] if more is None else [more]
        trail: Trail | None = self
        while trail is not None:
            pieces.append(trail._piece)
            trail = trail._parent
        return np.concatenate(pieces[::-1])


EMPTY = Trail(np.empty(0, np.int32))
