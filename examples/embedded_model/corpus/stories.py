"""Short stories of the closed world: someone wants something, something is in the way, someone helps."""

from __future__ import annotations

from typing import Any

from .conversation import assistant, user
from .draw import Draw
from .world import FEMALE, FIRST_NAMES, VILLAGERS

_PLACES = [
    "the old bridge",
    "the mill",
    "the orchard",
    "the market square",
    "the clock tower",
    "the high meadow",
    "the river",
    "the library",
    "the forest",
    "the ferry",
]
_LOST = [
    "key",
    "lantern",
    "red scarf",
    "silver bell",
    "map",
    "kite",
    "basket",
    "wooden whistle",
    "blue ribbon",
    "letter",
    "golden button",
    "old coin",
]
_ANIMALS = ["fox", "owl", "hedgehog", "cat", "dog", "mouse", "sparrow", "rabbit", "donkey", "otter"]
_WEATHER = [
    "It was a foggy morning",
    "It was a bright day",
    "Rain was falling",
    "Snow lay on the roofs",
    "The wind was strong",
    "The sun was going down",
]
_FEELINGS = ["happy", "glad", "proud", "thankful", "merry"]


def sentence(draw: Draw) -> str:
    """One line about nothing in particular, for long texts."""
    who, place = draw.pick(VILLAGERS).name, draw.pick(_PLACES)
    return draw.pick([
        f"{who} walked slowly to {place} and back again.",
        f"{draw.pick(_WEATHER)} when {who} came to {place}.",
        f"A {draw.pick(_ANIMALS)} was asleep near {place}.",
        f"Nobody knew why {who} had left a {draw.pick(_LOST)} at {place}.",
        f"In the evening {who} told a story about {place}.",
        f"Near {place} the {draw.pick(_ANIMALS)} looked at {who} for a long time.",
    ])  # fmt: skip


def story(draw: Draw, hero: str, she: str, animal: str, thing: str, friend: str, place: str) -> str:
    her = "her" if she == "she" else "his"
    him = "her" if she == "she" else "him"
    first, second = draw.sample([p for p in _PLACES if p != place], 2)
    lines = [draw.pick([f"{draw.pick(_WEATHER)} when {hero} noticed that {her} {thing} was gone.",
                        f"One day {hero} could not find {her} {thing}.",
                        f"{draw.pick(_WEATHER)}, and {hero} had lost {her} {thing}."])]  # fmt: skip
    lines.append(draw.pick([f"{she.capitalize()} looked at {first}, but it was not there.", f"First {she} went to {first}, but found only wet leaves.",
                            f"{she.capitalize()} asked everyone at {first}, and nobody had seen it."]))  # fmt: skip
    lines.append(
        draw.pick(
            [
                f"Then {she} met a {animal}.",
                f"On the way to {second} {she} met a {animal}.",
                f"Near {second} a {animal} was sitting on a stone.",
            ]
        )
    )
    lines.append(
        draw.pick([f'"Why are you sad?" asked the {animal}.', f'"What are you looking for?" asked the {animal}.'])
    )
    lines.append(draw.pick([f'"I have lost my {thing}," said {hero}.', f'"My {thing} is gone," said {hero}.']))
    if friend and draw.chance(0.6):
        lines.append(
            draw.pick(
                [f"{friend} heard them and came along to help.", f"Just then {friend} came by and offered to help."]
            )
        )
    lines.append(
        draw.pick(
            [
                f"The {animal} led the way to {place}.",
                f'"Follow me," said the {animal}, and ran to {place}.',
                f"The {animal} had seen something shine at {place}.",
            ]
        )
    )
    lines.append(
        draw.pick(
            [
                f"There, under a stone, lay the {thing}.",
                f"And there was the {thing}, hanging on a branch.",
                f"The {thing} was there, safe and dry.",
            ]
        )
    )
    lines.append(draw.pick([f'"Thank you!" said {hero}, and was very {draw.pick(_FEELINGS)}.', f"{hero} thanked the {animal} and gave it some bread.",
                            f"From then on {hero} and the {animal} were friends.", f"They all went home together, and the {animal} walked beside {him}."]))  # fmt: skip
    return " ".join(lines)


def make_turns(draw: Draw) -> list[dict[str, Any]]:
    """A request, a story that keeps to it, and questions about the story."""
    villager = draw.pick(VILLAGERS)
    r = draw.random()
    hero, she = (
        (villager.name, villager.she) if r < 0.5 else (draw.pick(FIRST_NAMES), "") if r < 0.75 else (draw.name(), "")
    )
    she = she or ("she" if hero in FEMALE else "he" if hero in FIRST_NAMES else draw.pick(["she", "he"]))
    friend = draw.pick([villager.friend, ""])
    friend = "" if friend == hero else friend
    animal, thing, place = draw.pick(_ANIMALS), draw.pick(_LOST), draw.pick(_PLACES)
    ask = draw.pick(["Tell me a story about {h}.", "Tell me a story about {h} and a {a}.", "Write a short story about {h} and a {t}.", "Tell me a story.",
                     "Please write a story about {h}, a {a} and a {t}.", "I would like a story with {h} in it.", "A story about a {a}, please."])  # fmt: skip
    messages = [
        user(ask.format(h=hero, a=animal, t=thing)),
        assistant(story(draw, hero, she, animal, thing, friend, place)),
    ]
    questions = [
        (f"What did {hero} lose?", f"{hero} lost {'her' if she == 'she' else 'his'} {thing}."),
        ("Who helped?", f"A {animal} helped {hero}."),
        (
            f"Where was the {thing}?",
            f"The {thing} was at {place}." if place != "the high meadow" else f"The {thing} was in the high meadow.",
        ),
        ("Who is the story about?", f"It is about {hero}."),
    ]
    for question, answer in draw.sample(questions, draw.below(4)):
        messages += [user(question), assistant(answer)]
    return messages
