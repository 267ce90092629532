"""What a constrained call looks like: plain data for a grammar engine, which this package does not know.

For ``tool_choice`` required or a name the grammar holds from the first token of the answer (after reasoning); for
auto it is armed once the output shows one of `CallGrammar.triggers`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import msgspec

from .definitions import Tool
from .formats import ToolFormat, tool_format
from .payloads import END_FUNCTION, END_PARAMETER, PARAMETER
from .schema_values import parameter_types

Body = Literal["json", "xml", "keywords"]


class CallTag(msgspec.Struct, frozen=True):
    """One tool's call: ``begin``, the arguments under ``schema``, ``end``. A structural tag, if the body is JSON."""

    name: str
    begin: str
    schema: dict[str, Any]
    end: str


class CallGrammar(msgspec.Struct, frozen=True):
    """``prefix``, one call or more with ``separator`` between them, ``suffix``: as the checkpoint's template has it.

    ``body``: how arguments are written: a JSON object, XML parameters, or Python keywords (with JSON values).
    ``at_most_one``: parallel calls are not wanted. ``triggers``: a text of which any in the output means that a call
    has begun; ``at_start``: only where nothing but whitespace came before it.
    """

    body: Body
    tags: tuple[CallTag, ...]
    prefix: str
    separator: str
    suffix: str
    at_most_one: bool
    triggers: tuple[str, ...]
    at_start: bool

    def lark(
        self, special_tokens: Mapping[str, int] | None = None, *, after: str = "", beside_json: bool = False
    ) -> str:
        """The grammar in llguidance's dialect of Lark, which holds JSON schemas.

        ``special_tokens``: text and id of the tokens that stand for markers and never match as text. ``after``: the
        trigger that is already there; the grammar is of what follows it. ``beside_json``: the output may be JSON
        instead of a call. Raises ValueError if no call begins so.
        """
        return _Lark(self, special_tokens or {}, _JSON_PIECES if beside_json else _WHOLE).whole(after)


class _Written(msgspec.Struct, frozen=True):
    begin: str  # NAME stands for the tool's
    end: str
    prefix: str = ""
    separator: str = ""
    suffix: str = ""
    body: Body = "json"
    trigger: str = ""  # "": the first characters of each call, at the start of the answer


_WRITTEN = {
    "hermes": _Written(
        '<tool_call>\n{"name": "NAME", "arguments": ', "}\n</tool_call>", separator="\n", trigger="<tool_call>"
    ),
    "llama3_json": _Written('{"name": "NAME", "parameters": ', "}", separator="; "),
    "mistral": _Written('{"name": "NAME", "arguments": ', "}", "[TOOL_CALLS] [", ", ", "]", trigger="[TOOL_CALLS]"),
    "mistral_named": _Written("[TOOL_CALLS]NAME[ARGS]", "", trigger="[TOOL_CALLS]"),
    "qwen3_coder": _Written(
        "<tool_call>\n<function=NAME>\n",
        f"{END_FUNCTION}\n</tool_call>",
        separator="\n",
        body="xml",
        trigger="<tool_call>",
    ),
    "pythonic": _Written("NAME(", ")", "[", ", ", "]", body="keywords"),
}


def call_grammar(
    format: ToolFormat | str,
    tools: Sequence[Tool],
    *,
    named: str | None = None,
    parallel: bool = True,
    only_strict: bool = False,
) -> CallGrammar:
    """The calls a request allows.

    ``named``: only of this tool. ``only_strict``: the arguments of tools that are not ``strict`` may be any object
    (``tool_choice`` auto). Raises ValueError if there is no such tool, or none at all.
    """
    name = format if isinstance(format, str) else format.name
    written = _WRITTEN[tool_format(name).name]
    chosen = [tool for tool in tools if named is None or tool.name == named]
    if not chosen:
        raise ValueError(f"there is no tool named {named!r}" if named is not None else "there are no tools")
    anything: dict[str, Any] = {"type": "object"}
    tags = tuple(
        CallTag(
            tool.name,
            written.begin.replace("NAME", tool.name),
            anything if only_strict and not tool.strict and written.body == "json" else tool.parameters,
            written.end,
        )
        for tool in chosen
    )
    triggers = (written.trigger,) if written.trigger else tuple(written.prefix + _opening(tag.begin) for tag in tags)
    return CallGrammar(
        written.body,
        tags,
        written.prefix,
        written.separator,
        written.suffix,
        not parallel,
        tuple(dict.fromkeys(triggers)),
        not written.trigger,
    )


def _opening(begin: str) -> str:
    """As much of a call as tells it from text: its name's opening quote, or its opening parenthesis."""
    return begin[: begin.index(': "') + 3] if ': "' in begin else begin


_NO_TAG = "|".join(re.escape(tag).replace("/", r"\/") for tag in (END_PARAMETER, PARAMETER, END_FUNCTION))


