"""Which families are drawn how often, and the stream of conversations they make."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from . import arithmetic, copying, dialogue, extraction, fewshot, lookup, puzzle, recall, tools
from .conversation import Conversation
from .draw import Draw

FAMILIES: dict[str, tuple[Callable[[Draw], Conversation], float, float]] = {
    # the share of all tokens at the beginning of training, and from the middle on
    "copy": (copying.make, 0.20, 0.02),
    "fewshot": (fewshot.make, 0.18, 0.15),
    "lookup": (lookup.make, 0.12, 0.15),
    "recall": (recall.make, 0.12, 0.13),
    "tools": (tools.make, 0.13, 0.18),
    "arithmetic": (arithmetic.make, 0.06, 0.07),
    "extraction": (extraction.make, 0.07, 0.07),
    "talk": (dialogue.make, 0.06, 0.08),
    "puzzle": (puzzle.make, 0.06, 0.15),
}


def shares(level: float) -> dict[str, float]:
    """Of tokens, at a point of training between 0 and 1."""
    late = min(1.0, level / 0.4)
    return {name: early + (end - early) * late for name, (_, early, end) in FAMILIES.items()}


def stream(draw: Draw) -> Iterator[tuple[Conversation, Callable[[int], None]]]:
    """Endless. The caller says how many tokens each conversation had, and the next family is the one most behind."""
    want = shares(draw.level)
    have = {name: -draw.random() * 500 for name in want}
    while True:
        name = min(want, key=lambda n: have[n] / want[n])

        def count(tokens: int, name: str = name) -> None:
            have[name] += tokens

        yield FAMILIES[name][0](draw), count
