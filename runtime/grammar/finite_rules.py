"""Rules of a Lark grammar that derive no finite text, such as ``x: "c" x``, and terminals that match nothing."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from ..constraint import ConstraintError
from .finite import finite_names
from .patterns import matches_nothing

_TOKEN = re.compile(
    r"""(?P<skip>(?:\s+|//[^\n]*|\#[^\n]*)+)
    |(?P<string>"(?:\\.|[^"\\\n])*"i?)
    |(?P<regex>/(?:\\.|[^/\\\n])+/[a-z]*)
    |(?P<special><[^>\s]*>)
    |(?P<directive>%[a-z_]+)
    |(?P<name>[A-Za-z_][A-Za-z0-9_\-]*)
    |(?P<other>->|\.\.|::|.)""",
    re.VERBOSE | re.DOTALL,
)
_BLOCKS = frozenset({"%json", "%lark", "%regex"})  # a value in braces follows; other directives are statements
_MAX_NESTED = 200
_PRIORITY = frozenset(".-0123456789")


class _Token(NamedTuple):
    kind: str  # the group of the pattern above
    text: str
    start: int
    end: int


@dataclass(slots=True)
class _Rule:
    """``alternatives``: of each, its parts: names, or alternatives in brackets. What may be left out is left out."""

    text: str
    alternatives: list[_Parts] = field(default_factory=list)
    mentioned: list[str] = field(default_factory=list)  # names, and regular expressions as written
    computed: bool = False  # whether a terminal is an intersection or a complement


_Parts = list["str | list[_Parts]"]


def check_rules(lark: str) -> None:
    """Raises `ConstraintError` naming a rule or terminal, reachable from ``start``, that derives no finite text.

    Grammars with parametric rules are not checked.
    """
    rules = _Reader(lark).rules()
    if "start" not in rules:
        return
    reachable, pending = {"start": None}, ["start"]
    while pending:
        rule = rules.get(pending.pop())
        more = [name for name in (rule.mentioned if rule else ()) if name not in reachable]
        reachable |= dict.fromkeys(more)
        pending += more

    def is_finite(name: str, finite: set[str]) -> bool:
        return _derives(rules[name].alternatives, rules, finite)

    names = [name for name in reachable if name in rules]
    finite = finite_names(names, is_finite)
    endless = [name for name in names if name not in finite]
    if endless:
        raise ConstraintError(f"cannot be satisfied: rule {endless[-1]} derives no finite text")
    terminals = [name for name in reachable if name.startswith("/") or (name in rules and rules[name].computed)]
    definitions = "\n".join(rule.text for name, rule in rules.items() if name[0].isupper())
    if terminals and matches_nothing(definitions, " ".join(terminals)):
        nothing = next((name for name in terminals if matches_nothing(definitions, name)), terminals[0])
        raise ConstraintError(f"cannot be satisfied: {nothing} matches no text")


def _derives(alternatives: list[_Parts], rules: Mapping[str, _Rule], finite: set[str]) -> bool:
    return any(
        all(
            part in finite or part not in rules if isinstance(part, str) else _derives(part, rules, finite)
            for part in parts
        )
        for parts in alternatives
    )


class _Reader:
    def __init__(self, lark: str) -> None:
        self._lark = lark
        self._tokens = [
            _Token(match.lastgroup, match.group(), match.start(), match.end())
            for match in _TOKEN.finditer(lark)
            if match.lastgroup and match.lastgroup != "skip"
        ]
        self._at = 0

    def rules(self) -> dict[str, _Rule]:
        if any(token.text == "::" for token in self._tokens):
            return {}
        rules: dict[str, _Rule] = {}
        while self._at < len(self._tokens):
            body = self._body_of_statement()
            if not body:
                self._at += 1  # of a directive
                continue
            token = self._tokens[self._at]
            rule = rules[token.text] = _Rule("")
            self._at = body
            rule.alternatives = self._alternatives(rule)
            end = self._tokens[self._at - 1].end
            rule.text = self._lark[token.start : end]
        return rules

    def _body_of_statement(self) -> int:
        """Index of the first token behind the colon of the statement that begins here; 0 if none does."""
        if self._tokens[self._at].kind != "name":
            return 0
        at = self._at + 1
        if self._text(at) == "[":  # attributes
            while self._text(at) not in ("]", "|", ":", ""):
                at += 1
            at += 1
        while self._text(at) in _PRIORITY:
            at += 1
        return at + 1 if self._text(at) == ":" else 0

    def _text(self, at: int) -> str:
        return self._tokens[at].text if at < len(self._tokens) else ""

    def _alternatives(self, rule: _Rule, depth: int = 0) -> list[_Parts]:
        """Reads to the bracket that closes the group, or to the end of the statement."""
        if depth > _MAX_NESTED:
            raise ConstraintError(f"must have at most {_MAX_NESTED} nested brackets")
        found: list[_Parts] = [[]]
        while self._at < len(self._tokens):
            kind, text, *_ = token = self._tokens[self._at]
            if text in (")", "]") and depth:
                break
            if (not depth and self._body_of_statement()) or (kind == "directive" and text not in _BLOCKS):
                break
            self._at += 1
            part: str | list[_Parts] | None = None
            if text == "|":
                found.append([])
            elif text in ("&", "~"):
                rule.computed = True
            elif text in ("(", "["):
                part = self._alternatives(rule, depth + 1)
                self._at += 1
                if text == "[":
                    part = None
            elif text == "{" or token.text in _BLOCKS:
                self._skip_braces(opened=text == "{")
            elif kind in ("name", "regex") and self._text(self._at - 2) != "->":
                part = text
                rule.mentioned.append(text)
            if part is not None and not self._may_be_left_out():
                found[-1].append(part)
        return found

    def _may_be_left_out(self) -> bool:
        """Whether what was read is optional: ``?``, ``*``, ``{0,…}``, ``~0…``."""
        following, number = self._text(self._at), self._text(self._at + 1)
        return following in ("?", "*") or (following in ("{", "~") and number in ("0", ","))

    def _skip_braces(self, *, opened: bool) -> None:
        depth = int(opened)
        while self._at < len(self._tokens):
            depth += {"{": 1, "}": -1}.get(self._tokens[self._at].text, 0)
            self._at += 1
            if depth == 0:
                return
