"""What a model of transformers asks of attention, found by running it without weights on torch's meta device.

The model's own code is the source: how often a step attends, with which heads, scales, windows and caps. What our
attention does not compute is an error here, before any weight is read, instead of a wrong token.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ....kernels.attention.base import LayerSpec
from ...errors import LoadError
from .head import decoder_of, output_head
from .library import MaskFunction, attending

_TOKENS = 8  # of the traced step
_FAR = 1 << 17  # a position beyond which no window ends
_HANDLED = {"scaling", "sliding_window", "softcap", "s_aux"}
# Keyword arguments that do not change the result: queries and keys are rotated already, and nothing is dropped out.
_NEUTRAL = {"dropout", "position_ids", "use_cache", "cache_position", "output_attentions", "position_embeddings"}
_LAYER_TYPES = {"full_attention", "sliding_attention", "attention", "moe", "mlp"}


@dataclass(frozen=True, slots=True)
class Trace:
    """The attention of one step. Layers are calls of attention, in order: a layer that attends twice is two."""

    layers: tuple[LayerSpec, ...]  # without sinks
    sinks: tuple[str, ...]  # the parameter of each layer's sinks; "" for none
    num_heads: int
    num_kv_heads: int
    head_dim: int  # of queries and keys
    value_dim: int  # of values: at most ``head_dim``


@dataclass(slots=True)
class _Recorder:
    """Attends with nothing and remembers what it was asked for. ``names``: of parameters, by identity."""

    names: Mapping[int, str]
    sinks: list[str] = field(default_factory=list)
    layers: list[LayerSpec] = field(default_factory=list)
    shapes: list[tuple[int, int, int, int]] = field(default_factory=list)
    windows: dict[int, int | None] = field(default_factory=dict)  # of masks, by identity

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, mask: Any, arguments: Mapping[str, Any]) -> Tensor:
        for name, value in arguments.items():
            if value is not None and name not in _HANDLED | _NEUTRAL and (name, value) != ("is_causal", True):
                what = "attention sinks" if name == "s_aux" else f"{name!r}"
                raise LoadError(
                    f"its layers pass {what} to attention, which --model-impl transformers does not compute"
                )
        sinks = arguments.get("s_aux")
        if sinks is not None and id(sinks) not in self.names:
            raise LoadError("its attention sinks are computed, not a parameter")
        if sinks is not None and len(sinks) != q.shape[1]:
            raise LoadError(f"it has {len(sinks)} attention sinks for {q.shape[1]} heads")
        self.sinks.append("" if sinks is None else self.names[id(sinks)])
        scale, cap = arguments.get("scaling"), arguments.get("softcap")
        window = self._window(mask, arguments.get("sliding_window"))
        self.layers.append(LayerSpec(float(q.shape[3] ** -0.5 if scale is None else scale), window, cap))
        self.shapes.append((q.shape[1], k.shape[1], q.shape[3], v.shape[3]))
        return q.new_empty(1, q.shape[2], q.shape[1], v.shape[3])

    def _window(self, mask: Any, asked: int | None) -> int | None:
        """The window of the mask; without one, the one that was asked for."""
        if mask is None:
            return asked
        if not isinstance(mask, MaskFunction):
            raise LoadError("it makes attention masks of its own, not with transformers' mask functions")
        if id(mask) not in self.windows:
            self.windows[id(mask)] = window_of(mask)
        window = self.windows[id(mask)]
        if window is None and asked is not None and asked >= _FAR:  # the mask was not looked at so far
            return asked
        if asked is not None and window != asked:
            raise LoadError(f"a layer's mask has a window of {window} tokens and its attention one of {asked}")
        return window


def trace(model: Any) -> Trace:
    """Runs ``model``, whose weights are on the meta device and in bfloat16.

    Raises `LoadError` with the first thing that our attention, or a cache of pages, cannot do.
    """
    _refuse_state(model)
    recorder = _Recorder({id(parameter): name for name, parameter in model.named_parameters()})
    ids = torch.zeros(1, _TOKENS, dtype=torch.int64, device="meta")
    # With a mask of padding, transformers does not look at the values of the positions.
    inputs = {"input_ids": ids, "position_ids": ids, "attention_mask": torch.ones_like(ids, dtype=torch.bool)}
    try:
        decoder = decoder_of(model)
        with attending(recorder), torch.no_grad():
            hidden = decoder(**inputs, use_cache=False).last_hidden_state
            output_head(model, decoder)(inputs_embeds=hidden, use_cache=False)
    except LoadError:
        raise
    except Exception as error:  # of the model's own code, on tensors without values
        reason = str(error).split("\n")[0][:160]
        raise LoadError(
            f"its forward pass cannot be traced without weights ({type(error).__name__}: {reason})"
        ) from error
    if not recorder.layers:
        raise LoadError("its layers do not call transformers' attention interface")
    if len(shapes := dict.fromkeys(recorder.shapes)) > 1:
        found = " and ".join(f"{kv} KV heads of {dim} channels" for _, kv, dim, _ in shapes)
        raise LoadError(f"its layers have different heads ({found}), and a page has the same in all layers")
    (heads, kv_heads, head_dim, value_dim), *_ = shapes
    if value_dim > head_dim:
        raise LoadError(f"its values have {value_dim} channels, more than its keys' {head_dim}")
    return Trace(tuple(recorder.layers), tuple(recorder.sinks), heads, kv_heads, head_dim, value_dim)


def _refuse_state(model: Any) -> None:
    """Raises `LoadError` for models that keep another state than keys and values."""
    if getattr(model.config, "is_encoder_decoder", False):
        raise LoadError("it is an encoder and a decoder, and pages are of a decoder alone")
    if getattr(type(model), "_is_stateful", False):
        raise LoadError("it keeps a recurrent state, not keys and values of tokens")


def refuse_layers(config: Any) -> None:
    """Raises `LoadError` for layers that pages cannot serve, as the text model's ``config`` declares them."""
    declared = getattr(config, "layer_types", None) or getattr(config, "layers_block_type", None) or []
    types = {str(one) for one in declared} - _LAYER_TYPES
    if types:
        raise LoadError(f"it has layers of {', '.join(sorted(types))}, and pages hold keys and values alone")
    dims = {getattr(layer, "head_dim", None) for layer in getattr(config, "per_layer_config", None) or [config]}
    if len(dims) > 1:
        sizes = " and ".join(map(str, sorted(dims, key=str)))
        raise LoadError(f"its layers have different heads ({sizes} channels), and a page has the same in all layers")


def window_of(mask: MaskFunction) -> int | None:
    """The window of a causal mask, from what some far queries see. Raises `LoadError` for any other mask."""
    keys, zero, windows = torch.arange(_FAR), torch.tensor(0), set()
    for query in (_FAR - 1, _FAR - 2, _FAR * 2 // 3, 3):
        try:
            seen = torch.as_tensor(mask.sees(zero, zero, torch.tensor(query), keys)).expand(_FAR).nonzero()[:, 0]
        except (IndexError, RuntimeError, TypeError) as error:
            raise LoadError("its attention mask depends on more than positions") from error
        first = int(seen[0]) if len(seen) else query + 1
        if len(seen) != query + 1 - first or (len(seen) and int(seen[-1]) != query):
            raise LoadError(
                "its attention is not causal, or in chunks: a token does not see those just before it alone"
            )
        if first:
            windows.add(query + 1 - first)
        elif query > 3:
            windows.add(0)
    if len(windows) > 1:
        raise LoadError("its attention is in chunks: how far a token sees depends on its position")
    return windows.pop() or None
