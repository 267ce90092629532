"""The two parts of a causal language model of transformers: from tokens to hidden states, and from those to logits."""

from __future__ import annotations

import copy
from typing import Any

from torch import Tensor, nn


def decoder_of(model: Any) -> Any:
    """The module from tokens to hidden states."""
    from transformers import PreTrainedModel

    decoder = model.get_decoder()
    return decoder if isinstance(decoder, PreTrainedModel) else model.base_model


def output_head(model: Any, decoder: nn.Module) -> Any:
    """``model`` with another decoder and the same output layer: what is left is the model's own way to logits."""
    path = next(name for name, module in model.named_modules() if module is decoder)
    *parents, last = path.split(".")
    head = part = _shallow(model)
    for name in parents:
        part._modules[name] = _shallow(part._modules[name])
        part = part._modules[name]
    part._modules[last] = _GivenStates()
    return head


def _shallow(module: Any) -> Any:
    """The same module, with a table of submodules of its own."""
    made = copy.copy(module)
    made.__dict__["_modules"] = dict(module._modules)
    return made


class _GivenStates(nn.Module):
    """Stands in for a decoder: its hidden states are what it is given."""

    def forward(self, *_: Any, inputs_embeds: Tensor, **__: Any) -> _States:
        return _States(inputs_embeds)


class _States:
    """A decoder's output that has hidden states and nothing else."""

    def __init__(self, last_hidden_state: Tensor) -> None:
        self.last_hidden_state = last_hidden_state

    def __getattr__(self, name: str) -> None:
        if name.startswith("__"):
            raise AttributeError(name)

    def __getitem__(self, index: int) -> Tensor | None:
        return None if index else self.last_hidden_state
