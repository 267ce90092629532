"""Arithmetic: bare sums, and word problems answered in steps."""

from __future__ import annotations

from .conversation import Conversation, assistant, user
from .draw import Draw
from .world import FEMALE, FIRST_NAMES, THINGS


def make(draw: Draw) -> Conversation:
    while True:
        conversation = _sum(draw) if draw.chance(0.3) else _problem(draw)
        numbers = "".join(c if c.isdigit() else " " for c in conversation.messages[0]["content"])
        if draw.mine(" ".join(numbers.split())):
            return conversation


def _sum(draw: Draw) -> Conversation:
    a, b = draw.between(1, 99), draw.between(1, 99)
    r = draw.random()
    if r < 0.4:
        if draw.chance(0.3):
            a, b = a * draw.between(1, 9), b * draw.between(1, 9)
        text, result = f"{a} + {b}", a + b
    elif r < 0.75:
        a, b = max(a, b), min(a, b)
        text, result = f"{a} - {b}", a - b
    else:
        a, b = draw.between(1, 12), draw.between(1, 12)
        text, result = f"{a} * {b}", a * b
    ask = draw.pick(["What is {}?", "{}", "{} =", "Compute {}.", "How much is {}?", "what's {}"])
    return Conversation("arithmetic", [user(ask.format(text)), assistant(f"{text} = {result}")])


def _problem(draw: Draw) -> Conversation:
    name = draw.pick(FIRST_NAMES) if draw.chance(0.6) else draw.name()
    she = "she" if name in FEMALE else "he" if name in FIRST_NAMES else draw.pick(["she", "he"])
    thing, other = draw.pick(THINGS), draw.pick(FIRST_NAMES)
    total = draw.between(3, 60)
    steps: list[str] = []
    if draw.chance(0.35):
        boxes, each = draw.between(2, 12), draw.between(2, 12)
        total = boxes * each
        text = draw.pick(
            [f"{name} has {boxes} bags with {each} {thing} each.", f"{name} buys {boxes} packs of {each} {thing}."]
        )
        steps.append(f"{boxes} * {each} = {total}.")
    else:
        text = draw.pick(
            [
                f"{name} has {total} {thing}.",
                f"{name} starts with {total} {thing}.",
                f"There are {total} {thing} on {name}'s table.",
            ]
        )
    for _ in range(draw.between(1, 3)):
        r = draw.random()
        if r < 0.45 or total < 4:
            n = draw.between(2, 40)
            text += draw.pick(
                [
                    f" {she.capitalize()} buys {n} more.",
                    f" {other} gives {name} {n} more.",
                    f" Then {she} finds {n} {thing}.",
                ]
            )
            steps.append(f"{total} + {n} = {total + n}.")
            total += n
        elif r < 0.9 or total > 60:
            n = draw.between(1, total - 1)
            text += draw.pick(
                [
                    f" {she.capitalize()} gives {n} to {other}.",
                    f" {she.capitalize()} loses {n} of them.",
                    f" Then {she} sells {n}.",
                ]
            )
            steps.append(f"{total} - {n} = {total - n}.")
            total -= n
        else:
            n = draw.between(2, 3)
            text += f" Then the number of {thing} grows {n} times as large."
            steps.append(f"{total} * {n} = {total * n}.")
            total *= n
    text += draw.pick(
        [f" How many {thing} does {name} have now?", f" How many {thing} are there in the end?", " How many are left?"]
    )
    answer = f"{' '.join(steps)} The answer is {total}."
    return Conversation("arithmetic_steps", [user(text), assistant(answer)], expect=[f"answer is {total}."])
