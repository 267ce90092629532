"""Which architectures transformers computes with our attention, found by tracing each with its default config."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from ...errors import LoadError
from ..registry import ARCHITECTURES
from .config import build_of
from .library import TRACE, load_transformers
from .trace import trace


def survey() -> Iterator[tuple[str, str | None]]:
    """(architecture, why it is not served; None if it is), of every causal language model of the installed transformers
    that our decoder does not have. Takes about a minute. Raises `LoadError` without transformers.

    A default config may be one that its own model does not take: then the reason says so, and a checkpoint's may do.
    """
    load_transformers()
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    seen = set(ARCHITECTURES)
    for kind, names in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.items():
        name = names if isinstance(names, str) else names[0]
        if name in seen:
            continue
        seen.add(name)
        try:
            yield name, _problem(CONFIG_MAPPING[kind])
        except LoadError as error:
            yield name, str(error)


def _problem(config_class: type) -> str | None:
    try:
        config = config_class()
    except Exception as error:  # transformers' own checks
        return f"its default config is not valid: {type(error).__name__}"
    model = build_of(config, TRACE, torch.bfloat16, torch.device("meta"))
    trace(model)
    return None


def survey_listing() -> str:
    """The survey as lines of Markdown: those that are served, then those that are not by reason."""
    served: list[str] = []
    refused: dict[str, list[str]] = {}
    for name, problem in survey():
        short = name.removesuffix("ForCausalLM")
        if problem is None:
            served.append(short)
        else:
            refused.setdefault(problem.replace(name, "its class"), []).append(short)
    lines = [f"- Computed by transformers: {', '.join(sorted(served))}"]
    by_count = sorted(refused.items(), key=lambda item: (-len(item[1]), item[0]))
    return "\n".join([*lines, *(f"- Not served, {problem}: {', '.join(sorted(names))}" for problem, names in by_count)])
