"""The grammar of an output of several messages, each with a channel: `format_types.Channels`, OpenAI's harmony."""

from __future__ import annotations

import json
from collections.abc import Mapping

from .format_types import Channels
from .grammar import ANY, CallGrammar, literals, text_without


def message_rules(
    calls: CallGrammar, form: Channels, special_tokens: Mapping[str, int], *, answer: bool = False
) -> list[str]:
    """Lark rules for ``body``: any number of messages, of which the last one may be a call.

    The arguments of a call follow its tool's schema. Its recipient stands behind the channel, or before it where the
    checkpoint's template writes it.

    ``special_tokens``: see `CallGrammar.lark`. ``answer``: the last message is a call or rule ``answer``, which has the
    header of its message.
    """

    def text(written: str) -> str:
        return literals(written, special_tokens)

    channel, end = text(form.channel), form.ends[0]
    if end in special_tokens:
        ended = [f"ended: TEXT <[{special_tokens[end]}]>", f"TEXT: {ANY}"]
    else:  # one lexeme, so that the lexer takes the shortest match
        ended = [f"ended[suffix={json.dumps(end)}]: {ANY}"]
        ended.append(f"TEXT: {text_without((form.start, *form.ends))}")
    names = [form.thinking, form.calling, *([] if answer else [form.answering])]
    rules = [
        f"body: message* ({'answer' if answer else 'header TEXT'} | call)",
        f"message: header ended {text(form.start + form.role)}",
        f"header: {channel} ({' | '.join(map(json.dumps, names))}) {text(form.message)}",
        *ended,
        f"call: {' | '.join(f'call_{i}' for i in range(len(calls.tags)))}",
        f'kind: "" | "json" | " json" | {text(form.inside + "json")} | {text(f" {form.inside}json")}',
    ]
    for i, tag in enumerate(calls.tags):
        name = f"{form.recipient}{form.namespace}{tag.name}"
        behind = f"{channel} {json.dumps(f'{form.calling} {name}')}"
        before = f"{json.dumps(f' {name}')} {channel} {json.dumps(form.calling)}"
        rules.append(f"call_{i}: ({behind} | {before}) kind {text(form.message)} args_{i}")
        rules.append(f"args_{i}: %json {json.dumps(tag.schema)}")
    return rules
