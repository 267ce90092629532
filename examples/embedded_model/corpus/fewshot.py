"""Few-shot mapping: what a label means is defined by the examples in the prompt and by nothing else."""

from __future__ import annotations

from collections.abc import Callable

from .conversation import Conversation, assistant, learn, user
from .draw import Draw
from .world import CATEGORIES, FIRST_NAMES

Pair = tuple[str, str, bool]  # input, output, whether the examples before it define the output
_GOOD = ["lovely", "great", "wonderful", "tasty", "warm", "kind", "bright", "excellent", "pleasant", "delightful"]
_BAD = ["awful", "terrible", "broken", "cold", "rude", "boring", "dreadful", "nasty", "ugly", "disappointing"]
_FORMS = [("", " -> ", "\n"), ("", ": ", "\n"), ("", " = ", "\n"), ("Input: ", "\nOutput: ", "\n\n"), ("Word: ", "\nLabel: ", "\n"),
          ("Q: ", "\nA: ", "\n"), ("", " => ", "\n"), ("- ", " | ", "\n")]  # fmt: skip
_ASKS = ["Continue the pattern.", "Label each line like the examples.", "Complete the last line.", "Sort the items by the examples.",
         "Follow the examples.", "Here are some examples. Give only the missing answer.", ""]  # fmt: skip


def make(draw: Draw) -> Conversation:
    r = draw.random()
    if r < 0.40:
        pairs, kind = _categories(draw), "fewshot_words"
    elif r < 0.60:
        pairs, kind = _sentences(draw), "fewshot_sentences"
    elif r < 0.80:
        pairs, kind = _glossary(draw), "fewshot_glossary"
    else:
        pairs, kind = _rule(draw), "fewshot_rule"
    return _dress(draw, kind, pairs)


def _labels(draw: Draw, n: int) -> list[str]:
    r = draw.random()
    if r < 0.7 or draw.held_out:
        return draw.words(n)
    if r < 0.8:
        return draw.sample(list("ABCDEFGHJKLMNPRSTUVWXYZ"), n)
    if r < 0.9:
        return [str(i) for i in draw.sample(range(10), n)]
    return draw.sample([w for words in CATEGORIES.values() for w in words], n)


def _shots(draw: Draw, classes: int) -> list[int]:
    """The class of each example and, last, of the query: every class twice at least, then more at random."""
    extra = draw.between(0, 6 + int(10 * draw.level * draw.random()))
    shots = draw.shuffled(list(range(classes)) * 2 + [draw.below(classes) for _ in range(extra)])
    return [*shots, draw.below(classes)]


def _classify(draw: Draw, classes: int, item: Callable[[int], str]) -> list[Pair]:
    labels, seen, pairs = _labels(draw, classes), set[int](), []
    for c in _shots(draw, classes):
        pairs.append((item(c), labels[c], c in seen))
        seen.add(c)
    return pairs


def _categories(draw: Draw) -> list[Pair]:
    classes = draw.between(2, 4)
    decks = [iter(draw.shuffled(CATEGORIES[c]) * 9) for c in draw.sample(list(CATEGORIES), classes)]
    return _classify(draw, classes, lambda c: next(decks[c]))


def _sentences(draw: Draw) -> list[Pair]:
    if draw.chance(0.4):
        things = ["soup", "film", "hotel", "book", "walk", "song", "guide", "room", "trip", "cake"]
        forms = ["the {t} was {a}", "what a {a} {t}", "I found the {t} {a}", "a really {a} {t}", "{t} was so {a} today"]
        return _classify(draw, 2, lambda c: draw.pick(forms).format(t=draw.pick(things), a=draw.pick((_GOOD, _BAD)[c])))
    forms = ["{n} saw a {w}", "my friend talked about the {w}", "I thought of {w} again", "{n} has a picture of the {w}",
             "yesterday {n} asked for {w}", "the {w} was all {n} could see", "there was {w} near the door"]  # fmt: skip
    classes = draw.between(2, 3)
    names = draw.sample(list(CATEGORIES), classes)
    return _classify(
        draw, classes, lambda c: draw.pick(forms).format(n=draw.pick(FIRST_NAMES), w=draw.pick(CATEGORIES[names[c]]))
    )


def _glossary(draw: Draw) -> list[Pair]:
    """An invented dictionary; the later lines ask for words, or phrases of words, that were defined before."""
    n = draw.between(3, 6 + int(8 * draw.level))
    left, right = draw.words(n), draw.words(n)
    if draw.chance(0.3):
        left = draw.sample([w for words in CATEGORIES.values() for w in words], n)
    if draw.chance(0.2):
        right = [draw.digits(draw.between(1, 3)) for _ in range(n)]
    table = dict(zip(left, right, strict=True))
    pairs = [(word, table[word], False) for word in left]
    for _ in range(draw.between(1, 6)):
        words = [draw.pick(left) for _ in range(1 if draw.chance(0.5) else draw.between(2, 3))]
        pairs.append((" ".join(words), " ".join(table[word] for word in words), True))
    return pairs


def _rule(draw: Draw) -> list[Pair]:
    mark, other = draw.word(), draw.word()
    rules: list[tuple[int, Callable[[list[str]], str]]] = [
        (1, lambda w: f"{w[0]} {w[0]}"),
        (1, lambda w: f"{mark} {w[0]}"),
        (1, lambda w: f"{w[0]} {mark}"),
        (1, lambda w: f"({w[0]})"),
        (1, lambda w: f"{mark}-{w[0]}-{other}"),
        (2, lambda w: f"{w[1]} {w[0]}"),
        (2, lambda w: w[0]),
        (2, lambda w: w[1]),
        (2, lambda w: f"{w[0]}-{w[1]}"),
        (2, lambda w: f"{w[1]} {mark} {w[0]}"),
        (3, lambda w: w[1]),
        (3, lambda w: f"{w[2]} {w[1]} {w[0]}"),
        (3, lambda w: f"{w[0]} {w[2]}"),
    ]
    count, rule = draw.pick(rules)
    everyday = draw.chance(0.3)
    pairs = []
    for i in range(draw.between(4, 9)):
        words = [draw.pick(CATEGORIES[draw.pick(list(CATEGORIES))]) if everyday else draw.word() for _ in range(count)]
        pairs.append((" ".join(words), rule(words), i > 1))
    return pairs


def _dress(draw: Draw, kind: str, pairs: list[Pair]) -> Conversation:
    r = draw.random()
    if r < 0.2 and not draw.held_out:  # plain text, no chat
        before, between, after = draw.pick(_FORMS)
        text = "".join(f"{before}{x}{between}{learn(y + after) if known else y + after}" for x, y, known in pairs)
        return Conversation(kind, plain=text)
    if r < 0.4:  # the examples are turns
        messages = []
        for i, (x, y, known) in enumerate(pairs):
            messages += [user(x), assistant(y, quiet=not known and i < len(pairs) - 1)]
        return Conversation(kind, messages)
    before, between, after = draw.pick(_FORMS)
    ask = draw.pick(_ASKS)
    lines = [f"{before}{x}{between}{learn(y) if known else y}{after}" for x, y, known in pairs[:-1]]
    content = (ask + "\n" if ask else "") + "".join(lines) + before + pairs[-1][0] + between.rstrip(" ")
    return Conversation(kind, [user(content), assistant(pairs[-1][1])])
