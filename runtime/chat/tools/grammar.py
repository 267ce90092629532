"""The grammar of constrained calls, as plain data that does not depend on a grammar engine.

With ``tool_choice`` required or named the grammar applies from the first token of the answer (after reasoning); with
auto it applies once the output contains one of `CallGrammar.triggers`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import msgspec

from .definitions import Tool
from .format_types import Body, Channels, Tags, ToolFormat
from .formats import tool_format
from .schema_values import parameter_types


class CallTag(msgspec.Struct, frozen=True):
    """One tool's call: ``begin``, the arguments under ``schema``, ``end``. A structural tag, if the body is JSON."""

    name: str
    begin: str
    schema: dict[str, Any]
    end: str


class CallGrammar(msgspec.Struct, frozen=True):
    """``prefix``, one call or more with ``separator`` between them, ``suffix``: as the checkpoint's template has it.

    ``body``: how arguments are written: a JSON object, parameters in the tags of ``markup``, or keywords with JSON
    values and, with ``quote``, strings in ``quote``. ``at_most_one``: no parallel calls. ``triggers``: a call has begun
    where the output contains any of these; ``at_start``: only where nothing but whitespace came before it.
    ``channels``: each call is a message (`channel_grammar`).
    """

    body: Body
    tags: tuple[CallTag, ...]
    prefix: str
    separator: str
    suffix: str
    at_most_one: bool
    triggers: tuple[str, ...]
    at_start: bool
    markup: Tags | None = None
    quote: str = ""
    channels: Channels | None = None

    def lark(
        self, special_tokens: Mapping[str, int] | None = None, *, after: str = "", beside_json: bool = False
    ) -> str:
        """The grammar in llguidance's dialect of Lark, which holds JSON schemas.

        ``special_tokens``: text and id of the tokens that stand for markers and never match as text. ``after``: the
        trigger that is already there; the grammar is of what follows it. ``beside_json``: the output may be JSON
        instead of a call. Raises ValueError if no call begins so.
        """
        return _Lark(self, special_tokens or {}, _JSON_PIECES if beside_json else _WHOLE).whole(after)


def call_grammar(
    format: ToolFormat | str,
    tools: Sequence[Tool],
    *,
    parallel: bool = True,
    only_strict: bool = False,
) -> CallGrammar:
    """The calls a request allows.

    ``only_strict``: the arguments of tools that are not ``strict`` may be any object (``tool_choice`` auto). Raises
    ValueError if there are no tools.
    """
    format = tool_format(format) if isinstance(format, str) else format
    written = format.written
    if not tools:
        raise ValueError("there are no tools")
    anything: dict[str, Any] = {"type": "object"}
    tags = tuple(
        CallTag(
            tool.name,
            written.begin.replace("NAME", tool.name),
            anything if only_strict and not tool.strict and written.body == "json" else tool.parameters,
            written.end,
        )
        for tool in tools
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
        format.tags,
        format.quote,
        format.channels,
    )


def _opening(begin: str) -> str:
    """The beginning of a call that distinguishes it from text: its name's opening quote, or its opening parenthesis."""
    return begin[: begin.index(': "') + 3] if ': "' in begin else begin


_INDEX = "\0"  # stands for a number in `formats.Written`
_KEYWORD_GLUE = {False: ("=", ", "), True: (":", ",")}  # with bare keys and quoted strings, or not


