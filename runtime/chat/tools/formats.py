"""The formats in which models write tool calls, as data. `parser.StreamParser` reads all of them.

To add a format, add an entry to `TOOL_FORMATS`: its markers, its kind of payload, the signs of it in a chat template,
and how its calls are written (for `grammar.call_grammar`).
"""

from __future__ import annotations

import msgspec

from .format_types import ReasoningFormat, Tags, ToolFormat, Written
from .reasoning_formats import HARMONY

_QWEN_TAGS = Tags("<function=", ">", "<parameter=", ">", "</parameter>", "</function>")
_INVOKE_TAGS = Tags('<invoke name="', '">', '<parameter name="', '">', "</parameter>", "</invoke>", pads=False)
_DSML_TAGS = Tags(
    '<｜DSML｜invoke name="',
    '">',
    '<｜DSML｜parameter name="',
    '">',
    "</｜DSML｜parameter>",
    "</｜DSML｜invoke>",
    padded=False,
    declares=('" string="true', '" string="false'),
)
_GLM_TAGS = Tags("", "", "<arg_key>", "</arg_key>\n<arg_value>", "</arg_value>", "", padded=False)

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
_GLM = ToolFormat(
    "glm45",
    ("tags",),
    Written("<tool_call>NAME\n", "</tool_call>", separator="\n", body="tags", trigger="<tool_call>"),
    begin=("<tool_call>",),
    end=("</tool_call>",),
    tags=_GLM_TAGS,
    signs=("<tool_call>", "<arg_key>", "<arg_value>"),
)


def _dsml(name: str, block: str) -> ToolFormat:
    """DeepSeek's markup language: the model writes of each value whether it is a string."""
    begin, end = f"<｜DSML｜{block}>", f"</｜DSML｜{block}>"
    invoke = '<｜DSML｜invoke name="NAME">\n', "</｜DSML｜invoke>\n"
    return ToolFormat(
        name,
        ("tags",),
        Written(*invoke, f"{begin}\n", "", end, body="tags", trigger=begin),
        begin=(begin, _DSML_TAGS.function),
        end=(end,),
        tags=_DSML_TAGS,
        signs=("｜DSML｜", f"{block}>"),
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
            channels=HARMONY,
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
        _dsml("deepseek_v32", "function_calls"),
        _dsml("deepseek_v4", "tool_calls"),
        ToolFormat(
            "cohere",  # Command R7B and later
            ("json",),
            Written(
                '    {"tool_call_id": "\0", "tool_name": "NAME", "parameters": ',
                "}",
                "<|START_ACTION|>[\n",
                ",\n",
                "\n]<|END_ACTION|>",
                trigger="<|START_ACTION|>",
            ),
            begin=("<|START_ACTION|>",),
            end=("<|END_ACTION|>",),
            names=("tool_name",),
            arguments=("parameters",),
            signs=(r"<\|START_ACTION\|>",),
        ),
        ToolFormat(
            "command_r",  # and R+
            ("json",),
            Written(
                '    {\n        "tool_name": "NAME",\n        "parameters": ',
                "\n    }",
                "Action:\n```json\n[\n",
                ",\n",
                "\n]\n```",
                trigger="Action:\n```json",
            ),
            begin=("Action:",),
            end=("```",),
            before=("```json",),
            names=("tool_name",),
            arguments=("parameters",),
            signs=("Action:", "```json", "tool_name"),
        ),
        ToolFormat(
            "apertus",
            ("json",),
            Written('{"NAME": ', "}", "<|tools_prefix|>[", ", ", "]<|tools_suffix|>", trigger="<|tools_prefix|>"),
            begin=("<|tools_prefix|>",),
            end=("<|tools_suffix|>",),
            names=(),
            arguments=(),
            signs=(r"<\|tools_prefix\|>",),
        ),
        ToolFormat(
            "lfm2",
            ("pythonic", "json"),
            Written(
                "NAME(",
                ")",
                "<|tool_call_start|>[",
                ", ",
                "]<|tool_call_end|>",
                body="keywords",
                trigger="<|tool_call_start|>",
            ),
            begin=("<|tool_call_start|>",),
            end=("<|tool_call_end|>",),
            signs=(r"List of tools: |<\|tool_list_start\|>",),
            special_sign=r"<\|tool_call_start\|>",
        ),
        ToolFormat(
            "granite",
            ("json",),
            Written(_ENVELOPE, "}", "<|tool_call|>[", ", ", "]", trigger="<|tool_call|>"),
            begin=("<|tool_call|>",),
            signs=(r"<\|tool_call\|>", "available_tools"),
        ),
        msgspec.structs.replace(
            _GLM,  # 4.7 and 5: without newlines
            name="glm47",
            written=Written("<tool_call>NAME", "</tool_call>", body="tags", trigger="<tool_call>"),
            tags=msgspec.structs.replace(_GLM_TAGS, key_end="</arg_key><arg_value>", lines=False),
            signs=(r"<tool_call>\{function-name\}<arg_key>", "<arg_value>"),
        ),
        _GLM,
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
    "minimax-m2": "minimax_m2",
    "hunyuan_a13b": "apriel",
    "minimax": "minimax_m1",
    "cohere_command3": "cohere",
    "cohere_command4": "cohere",
    "deepseekv32": "deepseek_v32",
    "deepseekv4": "deepseek_v4",
    "ernie45": "hermes",
    "openai": "harmony",
    "gpt-oss": "harmony",
}


def tool_format(name: str) -> ToolFormat:
    """Raises ValueError naming the formats there are."""
    try:
        return TOOL_FORMATS[_TOOL_ALIASES.get(name, name)]
    except KeyError:
        raise ValueError(f"unknown tool-call format {name!r}; there are {', '.join(TOOL_FORMATS)}") from None


def check_together(tools: ToolFormat | None, reasoning: ReasoningFormat | None) -> None:
    """Raises ValueError if one output cannot have calls and reasoning in these formats."""
    if tools is None or reasoning is None:
        return
    both = f"tool calls in the format {tools.name} and reasoning in the format {reasoning.name} cannot be read together"
    if tools.channels != reasoning.channels:
        raise ValueError(f"{both}: only one of them consists of messages with channels")
    for marker in (reasoning.begin, reasoning.end, reasoning.answer, reasoning.answer_end):
        for bare in tools.bare:
            if bare in marker:
                raise ValueError(f"{both}: {marker} contains {bare}, with which a call may begin")


def markers(tools: ToolFormat | None, reasoning: ReasoningFormat | None) -> frozenset[str]:
    """Every marker of the formats. Where one is a special token, the text to parse must still contain it."""
    found: set[str] = set()
    if tools is not None:
        found.update(tools.begin, tools.end, tools.before, tools.between, tools.after, (tools.call_id, tools.quote))
    if reasoning is not None:
        found.update((reasoning.begin, reasoning.end, reasoning.answer, reasoning.answer_end))
    for format in (tools, reasoning):
        if format is not None and format.channels is not None:
            form = format.channels
            found.update((form.start, form.channel, form.message, form.inside), form.ends)
    return frozenset(found - {""})
