"""The formats in which models write tool calls and reasoning, as data. `parser.StreamParser` reads all of them.

To add a format, add an entry to `TOOL_FORMATS`: its markers, its kind of payload, the signs of it in a chat template,
and how its calls are written (for `grammar.call_grammar`).
"""

from __future__ import annotations

from typing import Literal

import msgspec

Payload = Literal["json", "named", "tags", "pythonic", "channels"]
Body = Literal["json", "tags", "keywords"]


class Tags(msgspec.Struct, frozen=True):
    """Tags around a function and its parameters: ``function`` NAME ``name_end``, then for each parameter
    ``parameter`` KEY ``key_end`` VALUE ``value_end``, then ``function_end``.

    ``padded``: one newline inside each end of a value belongs to the tags. ``pads``: checkpoints write it.
    """

    function: str
    name_end: str
    parameter: str
    key_end: str
    value_end: str
    function_end: str
    padded: bool = True
    pads: bool = True


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

    - ``json``: ``{"name": ..., "arguments": ...}``, or a list of these; the keys are ``names`` and ``arguments``
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

    ``after``: what is written between ``end`` and a call or an answer; ``answer``: before an answer. ``sign``: a text
    that a chat template of this format contains; "": ``end``.
    """

    name: str
    begin: str
    end: str
    after: str = ""
    answer: str = ""
    sign: str = ""
    channels: Channels | None = None


_QWEN_TAGS = Tags("<function=", ">", "<parameter=", ">", "</parameter>", "</function>")
_INVOKE_TAGS = Tags('<invoke name="', '">', '<parameter name="', '">', "</parameter>", "</invoke>", pads=False)
_GLM_TAGS = Tags("", "", "<arg_key>", "</arg_key>\n<arg_value>", "</arg_value>", "", padded=False)

_HARMONY = Channels(
    start="<|start|>",
    channel="<|channel|>",
    message="<|message|>",
    ends=("<|end|>", "<|call|>", "<|return|>"),
    inside="<|constrain|>",
    recipient="to=",
    namespace="functions.",
    role="assistant",
    thinking="analysis",
    calling="commentary",
    answering="final",
)

_ENVELOPE = '{"name": "NAME", "arguments": '
_FUNCTIONGEMMA = ToolFormat(
    "functiongemma",
    ("named",),
    Written(
        "<start_function_call>call:NAME{", "}<end_function_call>", body="keywords", trigger="<start_function_call>"
    ),
    begin=("<start_function_call>",),
    end=("<end_function_call>",),
    before=("call:",),
    quote="<escape>",
    signs=("<start_function_call>",),
)
_MISTRAL = ToolFormat(
    "mistral",
    ("json", "named"),
    Written(_ENVELOPE, "}", "[TOOL_CALLS] [", ", ", "]", trigger="[TOOL_CALLS]"),
    begin=("[TOOL_CALLS]",),
    between=("[ARGS]",),
    call_id="[CALL_ID]",
    short_ids=True,
    signs=(r"\[TOOL_CALLS\]",),
)
_DEEPSEEK = ToolFormat(
    "deepseek_v31",
    ("named",),
    Written(
        "<｜tool▁call▁begin｜>NAME<｜tool▁sep｜>",
        "<｜tool▁call▁end｜>",
        "<｜tool▁calls▁begin｜>",
        "",
        "<｜tool▁calls▁end｜>",
        trigger="<｜tool▁calls▁begin｜>",
    ),
    begin=("<｜tool▁calls▁begin｜>", "<｜tool▁call▁begin｜>"),
    end=("<｜tool▁call▁end｜>", "<｜tool▁calls▁end｜>"),
    before=("<｜tool▁call▁begin｜>", "function<｜tool▁sep｜>"),
    between=("<｜tool▁sep｜>", "```json"),
    after=("```",),
    signs=("<｜tool▁calls▁begin｜>",),
)
_QWEN_CODER = ToolFormat(
    "qwen3_coder",
    ("tags",),
    Written(
        "<tool_call>\n<function=NAME>\n",
        "</function>\n</tool_call>",
        separator="\n",
        body="tags",
        trigger="<tool_call>",
    ),
    begin=("<tool_call>", _QWEN_TAGS.function),
    end=("</tool_call>",),
    tags=_QWEN_TAGS,
    signs=("<tool_call>", "<function=", "<parameter="),
)


def _tagged_json(name: str, begin: str, end: str, *signs: str) -> ToolFormat:
    """A JSON list of calls between two markers."""
    written = Written(_ENVELOPE, "}", f"{begin}[", ", ", f"]{end}", trigger=begin)
    return ToolFormat(name, ("json",), written, begin=(begin,), end=(end,), signs=signs)


# Detection takes the first format whose signs a template has, so formats with more telling signs come first.
TOOL_FORMATS = {
    format.name: format
    for format in (
        ToolFormat(
            "harmony",
            ("channels",),
            Written(
                "<|channel|>commentary to=functions.NAME <|constrain|>json<|message|>",
                "",  # a call's end token ends the output
                separator="<|call|><|start|>assistant",
                trigger="<|channel|>commentary to=",
            ),
            channels=_HARMONY,
            signs=(r"<\|channel\|>commentary", r"<\|call\|>"),
        ),
        msgspec.structs.replace(
            _MISTRAL,
            name="mistral_named",  # read alike, written differently
            written=Written("[TOOL_CALLS]NAME[ARGS]", "", trigger="[TOOL_CALLS]"),
            special_sign=r"\[ARGS\]",
        ),
        _MISTRAL,
        msgspec.structs.replace(
            _DEEPSEEK,
            name="deepseek_v3",
            written=msgspec.structs.replace(
                _DEEPSEEK.written,
                begin="<｜tool▁call▁begin｜>function<｜tool▁sep｜>NAME\n```json\n",
                end="\n```<｜tool▁call▁end｜>",
                separator="\n",
            ),
            signs=("<｜tool▁calls▁begin｜>", "```json"),
        ),
        _DEEPSEEK,
        ToolFormat(
            "kimi_k2",
            ("named",),
            Written(
                "<|tool_call_begin|>functions.NAME:\0<|tool_call_argument_begin|>",
                "<|tool_call_end|>",
                "<|tool_calls_section_begin|>",
                "",
                "<|tool_calls_section_end|>",
                trigger="<|tool_calls_section_begin|>",
            ),
            begin=("<|tool_calls_section_begin|>", "<|tool_call_begin|>"),
            end=("<|tool_call_end|>", "<|tool_calls_section_end|>"),
            before=("<|tool_call_begin|>",),
            between=("<|tool_call_argument_begin|>",),
            signs=(r"<\|tool_call_argument_begin\|>",),
        ),
        _FUNCTIONGEMMA,
        msgspec.structs.replace(
            _FUNCTIONGEMMA,
            name="gemma4",
            written=Written("<|tool_call>call:NAME{", "}<tool_call|>", body="keywords", trigger="<|tool_call>"),
            begin=("<|tool_call>",),
            end=("<tool_call|>",),
            quote='<|"|>',
            signs=(r"<\|tool_call>call:",),
        ),
        ToolFormat(
            "glm45",
            ("tags",),
            Written("<tool_call>NAME\n", "</tool_call>", separator="\n", body="tags", trigger="<tool_call>"),
            begin=("<tool_call>",),
            end=("</tool_call>",),
            tags=_GLM_TAGS,
            signs=("<tool_call>", "<arg_key>", "<arg_value>"),
        ),
        ToolFormat(
            "minimax_m2",
            ("tags",),
            Written(
                '<invoke name="NAME">\n',
                "</invoke>\n",
                "<minimax:tool_call>\n",
                "",
                "</minimax:tool_call>",
                body="tags",
                trigger="<minimax:tool_call>",
            ),
            begin=("<minimax:tool_call>", _INVOKE_TAGS.function),
            end=("</minimax:tool_call>",),
            tags=_INVOKE_TAGS,
            signs=("<minimax:tool_call>", "<invoke name="),
        ),
        msgspec.structs.replace(
            _QWEN_CODER,
            name="seed_oss",
            written=Written(
                "<seed:tool_call>\n<function=NAME>\n",
                "</function>\n</seed:tool_call>",
                separator="\n",
                body="tags",
                trigger="<seed:tool_call>",
            ),
            begin=("<seed:tool_call>", _QWEN_TAGS.function),
            end=("</seed:tool_call>",),
            signs=("<seed:tool_call>", "<function=", "<parameter="),
        ),
        _QWEN_CODER,
        _tagged_json("nemotron", "<TOOLCALL>", "</TOOLCALL>", "<TOOLCALL>"),
        ToolFormat(
            "minimax_m1",
            ("json",),
            Written(_ENVELOPE, "}", "<tool_calls>\n", "\n", "\n</tool_calls>", trigger="<tool_calls>"),
            begin=("<tool_calls>",),
            end=("</tool_calls>",),
            signs=(r"<tool_calls>[^<\[]{0,20}\{",),
        ),
        _tagged_json("apriel", "<tool_calls>", "</tool_calls>", r"<tool_calls>[^<]{0,40}\["),
        ToolFormat(
            "hermes",
            ("json",),
            Written(f"<tool_call>\n{_ENVELOPE}", "}\n</tool_call>", separator="\n", trigger="<tool_call>"),
            begin=("<tool_call>",),
            end=("</tool_call>",),
            signs=(r"""<tool_call>[^<]{0,60}\{[^<\w]{0,20}["'](name|arguments)\\?["']""",),
        ),
        ToolFormat(
            "xlam",
            ("json",),
            Written(_ENVELOPE, "}", "[", ", ", "]"),
            begin=("<tool_call>",),
            end=("</tool_call>",),
            bare="[{",
            anywhere=True,
            signs=("calls in a single JSON array",),
        ),
        ToolFormat(
            "gemma3",
            ("pythonic",),
            Written("NAME(", ")", "```tool_code\n[", ", ", "]\n```", body="keywords", trigger="```tool_code"),
            begin=("```tool_code",),
            end=("```",),
            bare="[",
            signs=("```tool_code",),
        ),
        ToolFormat(
            "pythonic",
            ("pythonic",),
            Written("NAME(", ")", "[", ", ", "]", body="keywords"),
            begin=("<|python_start|>",),
            end=("<|python_end|>",),
            bare="[",
            signs=("tools|tool_calls", r"func_name1\("),  # the instruction Llama's pythonic templates give
        ),
        ToolFormat(
            "llama3_json",
            ("json", "pythonic"),
            Written('{"name": "NAME", "parameters": ', "}", separator="; "),
            begin=("<|python_tag|>", "<|python_start|>"),
            end=("<|python_end|>",),
            bare="{[",
            anywhere=True,
            separator=";",
            signs=("tools|tool_calls", '"parameters": '),
            special_sign=r"<\|python_(tag|start)\|>",
        ),
    )
}

