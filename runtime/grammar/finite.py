"""Names that derive a finite text or value. An output that began another could never end, or would fail inside it."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from ..constraint import ConstraintError

_MAX_ROUNDS = 64  # over the names, in alternating order: few grammars need more than three


def finite_names(names: Sequence[str], is_finite: Callable[[str, set[str]], bool]) -> set[str]:
    """The least fixpoint of ``is_finite(name, names known to be finite)``.

    Raises `ConstraintError` if it takes too many rounds.
    """
    finite: set[str] = set()
    for i in range(_MAX_ROUNDS):
        before = len(finite)
        for name in names if i % 2 else reversed(names):
            if name not in finite and is_finite(name, finite):
                finite.add(name)
        if len(finite) == before:
            return finite
    raise ConstraintError("is too complex to be checked: its references to one another are too many and unordered")
