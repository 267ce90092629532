"""Tool calls and reasoning in a model's text: formats as data, one streaming parser, and grammars that constrain calls.

Nothing here depends on HTTP, tokens or a grammar engine.
"""

from .definitions import Tool, ToolLimits, validate_tools
from .detect import Detected, detect, ends_in_reasoning
from .events import (
    ArgumentsDelta,
    Call,
    CallEnd,
    CallStart,
    ContentDelta,
    Event,
    Markup,
    Parsed,
    ReasoningDelta,
    assemble,
)
from .format_types import ReasoningFormat, ToolFormat
from .formats import TOOL_FORMATS, check_together, markers, tool_format
from .grammar import CallGrammar, CallTag, call_grammar
from .parser import StreamParser, parse
from .reasoning_formats import REASONING_FORMATS, reasoning_format

__all__ = [
    "REASONING_FORMATS",
    "TOOL_FORMATS",
    "ArgumentsDelta",
    "Call",
    "CallEnd",
    "CallGrammar",
    "CallStart",
    "CallTag",
    "ContentDelta",
    "Detected",
    "Event",
    "Markup",
    "Parsed",
    "ReasoningDelta",
    "ReasoningFormat",
    "StreamParser",
    "Tool",
    "ToolFormat",
    "ToolLimits",
    "assemble",
    "call_grammar",
    "check_together",
    "detect",
    "ends_in_reasoning",
    "markers",
    "parse",
    "reasoning_format",
    "tool_format",
    "validate_tools",
]