REASONING_FORMATS = {
    format.name: format
    for format in (
        ReasoningFormat("think", "<think>", "</think>"),
        ReasoningFormat("mistral", "[THINK]", "[/THINK]"),
        ReasoningFormat("seed_oss", "<seed:think>", "</seed:think>"),
        ReasoningFormat(
            "harmony",
            "<|channel|>analysis<|message|>",
            "<|end|>",
            after="<|start|>assistant",
            answer="<|channel|>final<|message|>",
            sign="<|channel|>analysis<|message|>",
            channels=_HARMONY,
        ),
    )
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
    "gemma3_pythonic": "pythonic",
    "qwen3_xml": "qwen3_coder",
    "deepseekv3": "deepseek_v3",
    "deepseek_r1": "deepseek_v3",
    "deepseekv31": "deepseek_v31",
    "glm": "glm45",
    "glm47": "glm45",
    "minimax-m2": "minimax_m2",
    "hunyuan_a13b": "apriel",
    "minimax": "minimax_m1",
    "openai": "harmony",
    "gpt-oss": "harmony",
}
_THINK = ("qwen3", "deepseek_r1", "deepseek-r1", "deepseek_v3", "glm45", "minimax_m1", "minimax_m2", "kimi_k2")
_REASONING_ALIASES = dict.fromkeys(_THINK, "think") | dict.fromkeys(("openai_gptoss", "gpt-oss", "gpt_oss"), "harmony")


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
    """Every marker of the formats. Where one is a special token, the text to parse must still contain it."""
    found: set[str] = set()
    if tools is not None:
        found.update(tools.begin, tools.end, tools.before, tools.between, tools.after, (tools.call_id, tools.quote))
    if reasoning is not None:
        found.update((reasoning.begin, reasoning.end))
    for format in (tools, reasoning):
        if format is not None and format.channels is not None:
            form = format.channels
            found.update((form.start, form.channel, form.message, form.inside), form.ends)
    return frozenset(found - {""})
