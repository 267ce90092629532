"""Random draws that keep training and test apart.

Every invented word, name, code and puzzle belongs to one side, by a hash of its text: what the held-out side draws
never occurs in training, whatever the seed.
"""

from __future__ import annotations

import random
import zlib
from collections.abc import Sequence
from typing import TypeVar

T = TypeVar("T")

HELD_OUT_SHARE = 8  # one in so many
_ONSETS = [
    "b",
    "bl",
    "br",
    "c",
    "ch",
    "cl",
    "d",
    "dr",
    "f",
    "fl",
    "g",
    "gl",
    "gr",
    "h",
    "j",
    "k",
    "kr",
    "l",
    "m",
    "n",
    "p",
    "pl",
    "pr",
    "qu",
    "r",
    "s",
    "sh",
    "sk",
    "sl",
    "sn",
    "st",
    "t",
    "th",
    "tr",
    "v",
    "w",
    "y",
    "z",
]
_VOWELS = ["a", "e", "i", "o", "u", "a", "e", "i", "o", "u", "ai", "ee", "oa", "ou"]
_CODAS = ["", "", "", "", "n", "r", "l", "s", "m", "k", "t", "d", "x", "p", "nd", "rk", "lm", "st"]
_SYLLABLES = [onset + vowel + coda for onset in _ONSETS for vowel in _VOWELS for coda in _CODAS]
_OPEN = [onset + vowel for onset in _ONSETS for vowel in _VOWELS]


def is_held_out(text: str) -> bool:
    return zlib.crc32(text.encode()) % HELD_OUT_SHARE == 0


class Draw:
    """A seeded source of draws for one side of the split.

    Args:
        seed: equal seeds give equal draws.
        held_out: draw from the test side.
        level: 0 (the beginning of training: short and easy) to 1 (as hard as it gets).
    """

    def __init__(self, seed: int, held_out: bool = False, level: float = 1.0) -> None:
        self.rng = random.Random(seed)
        self.held_out, self.level = held_out, level
        self.random = self.rng.random

    def mine(self, text: str) -> bool:
        """Whether ``text`` belongs to this side."""
        return is_held_out(text) == self.held_out

    def below(self, n: int) -> int:
        return int(self.random() * n)

    def between(self, low: int, high: int) -> int:
        """``low`` to ``high``, both included."""
        return low + int(self.random() * (high - low + 1))

    def chance(self, p: float) -> bool:
        return self.random() < p

    def pick(self, items: Sequence[T]) -> T:
        return items[int(self.random() * len(items))]

    def sample(self, items: Sequence[T], k: int) -> list[T]:
        return self.rng.sample(items, k)

    def shuffled(self, items: Sequence[T]) -> list[T]:
        return self.rng.sample(items, len(items))

    def word(self) -> str:
        """An invented word of this side, such as ``brotal``."""
        while True:
            r = self.random()
            if r < 0.7:
                text = self.pick(_OPEN) + self.pick(_SYLLABLES)
            elif r < 0.85:
                text = self.pick(_SYLLABLES) + self.pick(_SYLLABLES)
            else:
                text = self.pick(_OPEN) + self.pick(_OPEN) + self.pick(_SYLLABLES)
            if self.mine(text):
                return text

    def words(self, n: int) -> list[str]:
        """``n`` different ones."""
        found: dict[str, None] = {}
        while len(found) < n:
            found[self.word()] = None
        return list(found)

    def name(self) -> str:
        """An invented proper name."""
        return self.word().capitalize()

    def code(self) -> str:
        """Such as ``KX-4417``."""
        while True:
            letters = "".join(self.pick("ABCDEFGHJKLMNPQRSTUVWXYZ") for _ in range(self.between(1, 3)))
            text = f"{letters}{self.pick(['-', '-', ''])}{self.digits(self.between(2, 4))}"
            if self.mine(text):
                return text

    def digits(self, n: int) -> str:
        return str(self.between(10 ** (n - 1), 10**n - 1))

    def length(self, low: int, high: int) -> int:
        """A length in tokens, log-uniform; the top grows with the level and is often drawn once it is reached."""
        top = low + (high - low) * min(1.0, self.level / 0.5) ** 1.5
        if self.level > 0.4 and self.chance(0.35):
            return int(top * (0.8 + 0.2 * self.random()))
        return int(low * (top / low) ** self.random())
