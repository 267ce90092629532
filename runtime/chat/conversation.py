"""A conversation in one typed form, whichever API it came through.

Each dialect (OpenAI's chat and responses, Anthropic's messages, `Engine.chat`) builds these values directly from its
request; `messages` turns them into what a chat template reads. ``path`` is the position of a value in the client's own
request (``messages[2].content[0]``, ``input[5]``), so that errors name fields the client sent.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, TypeAlias

import msgspec

from .tools.definitions import Tool

Role = Literal["system", "developer", "user", "assistant", "tool"]

MAX_PARTS = 4096  # of one message
MAX_PIECES = 16_384  # of one conversation: parts of its messages, and calls in them


class Breakpoint(msgspec.Struct, frozen=True):
    """Keep the prompt cached up to the end of the part that has this.

    ``ttl``: seconds, or a number with a unit (``"5m"``); None: the request's default.
    """

    ttl: str | float | None = None


class TextPart(msgspec.Struct):
    text: str
    path: str = ""
    breakpoint: Breakpoint | None = None


class ThinkingPart(msgspec.Struct):
    text: str


class CallPart(msgspec.Struct):
    """A tool call of the assistant. ``arguments``: a JSON object, as text or decoded."""

    name: str
    arguments: str | dict[str, Any]
    id: str | None = None
    path: str = ""  # of the object that has ``arguments``
    breakpoint: Breakpoint | None = None


Part: TypeAlias = TextPart | ThinkingPart | CallPart


class ChatTurn(msgspec.Struct):
    """The message of one role. A tool's result is a turn of role ``tool`` with the ``call_id`` that it answers."""

    role: Role
    parts: list[Part]
    path: str = ""
    name: str | None = None
    call_id: str | None = None

    @property
    def texts(self) -> list[str]:
        return [part.text for part in self.parts if isinstance(part, TextPart)]

    @property
    def calls(self) -> list[CallPart]:
        return [part for part in self.parts if isinstance(part, CallPart)]

    @property
    def thinking(self) -> str:
        return "\n".join(part.text for part in self.parts if isinstance(part, ThinkingPart))


class OfferedTool(msgspec.Struct, frozen=True):
    """A tool of the request. ``definition``: its form in the chat template.

    ``name``, ``namespace`` and ``custom`` are how the client defined it: a tool of a namespace, or a custom tool, whose
    input is plain text. ``tool`` is the function that the model sees.
    """

    tool: Tool
    definition: dict[str, Any]
    schema_path: str = ""
    breakpoint: Breakpoint | None = None
    custom: bool = False
    name: str = ""
    namespace: str | None = None


class Conversation(msgspec.Struct, kw_only=True):
    """Turns, tools, and further inputs of the chat template.

    ``chat_template_kwargs``: further variables of the template. ``add_generation_prompt=None``: the prompt ends with
    the opening of the assistant's next turn, unless ``continue_final_message``, which ends it inside the last turn.
    ``parse_special``: text that spells a special token becomes one; otherwise it stays text (`special_text`).
    """

    turns: list[ChatTurn]
    tools: Sequence[OfferedTool] = ()
    left_out: Sequence[str] = ()  # tools of the request that cannot be offered: path and type
    chat_template_kwargs: Mapping[str, Any] | None = None
    documents: list[Any] | None = None
    reasoning_effort: str | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool = False
    parse_special: bool = False
