"""The supported architectures: the table that config.json is looked up in."""

from __future__ import annotations

from .architecture import Architecture
from .dense import DENSE
from .mixtures import MIXTURES

ARCHITECTURES: dict[str, Architecture] = DENSE | MIXTURES
# Spellings of published checkpoints that transformers' classes do not have.
ALIASES = {
    "PhiMoEForCausalLM": "PhimoeForCausalLM",
    "Ernie4_5_ForCausalLM": "Ernie4_5ForCausalLM",
    "LLaMAForCausalLM": "LlamaForCausalLM",
}
MODEL_TYPES = {known.model_type: name for name, known in ARCHITECTURES.items()}


def listing() -> str:
    """The supported architectures by kind, a line each, without the ``ForCausalLM`` of their names."""
    kinds: dict[str, list[str]] = {"Dense": [], "Mixtures of experts": [], "Text of multimodal models": []}
    for name, known in ARCHITECTURES.items():
        kind = "Text of multimodal models" if known.text_config else "Mixtures of experts" if known.experts else "Dense"
        kinds[kind].append(name.removesuffix("ForCausalLM"))
    return "\n".join(f"- {kind}: {', '.join(sorted(names))}" for kind, names in kinds.items())
