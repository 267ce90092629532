"""What has been appended to one state and not yet been handed to its backend, and how turns become text.

Text waits here, untokenized, until the model is asked to go on: then it is encoded as one piece. Turns wait with it,
because templates write some turns in the light of what follows them.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from .backend import Message
from .chat import NO_VARIABLES, Turns, Variables
from .codec import Run, safe_cut
from .errors import BackendError


class Ids(NamedTuple):
    """Tokens that are there already (what the model wrote), and how they read."""

    ids: list[int]
    text: str


class Open(NamedTuple):
    role: str


class Close(NamedTuple):
    role: str


Item = Run | Ids | Open | Close
Out = Run | Ids


@dataclass(slots=True)
class _Turn:
    role: str
    parts: list[str]


@dataclass(slots=True)
class _Place:
    """Where the text stands among the turns. ``tail``: what the template wrote since the last content ended."""

    turns: int = 0
    inside: bool = False
    tail: str = ""


class Transcript:
    """One state's text. ``turns``: the model's template; None: it has none, or, if the backend ``chats``, the backend
    keeps it to itself and wants messages."""

    def __init__(self, turns: Turns | None, backend: str, *, chats: bool = False) -> None:
        self._turns = turns
        self._backend = backend
        self._chats = chats
        self._items: list[Item] = []
        self._place = _Place()
        self._roles: tuple[str, ...] = ()  # of all turns, written or waiting
        self._inside = False  # after all items: is a turn open?
        self._said: list[_Turn] = []
        self._shown: list[str] = []
        self._logs: list[list[Item]] = []
        self.variables: Variables = NO_VARIABLES
        self.loose = False  # there is text outside of turns

    def fork(self) -> Transcript:
        child = Transcript(self._turns, self._backend, chats=self._chats)
        child._items = list(self._items)
        child._place = _Place(self._place.turns, self._place.inside, self._place.tail)
        child._roles, child._inside = self._roles, self._inside
        child._said = [*self._said[:-1], *(_Turn(turn.role, list(turn.parts)) for turn in self._said[-1:])]
        if len(self._shown) > 1:
            self._shown = ["".join(self._shown)]
        child._shown = list(self._shown)
        child.variables, child.loose = self.variables, self.loose
        return child

    # -- appending -----------------------------------------------------------------------------------------------------

    def add(self, item: Item) -> None:
        """Raises `BackendError` for turns that do not nest properly."""
        match item:
            case Open(role):
                if self._inside:
                    raise BackendError(f"a turn of {role!r} cannot begin inside one of {self._roles[-1]!r}")
                self._roles, self._inside = (*self._roles, role), True
                self._said.append(_Turn(role, []))
            case Close(role):
                if not self._inside or self._roles[-1] != role:
                    raise BackendError(f"no turn of {role!r} is open here")
                self._inside = False
            case Run(text, _) | Ids(_, text):
                if self._inside:
                    self._said[-1].parts.append(text)
                self.loose = self.loose or not self._inside
        self._items.append(item)
        self._log(item)

    def wrote(self, ids: list[int] | None, text: str) -> None:
        """The model wrote ``text``, and its handle holds it."""
        if self._inside:
            self._said[-1].parts.append(text)
        self._shown.append(text)
        self._log(Run(text) if ids is None else Ids(ids, text))

    def log(self) -> list[Item]:
        """A list that from now on gets every item; see `unlog`."""
        self._logs.append([])
        return self._logs[-1]

    def unlog(self, log: list[Item]) -> None:
        self._logs = [other for other in self._logs if other is not log]

    def _log(self, item: Item) -> None:
        for log in self._logs:
            log.append(item)

    def use_variables(self, variables: Variables) -> None:
        """Raises `BackendError` once the conversation's beginning has been written, or where tools have no place."""
        if variables.values.get("tools") and not self._chats and not (self._turns and self._turns.writes_tools):
            raise BackendError(f"the model of {self._backend} has no place for tools in its chat template")
        if variables != self.variables and self._place.turns:
            raise BackendError("tools must be given before the conversation has been read by the model")
        self.variables = variables

    # -- reading -------------------------------------------------------------------------------------------------------

    @property
    def as_messages(self) -> bool:
        """There are turns, and the backend wants them as they are."""
        return bool(self._roles) and self._chats

    @property
    def speaking(self) -> str | None:
        """Whose turn is open."""
        return self._roles[-1] if self._inside else None

    def messages(self) -> list[Message]:
        return [Message(turn.role, "".join(turn.parts)) for turn in self._said]

    def shown(self) -> str:
        """The text handed over so far."""
        if self.as_messages:
            return self.text()
        if len(self._shown) > 1:
            self._shown = ["".join(self._shown)]
        return self._shown[0] if self._shown else ""

    def text(self) -> str:
        """All text: what was handed over, and what waits as it would be written now."""
        if self.as_messages:
            return "\n".join(f"{one.role}: {one.content}" for one in self.messages()) + "\n" * (not self._inside)
        betweens = self._betweens(False)
        outs, place = self._walk(self._items, betweens)
        ending = betweens[-1] if place.turns and not place.inside and not place.tail else ""
        return self.shown() + "".join(out.text for out in outs) + ending

    # -- handing over --------------------------------------------------------------------------------------------------

    def take(self) -> list[Out]:
        """All that waits, for the model to go on from. Raises `BackendError` if the template cannot write it."""
        betweens = self._betweens(True)
        outs, place = self._walk(self._items, betweens)
        if place.turns and not place.inside and not place.tail:
            outs.append(Run(betweens[-1], True))
            place.tail = betweens[-1]
        return self._hand_over(outs, [], place)

    def take_settled(self) -> list[Out]:
        """As much of what waits as will be written and tokenized so, whatever is appended next."""
        if self.as_messages:
            return []
        last = len(self._items)
        begun = self._place.turns + sum(isinstance(item, Open) for item in self._items)
        if self._turns is not None and begun > self._place.turns:
            # An open turn counts if its beginning is known: an assistant's depends on whether the model writes in it.
            unknown = self._inside and (self._roles[-1] == "assistant" or self._turns.strips(self._roles[-1]))
            settled = self._turns.settled(self._roles[: begun - unknown], self.variables)
            last = _end_of_turn(self._items, settled - self._place.turns)
        items, rest = self._items[:last], self._items[last:]
        if items and isinstance(items[-1], Run):
            text, is_special = items[-1]
            cut = safe_cut(text) if not rest else len(text)
            items[-1:] = [Run(text[:cut], is_special)] if cut else []
            rest = [*([Run(text[cut:], is_special)] if cut < len(text) else []), *rest]
        if not items:
            return []
        outs, place = self._walk(items, self._betweens(False))
        return self._hand_over(outs, rest, place)

    def _hand_over(self, outs: list[Out], rest: list[Item], place: _Place) -> list[Out]:
        self._items, self._place = rest, place
        self._shown += [out.text for out in outs]
        return outs

    def take_as_messages(self) -> None:
        """All that waits went to the backend as messages."""
        self._items.clear()

    # -- turns ---------------------------------------------------------------------------------------------------------

    def _betweens(self, generate: bool) -> tuple[str, ...]:
        if not self._roles:
            return ("",)
        if self._turns is None:
            raise BackendError(f"the model of {self._backend} has no chat template: write the turns as text")
        waiting = self._inside and self._place.turns < len(self._roles)
        if waiting and generate and self._roles[-1] == "assistant":
            return self._turns.between(self._roles[:-1], True, self.variables)
        found = self._turns.between(self._roles, False, self.variables)
        return found[:-1] if self._inside else found

    def _walk(self, items: Iterable[Item], betweens: Sequence[str]) -> tuple[list[Out], _Place]:
        """Turns into text. Content is stripped where the template would."""
        place = _Place(self._place.turns, self._place.inside, self._place.tail)
        outs: list[Out] = []
        for item in self._stripped(list(items)):
            match item:
                case Open():
                    before = betweens[place.turns]
                    if not before.startswith(place.tail):
                        raise BackendError(
                            f"the model's chat template cannot be written turn by turn: {place.tail!r} stands where "
                            f"the next turn wants {before!r}"
                        )
                    outs.append(Run(before[len(place.tail) :], True))
                    place = _Place(place.turns + 1, True)
                case Close():
                    place.inside = False
                case _:
                    if place.turns and not place.inside and not place.tail and self._turns is not None:
                        place.tail = self._turns.between(self._roles[: place.turns], False, self.variables)[-1]
                        outs.append(Run(place.tail, True))
                    outs.append(item)
        return outs, place

    def _stripped(self, items: list[Item]) -> list[Item]:
        if self._turns is None:
            return items
        found: list[Item] = []
        start: int | None = None
        for item in items:
            found.append(item)
            if isinstance(item, Open):
                start = len(found)
            elif isinstance(item, Close) and start is not None:
                content = found[start:-1]
                runs = [one for one in content if isinstance(one, Run)]
                if len(runs) == len(content) and runs and self._turns.strips(item.role):
                    found[start:-1] = _strip(runs)
        return found


def _strip(runs: list[Run]) -> list[Run]:
    while runs and not runs[0].text.strip():
        runs = runs[1:]
    while runs and not runs[-1].text.strip():
        runs = runs[:-1]
    if runs:
        runs = [Run(runs[0].text.lstrip(), runs[0].special), *runs[1:]]
        runs[-1] = Run(runs[-1].text.rstrip(), runs[-1].special)
    return runs


def _end_of_turn(items: list[Item], count: int) -> int:
    """Up to where the contents of the first ``count`` waiting turns go: the ``Close`` itself is left waiting."""
    if count <= 0:
        first = next((i for i, item in enumerate(items) if isinstance(item, Open)), len(items))
        return first if not any(isinstance(item, Close) for item in items[:first]) else 0
    seen = 0
    for i, item in enumerate(items):
        seen += isinstance(item, Open)
        if seen == count and isinstance(item, Close):
            return i
    return len(items)