class _Lark:
    """Writes one grammar."""

    def __init__(self, grammar: CallGrammar, special_tokens: Mapping[str, int], literals: re.Pattern[str]) -> None:
        """``literals`` cuts text into the literals to write."""
        self._grammar = grammar
        self._literals = literals
        self._specials = special_tokens
        self._glue = _KEYWORD_GLUE[bool(grammar.quote)]
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
            self._parameter(f"{rule}_{i}", key, inner, parameter_types(tool, key))
        if self._grammar.body == "tags":
            items = [f"{rule}_{i}" + ("" if key in required else "?") for i, key in enumerate(properties)]
            self._rules.append(f"{rule}: {self._join(*items) or _EMPTY}")
        else:
            self._list(rule, [key in required for key in properties])

    def _parameter(self, rule: str, key: str, schema: dict[str, Any], types: frozenset[str]) -> None:
        """``rule``: one parameter. JSON where values are JSON, raw text where strings stand between tags or quotes."""
        tags, quote = self._grammar.markup, self._grammar.quote
        raw = "string" in types
        if tags:
            padding = "\n" if tags.padded and tags.pads else ""
            declared = tags.declares[not raw] if tags.declares else ""
            opening = f"{tags.parameter}{key}{declared}{tags.key_end}{padding}"
            closing = f"{padding}{tags.value_end}" + "\n" * tags.lines
            ends = [tags.value_end, tags.parameter, *([tags.function_end] if tags.function_end else [])]
        else:
            raw = raw and bool(quote)
            opening = f"{key}{self._glue[0]}" + quote * raw
            closing, ends = quote * raw, [quote]
        opening, closing = self._text(opening), self._text(closing)
        values = schema.get("enum")
        if not raw:
            value = f"%json {json.dumps(schema)}"
        elif types == {"string"} and isinstance(values, list) and values:
            value = f"({' | '.join(json.dumps(value, ensure_ascii=False) for value in values)})"
        else:
            value = rule.upper()
            text = f"({text_without(ends)})"
            if closing.startswith('"'):  # one terminal, so that the lexer takes the shortest match
                text, closing = f"{text} {closing}", ""
            self._rules.append(f"{value}: {text}")
        self._rules.append(f"{rule}: {self._join(opening, value, closing)}")

    def _list(self, rule: str, required: list[bool]) -> None:
        """``rule``: its items in order with commas between them; those not required may be left out."""
        count = len(required)
        self._rules.append(f"{rule}: {rule}_first_0")
        for i, needed in enumerate(required):
            for kind, comma in (("first", ""), ("more", f"{json.dumps(self._glue[1])} ")):
                skipped = "" if needed else f" | {rule}_{kind}_{i + 1}"
                self._rules.append(f"{rule}_{kind}_{i}: {comma}{rule}_{i} {rule}_more_{i + 1}{skipped}")
        for kind in ("first", "more") if count else ("first",):
            self._rules.append(f"{rule}_{kind}_{count}: {_EMPTY}")

    def _text(self, text: str) -> str:
        return literals(text, self._specials, self._literals)

    @staticmethod
    def _join(*parts: str) -> str:
        return " ".join(part for part in parts if part)


ANY = "/(?s:.*)/"  # any text, in Lark


def one_of(texts: Iterable[str]) -> str:
    """A regular expression, inside Lark's slashes, of each of ``texts``."""
    return "|".join(re.escape(text).replace("/", r"\/").replace("\n", "n") for text in texts)


def text_without(texts: Iterable[str]) -> str:
    """A terminal of Lark: any text that contains none of ``texts``."""
    return f"{ANY} & ~/(?s:.*)({one_of(texts)})(?s:.*)/"


def literals(text: str, special_tokens: Mapping[str, int], pieces: re.Pattern[str] | None = None) -> str:
    """``text`` as literals, special tokens and numbers. ``pieces`` cuts text into literals."""
    names = sorted((name for name in special_tokens if name), key=len, reverse=True)
    parts: list[str] = []
    for part in re.split(f"({'|'.join(map(re.escape, names))})", text) if names else [text]:
        if part in special_tokens:
            parts.append(f"<[{special_tokens[part]}]>")
        else:
            before, index, after = part.partition(_INDEX)
            parts += [json.dumps(piece, ensure_ascii=False) for piece in (pieces or _WHOLE).findall(before)]
            if index:
                parts += ["/[0-9]{1,4}/", literals(after, special_tokens, pieces)]
    return " ".join(parts)


_EMPTY = '""'
_WHOLE = re.compile(r"(?s:.+)")
# Of what a JSON lexer would take for one lexeme each: the longest match wins, so one long literal would swallow the
# beginning of an answer that is JSON too.
_JSON_PIECES = re.compile(r'[{}]|"[^"]*"|[^{}"]+|"')
