"""What describes a format of tool calls or reasoning; `formats` has all of them as data."""

from __future__ import annotations

from typing import Literal

import msgspec

Payload = Literal["json", "named", "tags", "pythonic", "channels"]
Body = Literal["json", "tags", "keywords"]


class Tags(msgspec.Struct, frozen=True):
    """Tags around a function and its parameters: ``function`` NAME ``name_end``, then for each parameter
    ``parameter`` KEY ``key_end`` VALUE ``value_end``, then ``function_end``.

    ``padded``: a newline after ``key_end`` and one before ``value_end`` are no part of the value. ``pads``: checkpoints
    write these newlines. ``lines``: checkpoints write a newline after ``value_end``. ``declares``: the text between KEY
    and ``key_end`` for a value that is a string, and for one that is JSON.
    """

    function: str
    name_end: str
    parameter: str
    key_end: str
    value_end: str
    function_end: str
    padded: bool = True
    pads: bool = True
    lines: bool = True
    declares: tuple[str, ...] = ()


class Channels(msgspec.Struct, frozen=True):
    """An output of several messages, each with a header: ``start`` ROLE ``channel`` NAME ``message`` TEXT and one of
    ``ends``. The prompt ends behind the first ROLE. A header with ``recipient`` and a name behind it is of a call,
    whose arguments are the text; names may begin with ``namespace``. ``thinking``, ``calling`` and ``answering``: the
    channels of reasoning, of calls and of answers. ``role``: of the model. ``inside``: another marker of headers.
    """

    start: str
    channel: str
    message: str
    ends: tuple[str, ...]
    inside: str
    recipient: str
    namespace: str
    role: str
    thinking: str
    calling: str
    answering: str


class Written(msgspec.Struct, frozen=True):
    """How a checkpoint's template writes calls: ``prefix``, calls with ``separator`` between them, ``suffix``.

    A call is ``begin``, with NAME for the tool's name and NUL for a number, its arguments as ``body`` says, and
    ``end``. ``trigger``: the text that begins a call; "" if calls begin the answer, without a marker.
    """

    begin: str
    end: str
    prefix: str = ""
    separator: str = ""
    suffix: str = ""
    body: Body = "json"
    trigger: str = ""


class ToolFormat(msgspec.Struct, frozen=True):
    """How calls are read and written.

    ``begin``: markers before a call (or a list of them). ``end``: markers that may follow. ``before`` and ``after``:
    strings that may stand between these and the payload. ``payloads``, told apart by the first character:

    - ``json``: ``{"name": ..., "arguments": ...}``, or a list of these; the keys are ``names`` and ``arguments``.
      Without ``names``: ``{NAME: ARGUMENTS}``
    - ``named``: a name, then its arguments as an object, with strings of ``between`` in between. A name may have an id:
      after ``call_id``, or as ``functions.NAME:INDEX``. With ``quote``, keys are bare and strings stand in ``quote``
    - ``tags``: as `Tags` describes
    - ``pythonic``: ``[NAME(key=value, ...), ...]``; after a marker, calls may also stand without brackets
    - ``channels``: as `Channels` describes; the reasoning format then has the same channels

    ``bare``: the characters with which a payload may begin without a marker, where only whitespace came before (in the
    message, since the reasoning, since the last call) or, if ``anywhere``, after other text too. ``separator``: may
    come between calls that have no marker of their own.

    ``signs``: patterns that a chat template of this format contains, all of them. ``special_sign``: a pattern that the
    template or the special tokens contain.
    """

    name: str
    payloads: tuple[Payload, ...]
    written: Written
    begin: tuple[str, ...] = ()
    end: tuple[str, ...] = ()
    before: tuple[str, ...] = ()
    between: tuple[str, ...] = ()
    after: tuple[str, ...] = ()
    bare: str = ""
    anywhere: bool = False
    separator: str = ""
    names: tuple[str, ...] = ("name",)
    arguments: tuple[str, ...] = ("arguments", "parameters")
    tags: Tags | None = None
    channels: Channels | None = None
    call_id: str = ""
    quote: str = ""
    short_ids: bool = False  # ids of nine alphanumerics: the checkpoint's template refuses others
    signs: tuple[str, ...] = ()
    special_sign: str = ""


class ReasoningFormat(msgspec.Struct, frozen=True):
    """``begin``, the thinking, ``end``. One newline inside each marker and two after ``end`` belong to the markers.

    ``after``: what is written between ``end`` and a call or an answer. ``answer`` and ``answer_end``: markers around an
    answer; ``answers_alone``: also around one without thinking. ``sign``: a text that a chat template of this format
    contains beside ``end``.
    """

    name: str
    begin: str
    end: str
    after: str = ""
    answer: str = ""
    answer_end: str = ""
    answers_alone: bool = False
    sign: str = ""
    channels: Channels | None = None
