"""A conversation, its text in ChatML, and which characters of the text the model learns to write."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from typing import Any

# Marks around what is learned. They are removed before anything is tokenized.
LEARN, END = "\x02", "\x03"
START, STOP, TEXT_END = "<|im_start|>", "<|im_end|>", "<|endoftext|>"

_TOOLS_BEFORE = (
    "# Tools\n\nYou may call one or more functions to assist with the user query.\n\n"
    "You are provided with function signatures within <tools></tools> XML tags:\n<tools>"
)
_TOOLS_AFTER = (
    "\n</tools>\n\nFor each function call, return a json object with function name and arguments within "
    "<tool_call></tool_call> XML tags:\n<tool_call>\n"
    '{"name": <function-name>, "arguments": <args-json-object>}\n</tool_call>'
)


@dataclass(slots=True)
class Conversation:
    """Messages as the OpenAI API writes them; the last one is the assistant's and is what a test asks for.

    A message may hold ``quiet: True``: an assistant's turn that cannot be predicted, and so is not learned.
    ``plain`` is used instead of messages for text that is no chat; its last line is what a test asks for.
    ``expect``: what an answer must contain to count as right; empty: it must equal the reference.
    """

    family: str
    messages: list[dict[str, Any]] = field(default_factory=list)
    tools: list[dict[str, Any]] = field(default_factory=list)
    plain: str = ""
    expect: list[str] = field(default_factory=list)

    @property
    def prompt_messages(self) -> list[dict[str, Any]]:
        """All but the last, clean, for a chat template."""
        return [
            {k: clean(v) if isinstance(v, str) else v for k, v in message.items() if k != "quiet"}
            for message in self.messages[:-1]
        ]

    @property
    def reference(self) -> str:
        return clean(_assistant(self.messages[-1]))


def user(content: str) -> dict[str, Any]:
    return {"role": "user", "content": content}


def assistant(content: str, quiet: bool = False) -> dict[str, Any]:
    return {"role": "assistant", "content": content} | ({"quiet": True} if quiet else {})


def learn(text: str) -> str:
    return f"{LEARN}{text}{END}"


def clean(text: str) -> str:
    return text.replace(LEARN, "").replace(END, "")


def _assistant(message: dict[str, Any]) -> str:
    content = message.get("content") or ""
    for call in message.get("tool_calls", ()):
        function = call["function"]
        arguments = json.dumps(function["arguments"], ensure_ascii=False)
        content += "\n" if content else ""
        content += f'<tool_call>\n{{"name": "{function["name"]}", "arguments": {arguments}}}\n</tool_call>'
    return content


def render(conversation: Conversation) -> str:
    """The whole text, with marks. The same as the chat template's output, plus the end of the text."""
    if conversation.plain:
        return conversation.plain + learn(TEXT_END)
    messages, parts = conversation.messages, []
    system = messages[0]["content"] if messages[0]["role"] == "system" else ""
    if conversation.tools:
        lines = "".join("\n" + json.dumps(tool, ensure_ascii=False) for tool in conversation.tools)
        parts.append(
            f"{START}system\n{system}{chr(10) * 2 if system else ''}{_TOOLS_BEFORE}{lines}{_TOOLS_AFTER}{STOP}\n"
        )
    elif system:
        parts.append(f"{START}system\n{system}{STOP}\n")
    in_tools = False
    for message in messages:
        role = message["role"]
        if in_tools and role != "tool":
            parts.append(f"{STOP}\n")
        if role == "user":
            parts.append(f"{START}user\n{message['content']}{STOP}\n")
        elif role == "assistant":
            text = _assistant(message) + STOP
            parts.append(f"{START}assistant\n{text if message.get('quiet') else learn(text)}\n")
        elif role == "tool":
            parts.append("" if in_tools else f"{START}user")
            parts.append(f"\n<tool_response>\n{message['content']}\n</tool_response>")
        in_tools = role == "tool"
    return "".join(parts) + TEXT_END


_MARKS = re.compile(f"[{LEARN}{END}]")


def split_marks(marked: str) -> tuple[str, list[int]]:
    """The clean text and the character positions where learning turns on, off, on, ..."""
    pieces, edges, at, on = [], [], 0, False
    last = 0
    for match in _MARKS.finditer(marked):
        piece = marked[last : match.start()]
        pieces.append(piece)
        at += len(piece)
        last = match.end()
        turns_on = match.group() == LEARN
        if turns_on != on:
            edges.append(at)
            on = turns_on
    pieces.append(marked[last:])
    return "".join(pieces), edges
