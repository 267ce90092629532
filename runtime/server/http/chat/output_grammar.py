"""What a chat's output must be, as one grammar: thinking, then calls or an answer, each where the request wants it.

`runtime.tools.grammar` knows what a call looks like, `runtime.grammar` enforces. Here the parts are put together, in
llguidance's dialect of Lark.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence

import msgspec

from ....chat.conversation import OfferedTool
from ....chat.tools import ReasoningFormat, Tool
from ....chat.tools.grammar import CallGrammar, call_grammar
from ....constraint import Constraint, ConstraintError
from ....errors import InvalidRequest
from ....grammar import schema
from ....sampling_params import SamplingParams

_ANY = "/(?s:.*)/"


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
    """``calls``: those the output may have, or must if ``forced``. ``special``: markers that are special tokens."""

    def __init__(
        self, calls: CallGrammar | None, forced: bool, thoughts: ReasoningFormat | None, special: Mapping[str, int]
    ) -> None:
        self._calls = calls
        self._forced = forced
        self._thoughts = thoughts
        self._special = special

    def applied(self, params: SamplingParams, prompt: str) -> SamplingParams:
        """``params`` with the constraint that the answer to ``prompt`` has.

        What the client asked of the answer holds for the answer: not for thinking before it, nor for calls instead of
        it. A JSON schema is dropped where calls are forced, which leaves no answer to format. Raises `InvalidRequest`
        for what does not go together.
        """
        asked = params.constraint
        if self._calls is not None and asked is not None and asked.kind != "json_schema":
            raise InvalidRequest(asked.kind, "cannot be combined with these tools and tool_choice")
        if self._forced:
            asked = None
        thought = self._thought(prompt)
        if self._calls is None and (asked is None or not thought or asked.kind not in ("json_schema", "choices")):
            return params
        rules = self._rules(asked)
        start = "start: body" if not thought else f"start: {thought[0]} body"
        grammar = "\n".join([start, *rules, *thought[1:], ""])
        return msgspec.structs.replace(params.without_constraint(), ebnf=grammar)

    def _rules(self, asked: Constraint | None) -> list[str]:
        if self._calls is None:
            return [f"body: {_answer(asked)}"]
        if self._forced:
            return ["body: calls", self._call_rule("")]
        trigger = self._calls.triggers[0]
        begun = f"<[{self._special[trigger]}]>" if trigger in self._special else json.dumps(trigger)
        if asked is not None:
            # No text before a call: the lexer takes the longest match, and text that may be anything swallows answers.
            if self._calls.at_start:
                return ["body: answer | calls", self._call_rule("", beside_json=True), f"answer: {_answer(asked)}"]
            return [f"body: answer | {begun} calls", self._call_rule(trigger), f"answer: {_answer(asked)}"]
        # An answer is what does not begin a call.
        triggers = "|".join(re.escape(trigger).replace("/", r"\/") for trigger in self._calls.triggers)
        if self._calls.at_start:
            plain = f"PLAIN: {_ANY} & ~/[ \\t\\r\\n]*({triggers})(?s:.*)/"
            return ["body: PLAIN | calls", self._call_rule(""), plain]
        if trigger in self._special:  # no text is ever equal to it
            return [f"body: PLAIN | PLAIN {begun} calls", self._call_rule(trigger), f"PLAIN: {_ANY}"]
        return [
            "body: PLAIN | before calls",
            self._call_rule(trigger),
            f"before[suffix={begun}]: {_ANY}",
            f"PLAIN: {_ANY} & ~/(?s:.*)({triggers})(?s:.*)/",
        ]

    def _call_rule(self, after: str, *, beside_json: bool = False) -> str:
        if self._calls is None:
            raise RuntimeError("there are no calls")
        lark = self._calls.lark(self._special, after=after, beside_json=beside_json)
        return "calls: " + lark.removeprefix("start: ").rstrip("\n")

    def _thought(self, prompt: str) -> list[str]:
        """The word for it in ``start``, and its rules; none where thinking is over or unknown."""
        format = self._thoughts
        if format is None or prompt.rstrip().endswith(format.end):
            return []
        if format.end in self._special:
            inner = [f"inner: THOUGHT <[{self._special[format.end]}]> GAP", f"THOUGHT: {_ANY}"]
        else:
            inner = ["inner: thought_text GAP", f"thought_text[suffix={json.dumps(format.end)}]: {_ANY}"]
        inner.append("GAP: /\\n{0,2}/")
        if prompt.rstrip().endswith(format.begin):
            return ["inner", *inner]
        begin = f"<[{self._special[format.begin]}]>" if format.begin in self._special else json.dumps(format.begin)
        return ["thought?", f"thought: {begin} inner", *inner]


def calls_for(format: str, tools: Sequence[OfferedTool], *, enforced: bool, parallel: bool) -> CallGrammar | None:
    """``enforced``: calls of these tools only, whose arguments follow their schemas. Otherwise any tool may be called
    and only the arguments of strict tools are constrained; None if there are none."""
    if not tools or not (enforced or any(offered.tool.strict for offered in tools)):
        return None
    return call_grammar(format, prepared(tools), parallel=parallel, only_strict=not enforced)


def _answer(asked: Constraint | None) -> str:
    if asked is None:
        raise RuntimeError("nothing was asked of the answer")
    if asked.kind == "choices":
        return " | ".join(json.dumps(choice, ensure_ascii=False) for choice in json.loads(asked.text))
    return f"%json {json.dumps(schema.parse(asked.text))}"