class _Lark:
    """Writes one grammar."""

    def __init__(self, grammar: CallGrammar, special_tokens: Mapping[str, int], literals: re.Pattern[str]) -> None:
        """``literals`` cuts text into the literals to write."""
        self._grammar = grammar
        self._literals = literals
        self._specials = {text: id for text, id in special_tokens.items() if text}
        alternatives = sorted(self._specials, key=len, reverse=True)
        self._split = re.compile(f"({'|'.join(map(re.escape, alternatives))})") if alternatives else None
        self._rules: list[str] = []

    def whole(self, after: str) -> str:
        grammar = self._grammar
        firsts, nexts = [], []
        for i, tag in enumerate(grammar.tags):
            self._body(f"args_{i}", tag.schema)
            rest = [f"args_{i}", self._text(tag.end)]
            opening = grammar.prefix + tag.begin
            if opening.startswith(after):
                firsts.append(self._join(self._text(opening[len(after) :]), *rest))
            nexts.append(self._join(self._text(grammar.separator + tag.begin), *rest))
        if not firsts:
            raise ValueError(f"no call begins with {after!r}")
        more = "" if grammar.at_most_one else "next*"
        self._rules.insert(0, f"start: {self._join('first', more, self._text(grammar.suffix))}")
        self._rules.insert(1, f"first: {' | '.join(firsts)}")
        if more:
            self._rules.insert(2, f"next: {' | '.join(nexts)}")
        return "\n".join([*self._rules, ""])

    def _body(self, rule: str, schema: dict[str, Any]) -> None:
        if self._grammar.body == "json":
            self._rules.append(f"{rule}: %json {json.dumps(schema)}")
            return
        properties = schema.get("properties") or {}
        required = schema.get("required") or []
        tool = Tool("", schema)
        for i, (key, value) in enumerate(properties.items()):
            inner = value if isinstance(value, dict) else {}
            inner = inner | {name: schema[name] for name in ("$defs", "definitions") if name in schema}
            if self._grammar.body == "xml":
                self._parameter(f"{rule}_{i}", key, inner, parameter_types(tool, key))
            else:
                self._rules.append(f"{rule}_{i}: {self._text(f'{key}=')} %json {json.dumps(inner)}")
        if self._grammar.body == "xml":
            items = [f"{rule}_{i}" + ("" if key in required else "?") for i, key in enumerate(properties)]
            self._rules.append(f"{rule}: {self._join(*items) or _EMPTY}")
        else:
            self._list(rule, [key in required for key in properties])

    def _parameter(self, rule: str, key: str, schema: dict[str, Any], types: frozenset[str]) -> None:
        opening, closing = self._text(f"{PARAMETER}{key}>\n"), json.dumps(f"\n{END_PARAMETER}\n")
        values = schema.get("enum")
        if types == {"string"} and isinstance(values, list) and values:
            choice = " | ".join(json.dumps(value, ensure_ascii=False) for value in values)
            self._rules.append(f"{rule}: {opening} ({choice}) {closing}")
        elif "string" in types:
            terminal = rule.upper()
            self._rules.append(f"{terminal}: (/(?s:.*)/ & ~/(?s:.*)({_NO_TAG})(?s:.*)/) {closing}")
            self._rules.append(f"{rule}: {opening} {terminal}")
        else:
            self._rules.append(f"{rule}: {opening} %json {json.dumps(schema)} {closing}")

    def _list(self, rule: str, required: list[bool]) -> None:
        """``rule``: its items in order with commas between them; those not required may be left out."""
        count = len(required)
        self._rules.append(f"{rule}: {rule}_first_0")
        for i, needed in enumerate(required):
            for kind, comma in (("first", ""), ("more", '", " ')):
                skipped = "" if needed else f" | {rule}_{kind}_{i + 1}"
                self._rules.append(f"{rule}_{kind}_{i}: {comma}{rule}_{i} {rule}_more_{i + 1}{skipped}")
        for kind in ("first", "more") if count else ("first",):
            self._rules.append(f"{rule}_{kind}_{count}: {_EMPTY}")

    def _text(self, text: str) -> str:
        """``text`` as literals and special tokens."""
        parts: list[str] = []
        for part in self._split.split(text) if self._split else [text]:
            if part in self._specials:
                parts.append(f"<[{self._specials[part]}]>")
            else:
                parts += [json.dumps(piece, ensure_ascii=False) for piece in self._literals.findall(part)]
        return " ".join(parts)

    @staticmethod
    def _join(*parts: str) -> str:
        return " ".join(part for part in parts if part)


_EMPTY = '""'
_WHOLE = re.compile(r"(?s:.+)")
# Of what a JSON lexer would take for one lexeme each: the longest match wins, so one long literal would swallow the
# beginning of an answer that is JSON too.
_JSON_PIECES = re.compile(r'[{}]|"[^"]*"|[^{}"]+|"')
