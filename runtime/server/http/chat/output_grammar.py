"""The grammar of a chat's whole output: thinking, then calls or an answer, in llguidance's dialect of Lark.

`chat.tools.grammar` describes calls and `runtime.grammar` enforces grammars; this module combines the parts.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence

import msgspec

from ....chat.conversation import OfferedTool
from ....chat.tools.channel_grammar import message_rules
from ....chat.tools.definitions import Tool
from ....chat.tools.format_types import ReasoningFormat
from ....chat.tools.grammar import ANY, CallGrammar, call_grammar, literals, one_of, text_without
from ....constraint import Constraint, ConstraintError
from ....errors import InvalidRequest
from ....grammar import schema
from ....sampling_params import SamplingParams


def prepared(tools: Sequence[OfferedTool]) -> list[Tool]:
    """The tools with schemas as the grammar engine takes them. Raises `InvalidRequest` naming the schema."""
    result = []
    for offered in tools:
        try:
            parameters = schema.parse(json.dumps(offered.tool.parameters))
        except ConstraintError as error:
            raise InvalidRequest(offered.schema_path, f"of {offered.tool.name!r} {error.problem}") from error
        result.append(msgspec.structs.replace(offered.tool, parameters=parameters))
    return result


class OutputGrammar:
    """``calls``: those that the output may have, or must have if ``forced``. ``special``: markers that are special
    tokens, and their ids."""

    def __init__(
        self, calls: CallGrammar | None, forced: bool, thoughts: ReasoningFormat | None, special: Mapping[str, int]
    ) -> None:
        self._calls = calls
        self._forced = forced
        self._thoughts = thoughts
        self._special = special

    def applied(self, params: SamplingParams, prompt: str) -> SamplingParams:
        """``params`` with the constraint on the whole output after ``prompt``.

        The client's own constraint applies to the answer, not to thinking before it or calls instead of it. A JSON
        schema is dropped where calls are forced, which leaves no answer to format. Raises `InvalidRequest` for a
        constraint that cannot be combined with calls.
        """
        asked = params.constraint
        if self._calls is not None and asked is not None and asked.kind != "json_schema":
            raise InvalidRequest(asked.kind, "cannot be combined with these tools and tool_choice")
        if self._forced:
            asked = None
        thought = self._thought(prompt)
        if self._calls is None and (asked is None or not thought or asked.kind not in ("json_schema", "choices")):
            return params
        try:
            rules = self._rules(asked)
        except ConstraintError as error:  # of the answer's schema
            raise InvalidRequest("json_schema", error.problem) from error
        if thought[:1] == ["thought?"] and rules[0].startswith("body: message*"):
            thought = []  # the body's messages include those of thinking
        start = "start: body" if not thought else f"start: {thought[0]} body"
        grammar = "\n".join([start, *rules, *thought[1:], ""])
        return msgspec.structs.replace(params.without_constraint(), ebnf=grammar)

    def _rules(self, asked: Constraint | None) -> list[str]:
        calls = self._calls
        before, after = self._around_answer()
        answer = [] if asked is None else [f"answer: {before} {_answer(asked)} {after}"]
        if calls is None:
            return ["body: answer", *answer]
        if self._forced:
            return ["body: calls", self._call_rule(calls)]
        if calls.channels is not None:
            return [*message_rules(calls, calls.channels, self._special, answer=bool(answer)), *answer]
        trigger = calls.triggers[0]
        begun = f"<[{self._special[trigger]}]>" if trigger in self._special else json.dumps(trigger)
        if answer:
            # No text before a call: the lexer takes the longest match, and a rule for any text would match answers too.
            if calls.at_start:
                return ["body: answer | calls", self._call_rule(calls, beside_json=True), *answer]
            return [f"body: answer | {begun} calls", self._call_rule(calls, trigger), *answer]
        # Any text that does not begin a call is an answer.
        if calls.at_start:
            plain = f"PLAIN: {ANY} & ~/[ \\t\\r\\n]*({one_of(calls.triggers)})(?s:.*)/"
            return ["body: PLAIN | calls", self._call_rule(calls), plain]
        if trigger in self._special:  # no text is ever equal to it
            wrapped = self._thoughts is not None and self._thoughts.answer in self._special
            reply = f"{before} PLAIN {after}" if wrapped else "PLAIN"
            return [f"body: {reply} | PLAIN {begun} calls", self._call_rule(calls, trigger), f"PLAIN: {ANY}"]
        return [
            "body: PLAIN | before calls",
            self._call_rule(calls, trigger),
            f"before[suffix={begun}]: {ANY}",
            f"PLAIN: {text_without(calls.triggers)}",
        ]

    def _call_rule(self, calls: CallGrammar, after: str = "", *, beside_json: bool = False) -> str:
        lark = calls.lark(self._special, after=after, beside_json=beside_json)
        return "calls: " + lark.removeprefix("start: ").rstrip("\n")

    def _thought(self, prompt: str) -> list[str]:
        """The symbol for thinking in ``start``, then its rules; empty if thinking is over or has no known format."""
        format = self._thoughts
        if format is None or prompt.rstrip().endswith(format.end):
            return []
        if format.end in self._special:
            inner = [f"inner: THOUGHT <[{self._special[format.end]}]> GAP", f"THOUGHT: {ANY}"]
        else:
            inner = ["inner: thought_text GAP", f"thought_text[suffix={json.dumps(format.end)}]: {ANY}"]
        inner.append("GAP: /\\n{0,2}/")
        if format.after:
            inner[0] += f" {literals(format.after, self._special)}"
        if prompt.rstrip().endswith(format.begin):
            return ["inner", *inner]
        return ["thought?", f"thought: {literals(format.begin, self._special)} inner", *inner]

    def _around_answer(self) -> tuple[str, str]:
        """The symbols before and after an answer: of a message's header, or of markers, which may be left out."""
        if self._thoughts is None:
            return "", ""
        marked = (self._thoughts.answer, self._thoughts.answer_end)
        before, after = (literals(marker, self._special) for marker in marked)
        if self._thoughts.channels is not None:
            return before, after
        return f"({before})?" if before else "", f"({after})?" if after else ""


def calls_for(format: str, tools: Sequence[OfferedTool], *, enforced: bool, parallel: bool) -> CallGrammar | None:
    """``enforced``: calls of these tools only, whose arguments follow their schemas. Otherwise any tool may be called
    and only the arguments of strict tools are constrained; None if there are none."""
    if not tools or not (enforced or any(offered.tool.strict for offered in tools)):
        return None
    return call_grammar(format, prepared(tools), parallel=parallel, only_strict=not enforced)


def _answer(asked: Constraint) -> str:
    if asked.kind == "choices":
        return " | ".join(json.dumps(choice, ensure_ascii=False) for choice in json.loads(asked.text))
    return f"%json {json.dumps(schema.parse(asked.text))}"
