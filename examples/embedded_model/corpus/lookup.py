"""Key-value look-up: a register of invented keys, from a few lines to more than 4,000 tokens, then questions."""

from __future__ import annotations

from .conversation import Conversation, assistant, user
from .draw import Draw
from .stories import sentence

LONGEST = 4000  # tokens of the register: with the questions it stays inside the context
_INTROS = ["Here is a register.", "Remember this list.", "Keep these entries in mind.", "Below are the records.", "Read this table.",
           "These are the codes.", "You will be asked about this."]  # fmt: skip
_LINES = [
    "{k}: {v}",
    "{k} = {v}",
    "{k} -> {v}",
    "The code of {k} is {v}.",
    "- {k}: {v}",
    "{k} {v}",
    "{k} has {v}.",
    '"{k}": "{v}",',
]
_ASKS = ["What is the value of {k}?", "What belongs to {k}?", "Look up {k}.", "{k}?", "What is the entry for {k}?", "Which value has {k}?",
         "Find {k}.", "Tell me the value for {k}."]  # fmt: skip


def make(draw: Draw, tokens: int | None = None) -> Conversation:
    """``tokens``: about how long the register is; None: the draw's."""
    tokens = tokens or draw.length(40, LONGEST)
    dense = draw.chance(0.75)
    count = max(2, int(tokens / 11)) if dense else max(2, min(24, tokens // 60))
    table = _table(draw, count)
    line = draw.pick(_LINES)
    lines = [line.format(k=k, v=v) for k, v in table.items()]
    if dense:
        body = "\n".join(lines)
    else:  # a few entries in a long text
        line = draw.pick([text for text in _LINES if text.endswith(".")])
        needles = [line.format(k=k, v=v) for k, v in table.items()]
        hay = [sentence(draw) for _ in range(max(0, (tokens - 12 * count) // 17))]
        spots = sorted(draw.below(len(hay) + 1) for _ in needles)
        for spot, needle in reversed(list(zip(spots, needles, strict=True))):
            hay.insert(spot, needle)
        body = " ".join(hay)
    ask = draw.pick(_ASKS)
    keys = list(table)
    asked = [draw.pick(keys) for _ in range(1 if draw.held_out else min(4 + tokens // 100, 24))]
    first = ask.format(k=asked[0])
    messages = [user(f"{draw.pick(_INTROS)}\n{body}\n\n{first}"), assistant(table[asked[0]])]
    for key in asked[1:]:
        ask = draw.pick(_ASKS) if draw.chance(0.3) else ask
        messages += [user(ask.format(k=key)), assistant(table[key])]
    return Conversation("lookup", messages)


def _table(draw: Draw, count: int) -> dict[str, str]:
    kind, value, n = draw.random(), draw.random(), draw.between(2, 5)
    table: dict[str, str] = {}
    while len(table) < count:
        if kind < 0.6:
            key = draw.word()
        elif kind < 0.75:
            key = draw.code()
        elif kind < 0.9:
            key = f"{draw.name()} {draw.name()}" if count < 250 else draw.name()
        else:
            key = f"{draw.word()}{draw.between(1, 99)}"
        table[key] = draw.digits(n) if value < 0.6 else draw.word() if value < 0.85 else draw.code()
    return table
