"""Facts stated early and asked for later: in a conversation with other talk between, or about people in a text."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from .conversation import Conversation, assistant, user
from .dialogue import SYSTEMS, small_talk
from .draw import Draw
from .world import CATEGORIES, COLOURS, FIRST_NAMES


@dataclass(frozen=True, slots=True)
class Fact:
    """``{v}`` is the value; statements are the user's words, the answer the model's."""

    value: str  # name | place | number | colour | food | job | code | word
    states: tuple[str, ...]
    asks: tuple[str, ...]
    answer: str


_PETS = ("dog", "cat", "horse", "rabbit", "parrot", "goat")
_KIN = ("sister", "brother", "mother", "father", "aunt", "uncle", "best friend", "teacher", "boss", "neighbour")
FACTS = [
    Fact("name", ("My name is {v}.", "I am called {v}.", "Hi, I'm {v}.", "Please call me {v}."), ("What is my name?", "What's my name?", "Do you remember my name?", "Who am I?"), "Your name is {v}."),
    Fact("place", ("I live in {v}.", "My home is in {v}.", "I have a house in {v}."), ("Where do I live?", "Which town do I live in?", "Do you know where I live?"), "You live in {v}."),
    Fact("number", ("I am {v} years old.", "I turned {v} this year.", "My age is {v}."), ("How old am I?", "What is my age?"), "You are {v} years old."),
    Fact("colour", ("My favourite colour is {v}.", "I love the colour {v}.", "The colour I like best is {v}."), ("What is my favourite colour?", "Which colour do I like best?"), "Your favourite colour is {v}."),
    Fact("food", ("My favourite food is {v}.", "I like {v} more than any other food."), ("What is my favourite food?", "What do I like to eat?"), "Your favourite food is {v}."),
    Fact("job", ("I work as a {v}.", "My job is {v}.", "I am a {v} by trade."), ("What is my job?", "What do I do for a living?"), "Your job is {v}."),
    Fact("code", ("My locker code is {v}.", "The code of my locker is {v}.", "Remember my locker code: {v}."), ("What is my locker code?", "Which code opens my locker?"), "Your locker code is {v}."),
    Fact("word", ("My password hint is {v}.", "The secret word is {v}.", "Remember the secret word {v}."), ("What is the secret word?", "What was the secret word?"), "The secret word is {v}."),
    Fact("number", ("My house number is {v}.", "I live at number {v}."), ("What is my house number?",), "Your house number is {v}."),
    Fact("place", ("I was born in {v}.", "I come from {v}."), ("Where was I born?", "Where do I come from?"), "You were born in {v}."),
    *(Fact("name", (f"My {p} is called {{v}}.", f"I have a {p} named {{v}}.", f"{{v}} is my {p}."), (f"What is my {p} called?", f"What is the name of my {p}?", f"What's my {p}'s name?"), f"Your {p} is called {{v}}.") for p in _PETS),
    *(Fact("name", (f"My {k} is called {{v}}.", f"My {k}'s name is {{v}}."), (f"What is my {k} called?", f"What is the name of my {k}?", f"Who is my {k}?"), f"Your {k} is called {{v}}.") for k in _KIN),
]  # fmt: skip
_ACKS = ["I will remember that.", "Noted.", "Thank you for telling me.", "Good to know.", "I will keep that in mind."]


def make(draw: Draw) -> Conversation:
    r = draw.random()
    return _people(draw) if r < 0.27 else _persona(draw) if r < 0.4 else _talk(draw)


def _value(draw: Draw, kind: str) -> str:
    everyday = not draw.held_out and draw.chance(0.2)
    match kind:
        case "name":
            return draw.pick(FIRST_NAMES) if everyday else draw.name()
        case "place":
            return draw.name()
        case "number":
            return str(draw.between(4, 99))
        case "colour":
            return draw.pick(COLOURS)
        case "food":
            return draw.pick(CATEGORIES["fruit"] + CATEGORIES["vegetable"]) if everyday else draw.word()
        case "job":
            return draw.pick(CATEGORIES["job"])
        case "code":
            return draw.code()
    return draw.word()


def _talk(draw: Draw) -> Conversation:
    chosen = draw.sample(FACTS, draw.between(1, 2 + int(3 * draw.level)))
    by_subject = list({fact.asks[0]: fact for fact in chosen}.values())
    values = {fact: _value(draw, fact.value) for fact in by_subject}
    messages: list[dict[str, Any]] = []
    system = draw.pick(SYSTEMS) if draw.chance(0.4) else ""
    waiting = list(by_subject)
    if draw.chance(0.15):  # facts the system prompt knows
        fact = waiting.pop(0)
        system += " The user says: " + draw.pick(fact.states).format(v=values[fact])
    if system:
        messages.append({"role": "system", "content": system.strip()})
    talk = 0 if draw.chance(0.25) else int(draw.between(1, 6) * draw.level + 0.5)
    if draw.level > 0.4 and draw.chance(0.12):
        talk = draw.between(8, 40)
    while waiting:
        told = waiting[: draw.between(1, 3)]
        waiting = waiting[len(told) :]
        text = " ".join(draw.pick(fact.states).format(v=values[fact]) for fact in told)
        ack = draw.pick(_ACKS)
        if told[0].asks[0] == "What is my name?" and draw.chance(0.7):
            ack = f"Nice to meet you, {values[told[0]]}!"
        messages += [user(text), assistant(ack)]
        for _ in range(draw.between(0, talk)):
            messages += small_talk(draw)
            talk -= 1
    for _ in range(talk):
        messages += small_talk(draw)
    asked = draw.shuffled(by_subject)[: 1 if draw.held_out else 9]
    for fact in asked:
        messages += [user(draw.pick(fact.asks)), assistant(fact.answer.format(v=values[fact]))]
        if not draw.held_out and draw.chance(0.2):
            messages += small_talk(draw)
    expect = [values[asked[-1]]] if draw.held_out else []
    return Conversation("recall", messages, expect=expect)


_TRAITS = [
    ("place", ("{n} lives in {v}.", "{v} is where {n} lives."), "Where does {n} live?", "{n} lives in {v}."),
    ("job", ("{n} works as a {v}.", "{n} is a {v}."), "What is {n}'s job?", "{n} works as a {v}."),
    ("number", ("{n} is {v} years old.",), "How old is {n}?", "{n} is {v} years old."),
    ("colour", ("{n} likes the colour {v}.",), "Which colour does {n} like?", "{n} likes {v}."),
    ("name", ("{n} has a friend called {v}.",), "Who is {n}'s friend?", "{n}'s friend is {v}."),
    ("word", ("{n} collects {v}.",), "What does {n} collect?", "{n} collects {v}."),
]  # fmt: skip


def _people(draw: Draw) -> Conversation:
    names = list(dict.fromkeys(draw.name() for _ in range(draw.between(1, 2 + int(6 * draw.level)))))
    traits = draw.sample(_TRAITS, draw.between(1, 4))
    lines, questions = [], []
    for name in names:
        for kind, states, ask, answer in traits:
            value = _value(draw, kind)
            lines.append(draw.pick(states).format(n=name, v=value))
            questions.append((ask.format(n=name), answer.format(n=name, v=value), value))
    text = " ".join(draw.shuffled(lines) if draw.chance(0.5) else lines)
    asked = draw.shuffled(questions)[: 1 if draw.held_out else 6]
    first = draw.pick([f"{text}\n\n{asked[0][0]}", f"Read this: {text}\n{asked[0][0]}"])
    messages = [user(first), assistant(asked[0][1])]
    for ask, answer, _ in asked[1:]:
        messages += [user(ask), assistant(answer)]
    return Conversation("recall_text", messages, expect=[asked[0][2]] if draw.held_out else [])


def _persona(draw: Draw) -> Conversation:
    """A system prompt says who the assistant is; it answers as that."""
    name, place, job = draw.name(), draw.name(), draw.pick(CATEGORIES["job"])
    pet, pet_name, food = draw.pick(_PETS), draw.name(), draw.word()
    system = draw.pick(
        [
            f"You are {name}, a {job} in {place}.",
            f"You are {name}. You work as a {job} in {place}.",
            f"Your name is {name} and you are a {job} in {place}.",
        ]
    )
    facts = [
        (("Who are you?", "Introduce yourself.", "What are you?"), f"I am {name}, a {job} in {place}.", name),
        (("What is your name?", "What's your name?", "How are you called?"), f"My name is {name}.", name),
        (("Where do you live?", "Where are you?", "Where do you work?"), f"I am in {place}.", place),
        (("What is your job?", "What do you do?"), f"I am a {job}.", job),
    ]
    more = [
        (
            f"You have a {pet} called {pet_name}.",
            (("Do you have a pet?", "What is your pet called?"), f"My {pet} is called {pet_name}.", pet_name),
        ),
        (f"You like {food}.", (("What do you like?", "What do you like to eat?"), f"I like {food}.", food)),
        (f"Your shop opens at {draw.between(5, 11)}.", None),
        (draw.pick(["Be polite.", "Answer briefly.", "Help the user.", "Always be kind."]), None),
    ]
    for line, fact in draw.sample(more, draw.below(4)):
        system += " " + line
        if fact is not None:
            facts.append(fact)
        elif line.startswith("Your shop"):
            hour = line.rstrip(".").split()[-1]
            facts.append((("When do you open?", "When does your shop open?"), f"My shop opens at {hour}.", hour))
    messages: list[dict[str, Any]] = [{"role": "system", "content": system}]
    asked = draw.shuffled(facts)[: draw.between(1, 4)]
    for asks, answer, _ in asked:
        messages += [user(draw.pick(asks)), assistant(answer)]
    return Conversation("recall_persona", messages, expect=[asked[-1][2]] if draw.held_out else [])
