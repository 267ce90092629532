"""The part of a state that was not yet passed to its backend, and the rendering of turns as text.

Text stays here, untokenized, until the model continues it: then it is encoded as one piece. Turns stay with it, because
some templates write a turn differently depending on what follows it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from ..errors import BackendError
from .backend import Turn
from .codec import Run, safe_cut
from .turns import NO_VARIABLES, TemplateVariables, TurnTemplate


class Ids(NamedTuple):
    """Tokens that the model generated, and their text."""

    ids: list[int]
    text: str


class Open(NamedTuple):
    role: str


class Close(NamedTuple):
    role: str


Item = Run | Ids | Open | Close
Out = Run | Ids


@dataclass(slots=True)
class _OpenTurn:
    role: str
    parts: list[str]


@dataclass(slots=True)
class _Position:
    """Among the turns. ``inside``: in a turn's content. ``tail``: what the template wrote since the last content."""

    turns: int = 0
    inside: bool = False
    tail: str = ""


class Transcript:
    """One state's text. ``template``: the model's; None: it has none, or, if the backend ``chats``, the backend takes
    messages and applies it. ``backend``: its name, for errors."""

    def __init__(self, template: TurnTemplate | None, backend: str, *, chats: bool = False) -> None:
        self._template = template
        self._backend = backend
        self._chats = chats
        self._items: list[Item] = []
        self._position = _Position()
        self._roles: tuple[str, ...] = ()  # of all turns, pending ones included
        self._inside = False  # a turn is open after all items
        self._all_turns: list[_OpenTurn] = []
        self._shown: list[str] = []
        self._logs: list[list[Item]] = []
        self.variables: TemplateVariables = NO_VARIABLES
        self.loose = False  # there is text outside turns

    def fork(self) -> Transcript:
        child = Transcript(self._template, self._backend, chats=self._chats)
        child._items = list(self._items)
        child._position = _Position(self._position.turns, self._position.inside, self._position.tail)
        child._roles, child._inside = self._roles, self._inside
        child._all_turns = [
            *self._all_turns[:-1],
            *(_OpenTurn(turn.role, list(turn.parts)) for turn in self._all_turns[-1:]),
        ]
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
                self._all_turns.append(_OpenTurn(role, []))
            case Close(role):
                if not self._inside or self._roles[-1] != role:
                    raise BackendError(f"no turn of {role!r} is open here")
                self._inside = False
            case Run(text, _) | Ids(_, text):
                if self._inside:
                    self._all_turns[-1].parts.append(text)
                self.loose = self.loose or not self._inside
        self._items.append(item)
        self._log(item)

    def wrote(self, ids: list[int] | None, text: str) -> None:
        """The model generated ``text``, and the handle already contains it."""
        if self._inside:
            self._all_turns[-1].parts.append(text)
        self._shown.append(text)
        self._log(Run(text) if ids is None else Ids(ids, text))

    def log(self) -> list[Item]:
        """A list to which every item is added from now on; see `unlog`."""
        self._logs.append([])
        return self._logs[-1]

    def unlog(self, log: list[Item]) -> None:
        self._logs = [other for other in self._logs if other is not log]

    def _log(self, item: Item) -> None:
        for log in self._logs:
            log.append(item)

    def use_variables(self, variables: TemplateVariables) -> None:
        """Raises `BackendError` once the conversation's beginning has been written, or where tools have no position."""
        if variables.values.get("tools") and not self._chats and not (self._template and self._template.writes_tools):
            raise BackendError(f"the model of {self._backend} has no place for tools in its chat template")
        if variables != self.variables and self._position.turns:
            raise BackendError("tools must be given before the conversation has been read by the model")
        self.variables = variables

    # -- reading -------------------------------------------------------------------------------------------------------

    @property
    def as_messages(self) -> bool:
        """There are turns, and the backend takes them as such."""
        return bool(self._roles) and self._chats

    @property
    def speaking(self) -> str | None:
        """The role of the open turn."""
        return self._roles[-1] if self._inside else None

    def turns(self) -> list[Turn]:
        return [Turn(turn.role, "".join(turn.parts)) for turn in self._all_turns]

    def shown(self) -> str:
        """The text passed to the backend so far."""
        if self.as_messages:
            return self.text()
        if len(self._shown) > 1:
            self._shown = ["".join(self._shown)]
        return self._shown[0] if self._shown else ""

    def text(self) -> str:
        """All text: what was passed on, and what is pending as it would be written now."""
        if self.as_messages:
            return "\n".join(f"{one.role}: {one.content}" for one in self.turns()) + "\n" * (not self._inside)
        betweens = self._betweens(False)
        outs, position = self._walk(self._items, betweens)
        ending = betweens[-1] if position.turns and not position.inside and not position.tail else ""
        return self.shown() + "".join(out.text for out in outs) + ending

    # -- passing on ----------------------------------------------------------------------------------------------------

    def take(self) -> list[Out]:
        """All that is pending, for the model to continue. Raises `BackendError` if the template cannot write it."""
        betweens = self._betweens(True)
        outs, position = self._walk(self._items, betweens)
        if position.turns and not position.inside and not position.tail:
            outs.append(Run(betweens[-1], True))
            position.tail = betweens[-1]
        return self._pass_on(outs, [], position)

    def take_settled(self) -> list[Out]:
        """The pending text whose form and tokens do not depend on what is appended next."""
        if self.as_messages:
            return []
        last = len(self._items)
        begun = self._position.turns + sum(isinstance(item, Open) for item in self._items)
        if self._template is not None and begun > self._position.turns:
            # An open turn counts if its beginning is known: an assistant's depends on whether the model continues it.
            unknown = self._inside and (self._roles[-1] == "assistant" or self._template.strips(self._roles[-1]))
            settled = self._template.settled(self._roles[: begun - unknown], self.variables)
            last = _end_of_turn(self._items, settled - self._position.turns)
        items, rest = self._items[:last], self._items[last:]
        if items and isinstance(items[-1], Run):
            text, is_special = items[-1]
            cut = safe_cut(text) if not rest else len(text)
            items[-1:] = [Run(text[:cut], is_special)] if cut else []
            rest = [*([Run(text[cut:], is_special)] if cut < len(text) else []), *rest]
        if not items:
            return []
        outs, position = self._walk(items, self._betweens(False))
        return self._pass_on(outs, rest, position)

    def _pass_on(self, outs: list[Out], rest: list[Item], position: _Position) -> list[Out]:
        self._items, self._position = rest, position
        self._shown += [out.text for out in outs]
        return outs

    def take_as_messages(self) -> None:
        """All that is pending was passed on as turns."""
        self._items.clear()

    # -- turns ---------------------------------------------------------------------------------------------------------

    def _betweens(self, generate: bool) -> tuple[str, ...]:
        if not self._roles:
            return ("",)
        if self._template is None:
            raise BackendError(f"the model of {self._backend} has no chat template: write the turns as text")
        pending = self._inside and self._position.turns < len(self._roles)
        if pending and generate and self._roles[-1] == "assistant":
            return self._template.between(self._roles[:-1], True, self.variables)
        found = self._template.between(self._roles, False, self.variables)
        return found[:-1] if self._inside else found

    def _walk(self, items: Iterable[Item], betweens: Sequence[str]) -> tuple[list[Out], _Position]:
        """Writes turns as text. Content is stripped where the template would strip it."""
        position = _Position(self._position.turns, self._position.inside, self._position.tail)
        outs: list[Out] = []
        for item in self._stripped(list(items)):
            match item:
                case Open():
                    before = betweens[position.turns]
                    if not before.startswith(position.tail):
                        raise BackendError(
                            f"the model's chat template cannot be written turn by turn: it ended a turn with "
                            f"{position.tail!r}, and begins the next one with {before!r}"
                        )
                    outs.append(Run(before[len(position.tail) :], True))
                    position = _Position(position.turns + 1, True)
                case Close():
                    position.inside = False
                case _:
                    if position.turns and not position.inside and not position.tail and self._template is not None:
                        position.tail = self._template.between(self._roles[: position.turns], False, self.variables)[-1]
                        outs.append(Run(position.tail, True))
                    outs.append(item)
        return outs, position

    def _stripped(self, items: list[Item]) -> list[Item]:
        if self._template is None:
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
                if len(runs) == len(content) and runs and self._template.strips(item.role):
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
    """The index at which the content of the first ``count`` pending turns ends; their last ``Close`` stays pending."""
    if count <= 0:
        first = next((i for i, item in enumerate(items) if isinstance(item, Open)), len(items))
        return first if not any(isinstance(item, Close) for item in items[:first]) else 0
    seen = 0
    for i, item in enumerate(items):
        seen += isinstance(item, Open)
        if seen == count and isinstance(item, Close):
            return i
    return len(items)
