"""Copying and repeating, the basis of in-context learning: training begins with a large share of it."""

from __future__ import annotations

from .conversation import Conversation, assistant, learn, user
from .draw import Draw


def make(draw: Draw) -> Conversation:
    n = draw.between(2, 6 + int(40 * draw.level * draw.random()))
    items = [
        draw.word() if draw.chance(0.7) else draw.code() if draw.chance(0.5) else draw.digits(draw.between(1, 5))
        for _ in range(n)
    ]
    joint = draw.pick([" ", ", ", "\n", "; "])
    text = joint.join(items)
    r = draw.random()
    if r < 0.35:
        return Conversation("copy", plain=text + "\n" + learn(text + "\n") * draw.between(1, 3))
    if r < 0.6:
        ask = draw.pick(["Repeat after me: ", "Say exactly this: ", "Copy this:\n", "Repeat: "])
        return Conversation("copy", [user(ask + text), assistant(text)])
    spot = draw.below(n - 1)
    if items.count(items[spot]) > 1:
        return make(draw)
    messages = [user(f"{text}\n\nWhat comes after {items[spot]}?"), assistant(items[spot + 1])]
    for _ in range(draw.between(0, 6)):
        spot = draw.below(n - 1)
        if items.count(items[spot]) == 1:
            messages += [user(f"What comes after {items[spot]}?"), assistant(items[spot + 1])]
    return Conversation("copy", messages)
