"""The formats in which models write reasoning, as data. `parser.StreamParser` reads all of them."""

from __future__ import annotations

from .format_types import Channels, ReasoningFormat

HARMONY = Channels(
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

REASONING_FORMATS = {
    format.name: format
    for format in (
        ReasoningFormat(
            "granite",
            "<think>",
            "</think>",
            answer="<response>",
            answer_end="</response>",
            sign="<response></response>",
        ),
        ReasoningFormat("hunyuan", "<think>", "</think>", answer="<answer>", answer_end="</answer>", sign="<answer>"),
        ReasoningFormat("think", "<think>", "</think>"),
        ReasoningFormat("mistral", "[THINK]", "[/THINK]"),
        ReasoningFormat("seed_oss", "<seed:think>", "</seed:think>"),
        ReasoningFormat("gemma4", "<|channel>thought", "<channel|>"),
        ReasoningFormat("apertus", "<|inner_prefix|>", "<|inner_suffix|>"),
        ReasoningFormat(
            "apriel", "Here are my reasoning steps:", "[BEGIN FINAL RESPONSE]", answer_end="[END FINAL RESPONSE]"
        ),
        *(
            ReasoningFormat(
                name,
                "<|START_THINKING|>",
                "<|END_THINKING|>",
                answer=f"<|START_{answer}|>",
                answer_end=f"<|END_{answer}|>",
                answers_alone=True,
                sign=f"<|START_{answer}|>",
            )
            for name, answer in (("cohere_command3", "RESPONSE"), ("cohere_command4", "TEXT"))
        ),
        ReasoningFormat(
            "harmony",
            "<|channel|>analysis<|message|>",
            "<|end|>",
            after="<|start|>assistant",
            answer="<|channel|>final<|message|>",
            sign="<|channel|>analysis<|message|>",
            channels=HARMONY,
        ),
    )
}

# The names other servers' flags give these formats.
_THINK = ("qwen3", "deepseek_r1", "deepseek-r1", "deepseek_v3", "glm45", "minimax_m1", "minimax_m2", "kimi_k2")
_ALIASES = {
    **dict.fromkeys(_THINK, "think"),
    **dict.fromkeys(("openai_gptoss", "gpt-oss", "gpt_oss"), "harmony"),
    "hunyuan_a13b": "hunyuan",
    "ernie45": "granite",
}


def reasoning_format(name: str) -> ReasoningFormat:
    """Raises ValueError naming the formats there are."""
    try:
        return REASONING_FORMATS[_ALIASES.get(name, name)]
    except KeyError:
        raise ValueError(f"unknown reasoning format {name!r}; there are {', '.join(REASONING_FORMATS)}") from None
