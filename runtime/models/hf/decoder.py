"""The forward pass of a model of transformers over our pages: its layers, our attention."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ....kernels.attention.base import AttentionBackend, LayerSpec
from ....kernels.base import Ops
from ....kernels.kv_pool import KVPool
from ..decoder import StepTokens
from .config import TransformersConfig
from .head import decoder_of, output_head
from .library import attending


class TransformersDecoder:
    """Has `decoder.Decoder`'s interface. All tokens of a step are one row of transformers' batch, with positions.

    Args:
        config: this rank's.
        model: a causal language model with our linear layers, on the device.
        ops: the small operations.
    """

    def __init__(self, config: TransformersConfig, model: Any, ops: Ops) -> None:
        self.config, self._ops = config, ops
        self._layers = decoder_of(model)
        self._specs = [
            replace(spec, sinks=model.get_parameter(name).float()) if name else spec
            for spec, name in zip(config.layers, config.sinks, strict=True)
        ]
        self._head = output_head(model, self._layers)

    def parameters(self) -> Iterator[Tensor]:
        """Those that are not of linear layers."""
        return self._layers.parameters()

    @property
    def few_layers(self) -> int:
        """How many of the first layers take as much memory as all. Of other code, that is only known of all."""
        return self.config.num_layers

    def layer_specs(self) -> list[LayerSpec]:
        """Scale, window, softcap and sinks of each layer, for the attention backend."""
        return self._specs

    def reserve(self, length: int) -> None:
        """Nothing: transformers computes rotary embeddings from the positions."""

    def lay_out_next(self) -> bool:
        """See `decoder.Decoder.lay_out_next`. Linear layers here are laid out as they are made."""
        return False

    def forward(
        self,
        tokens: StepTokens,
        pool: KVPool,
        attention: AttentionBackend,
        outputs: Tensor | None = None,
        layers: int | None = None,
    ) -> Tensor:
        """See `decoder.Decoder.forward`. ``layers`` is not looked at: all run."""
        config = self.config
        step = _Step(
            self._ops, pool, attention, tokens.slots, config.num_heads + 2 * config.num_kv_heads, config.head_dim
        )
        with attending(step):
            states = self._layers(input_ids=tokens.ids[None], position_ids=tokens.positions[None], use_cache=False)
        hidden: Tensor = states.last_hidden_state[0]
        return hidden if outputs is None else hidden.index_select(0, outputs)

    def logits(self, hidden: Tensor) -> Tensor:
        """``[S, vocab]`` of hidden states ``[S, hidden]``, scaled and capped as the model does it."""
        logits: Tensor = self._head(inputs_embeds=hidden[None], use_cache=False).logits[0]
        return logits


@dataclass(slots=True)
class _Step:
    """The attention of one step, layer after layer: an `Attend`."""

    ops: Ops
    pool: KVPool
    backend: AttentionBackend
    slots: Tensor
    heads: int  # of queries, keys and values
    head_dim: int
    layer: int = 0
    identity: tuple[Tensor, Tensor] | None = None  # cosines and sines of no rotation: the model has rotated

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, mask: Any, arguments: Mapping[str, Any]) -> Tensor:
        layer, self.layer = self.layer, self.layer + 1
        value_dim = v.shape[3]
        if value_dim < self.head_dim:
            v = F.pad(v, (0, self.head_dim - value_dim))
        qkv = torch.cat([q[0], k[0], v[0]]).transpose(0, 1).contiguous()
        if qkv.shape[1] != self.heads:
            raise RuntimeError(
                f"a layer attends with {qkv.shape[1]} heads of queries, keys and values, not {self.heads}"
            )
        if self.identity is None:
            shape = len(qkv), self.head_dim // 2
            self.identity = torch.ones(shape, device=qkv.device), torch.zeros(shape, device=qkv.device)
        qkv_of_step = self.ops.rope_write(qkv, q.shape[1], *self.identity, self.pool.layer(layer), self.slots)
        return self.backend.run(layer, *qkv_of_step)[None, :, :, :value_dim]
