"""JSON extraction: read a short text, write the fields that were asked for."""

from __future__ import annotations

import json
from typing import Any

from .conversation import Conversation, assistant, user
from .draw import Draw
from .world import CATEGORIES, COLOURS, DAYS, FIRST_NAMES, MONTHS, THINGS


def make(draw: Draw) -> Conversation:
    text, fields = draw.pick([_person, _order, _meeting, _listing])(draw)
    keys = draw.shuffled(list(fields))[: draw.between(min(2, len(fields)), len(fields))]
    if draw.chance(0.15):  # a field the text does not hold
        keys.insert(draw.below(len(keys) + 1), draw.pick(["phone", "email", "country", "note"]))
    listed = ", ".join(keys[:-1]) + " and " + keys[-1] if len(keys) > 1 else keys[0]
    ask = draw.pick(
        [
            "Extract {} as JSON.",
            "Give {} as a JSON object.",
            "Return JSON with the keys {}.",
            "From the text, extract {} as JSON.",
        ]
    )
    content = f"{ask.format(listed)}\n\nText: {text}" if draw.chance(0.6) else f"{text}\n\n{ask.format(listed)}"
    answer = json.dumps({key: fields.get(key) for key in keys})
    return Conversation("extraction", [user(content), assistant(answer)])


def _name(draw: Draw) -> str:
    first = draw.name() if draw.held_out or draw.chance(0.6) else draw.pick(FIRST_NAMES)
    return f"{first} {draw.name()}" if draw.chance(0.4) else first


def _person(draw: Draw) -> tuple[str, dict[str, Any]]:
    name, city, age, job = _name(draw), draw.name(), draw.between(5, 95), draw.pick(CATEGORIES["job"])
    pet, colour = draw.pick(CATEGORIES["animal"]), draw.pick(COLOURS)
    parts = [
        draw.pick([f"{name} is {age} years old", f"{name}, aged {age}, said hello", f"I met {name}, who is {age}"]),
        draw.pick([f"works as a {job}", f"is a {job} by trade"]),
        draw.pick([f"lives in {city}", f"comes from {city}", f"has a house in {city}"]),
        draw.pick([f"owns a {colour} {pet}", f"walks a {colour} {pet} every day"]),
    ]
    text = parts[0] + ", " + ", ".join(draw.shuffled(parts[1:3])) + " and " + parts[3] + "."
    return text, {"name": name, "age": age, "job": job, "city": city, "pet": pet, "colour": colour}


def _order(draw: Draw) -> tuple[str, dict[str, Any]]:
    item, quantity, price = draw.pick(THINGS), draw.between(2, 80), draw.between(3, 900)
    order, customer, day = draw.code(), _name(draw), draw.pick(DAYS)
    text = draw.pick([
        f"Order {order}: {customer} wants {quantity} {item} for {price} euros, to be sent on {day}.",
        f"{customer} ordered {quantity} {item} on {day}. The price is {price} euros and the order number is {order}.",
        f"On {day} we got order {order} from {customer}: {quantity} {item}, {price} euros in all.",
    ])  # fmt: skip
    return text, {"order": order, "customer": customer, "item": item, "quantity": quantity, "price": price, "day": day}


def _meeting(draw: Draw) -> tuple[str, dict[str, Any]]:
    topic, place, hour = draw.word(), draw.name(), draw.between(1, 12)
    month, date, host = draw.pick(MONTHS), draw.between(1, 28), _name(draw)
    text = draw.pick([
        f"{host} invites everyone to talk about {topic} in {place} on {month} {date} at {hour}.",
        f"The meeting on {topic} is on {month} {date} at {hour} in {place}; {host} is the host.",
    ])  # fmt: skip
    return text, {"topic": topic, "place": place, "month": month, "date": date, "hour": hour, "host": host}


def _listing(draw: Draw) -> tuple[str, dict[str, Any]]:
    fields: dict[str, Any] = {}
    for key in draw.words(draw.between(2, 6)):
        fields[key] = draw.pick(
            [draw.word, draw.name, draw.code, lambda: draw.between(1, 999), lambda: draw.chance(0.5)]
        )()
    form = draw.pick(["{k}: {v}", "{k} is {v}", "{k} = {v}"])
    joint = draw.pick(["; ", ", ", "\n"])
    shown = {k: str(v).lower() if isinstance(v, bool) else v for k, v in fields.items()}
    return joint.join(form.format(k=k, v=v) for k, v in draw.shuffled(list(shown.items()))), fields
