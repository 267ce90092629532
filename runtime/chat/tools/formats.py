"""The ways models write tool calls and reasoning, as data. One engine reads them all (`parser.StreamParser`)."""

from __future__ import annotations

from typing import Literal

import msgspec

Payload = Literal["json", "named", "xml", "pythonic"]


class ToolFormat(msgspec.Struct, frozen=True):
    """How calls are written.

    ``begin``: markers before a call (or a list of them). ``end``: markers that may follow. ``payloads``: what may be
    between, told apart by the first character:

    - ``json``: ``{"name": ..., "arguments": ...}``, or a list of these; the keys are ``names`` and ``arguments``
    - ``named``: ``NAME[ARGS]{...}``, with ``[CALL_ID]ID`` before ``[ARGS]`` or not, or no ``[ARGS]`` at all
    - ``xml``: ``<function=NAME><parameter=KEY>VALUE</parameter>...</function>``
    - ``pythonic``: ``[NAME(key=value, ...), ...]``

    ``bare``: where only whitespace came before (in the message, since the reasoning, since the last call) the payload
    may stand without a marker. ``separator``: may stand between calls that have no marker of their own.
    """

    name: str
    payloads: tuple[Payload, ...]
    begin: tuple[str, ...] = ()
    end: tuple[str, ...] = ()
    bare: bool = False
    separator: str = ""
    names: tuple[str, ...] = ("name",)
    arguments: tuple[str, ...] = ("arguments", "parameters")
    short_ids: bool = False  # ids of nine alphanumerics: the checkpoint's template refuses others


class ReasoningFormat(msgspec.Struct, frozen=True):
    """``begin``, the thinking, ``end``. One newline inside each marker and two after ``end`` belong to the markers."""

    name: str
    begin: str
    end: str


FUNCTION = "<function="
MISTRAL_CALLS = "[TOOL_CALLS]"

_MISTRAL = ToolFormat("mistral", ("json", "named"), begin=(MISTRAL_CALLS,), short_ids=True)

TOOL_FORMATS = {
    format.name: format
    for format in (
        ToolFormat("hermes", ("json",), begin=("<tool_call>",), end=("</tool_call>",)),
        ToolFormat(
            "llama3_json",
            ("json",),
            begin=("<|python_tag|>", "<|python_start|>"),
            end=("<|python_end|>",),
            bare=True,
            separator=";",
        ),
        _MISTRAL,
        msgspec.structs.replace(_MISTRAL, name="mistral_named"),  # read alike, written differently: see grammar.py
        ToolFormat("qwen3_coder", ("xml",), begin=("<tool_call>", FUNCTION), end=("</tool_call>",)),
        ToolFormat("pythonic", ("pythonic",), begin=("<|python_start|>",), end=("<|python_end|>",), bare=True),
    )
}

REASONING_FORMATS = {
    format.name: format
    for format in (ReasoningFormat("think", "<think>", "</think>"), ReasoningFormat("mistral", "[THINK]", "[/THINK]"))
}

# The names other servers' flags give these formats.
_TOOL_ALIASES = {
    "qwen": "hermes",
    "qwen25": "hermes",
    "qwen3": "hermes",
    "llama3": "llama3_json",
    "llama4_json": "llama3_json",
    "llama4": "pythonic",
    "llama4_pythonic": "pythonic",
    "qwen3_xml": "qwen3_coder",
}
_REASONING_ALIASES = {"qwen3": "think", "deepseek_r1": "think", "deepseek-r1": "think"}


def tool_format(name: str) -> ToolFormat:
    """Raises ValueError naming the formats there are."""
    try:
        return TOOL_FORMATS[_TOOL_ALIASES.get(name, name)]
    except KeyError:
        raise ValueError(f"unknown tool-call format {name!r}; there are {', '.join(TOOL_FORMATS)}") from None


def reasoning_format(name: str) -> ReasoningFormat:
    """Raises ValueError naming the formats there are."""
    try:
        return REASONING_FORMATS[_REASONING_ALIASES.get(name, name)]
    except KeyError:
        raise ValueError(f"unknown reasoning format {name!r}; there are {', '.join(REASONING_FORMATS)}") from None


def markers(tools: ToolFormat | None, reasoning: ReasoningFormat | None) -> frozenset[str]:
    """Every marker the formats know. Where one is a special token, the text to parse must still have it."""
    found: set[str] = set()
    if tools is not None:
        found.update(tools.begin, tools.end, ("[ARGS]", "[CALL_ID]") if "named" in tools.payloads else ())
    if reasoning is not None:
        found.update((reasoning.begin, reasoning.end))
    return frozenset(found)
