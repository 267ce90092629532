"""Which formats a checkpoint writes, read off its chat template and special tokens."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from .formats import REASONING_FORMATS, ReasoningFormat, reasoning_format


class Detected(NamedTuple):
    """Names of formats; None where there is no sign of any."""

    tools: str | None
    reasoning: str | None


def detect(template_text: str, special_tokens: Iterable[str] = ()) -> Detected:
    """A guess: what the template writes for past calls is what the model was taught. Flags can say otherwise."""
    specials = frozenset(special_tokens)
    return Detected(_tools(template_text, specials), _reasoning(template_text, specials))


def _tools(template: str, specials: frozenset[str]) -> str | None:
    def has(marker: str) -> bool:
        return marker in template or marker in specials

    # A special token says something of its own only where it stands for tools and the template has tools: tokenizers
    # are shared by checkpoints that call tools and those that do not.
    if "[TOOL_CALLS]" in template or ("[TOOL_CALLS]" in specials and not template):
        return "mistral_named" if has("[ARGS]") else "mistral"
    if "<function=" in template and "<parameter=" in template:
        return "qwen3_coder"
    if "<tool_call>" in template:
        return "hermes"
    if "tools" in template or "tool_calls" in template:
        if "func_name1(" in template:  # the instruction Llama's pythonic templates give
            return "pythonic"
        if '"parameters": ' in template and (has("<|python_tag|>") or has("<|python_start|>")):
            return "llama3_json"
    return None


def _reasoning(template: str, specials: frozenset[str]) -> str | None:
    for format in REASONING_FORMATS.values():
        if format.end in template or (format.begin in specials and format.end in specials):
            return format.name
    return None


def ends_in_reasoning(prompt: str, reasoning: ReasoningFormat | str | None) -> bool:
    """Whether a rendered prompt leaves reasoning open, so the model's output begins inside it."""
    if reasoning is None:
        return False
    format = reasoning_format(reasoning) if isinstance(reasoning, str) else reasoning
    return prompt.rstrip().endswith(format.begin)
