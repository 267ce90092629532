"""The forward pass: one decoder for every family, driven by its config."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ...kernels.addends import Addends, summed
from ...kernels.attention.base import AttentionBackend, LayerSpec
from ...kernels.base import Ops
from ...kernels.file_weight import FileWeight
from ...kernels.kv_pool import KVLayer, KVPool
from ...kernels.linear import Int8Linear, PlainLinear
from ...kernels.quantize import Quantizer, Rows
from ..parallel.group import SingleRank, TensorGroup
from .config import ModelConfig
from .embedding import Embedding
from .linear import LinearFactory
from .mlp import MLP, GatedMLP, PlainMLP
from .moe import MixtureOfExperts
from .norm import Norm
from .rope import RopeTable
from .weights import even_range, rank_config


@dataclass(slots=True)
class StepTokens:
    """A step's query tokens on the device, int64 ``[T]`` each."""

    ids: Tensor
    positions: Tensor  # below the reserved length
    slots: Tensor  # where their keys and values go: page * page_size + offset


class Decoder:
    """A decoder-only transformer over packed tokens: T query tokens of any number of requests, no padding.

    Args:
        config: the model's.
        weights: by the names of `weights.weight_specs`, all on one device: this rank's slices. Emptied: a weight that
            is packed for its kernel would otherwise stay in memory twice.
        ops: the small operations.
        dtype: the model's; None: the embedding's.
        int8: quantize the linear layers to int8, for a CPU.
        fixed_rows: run linear layers and MLPs for so many rows at a time, so that a token's result does not depend on
            the others of its step; None: for those that there are.
        group: the ranks that the model is split over (Shoeybi et al., 2019): each computes its heads, its part of the
            MLP and its part of the vocabulary, and two sums a layer join them.
        in_files: weights that ``weights`` lacks because they are still in the checkpoint's files. Emptied.
    """

    def __init__(
        self,
        config: ModelConfig,
        weights: dict[str, Tensor],
        ops: Ops,
        group: TensorGroup | None = None,
        *,
        dtype: torch.dtype | None = None,
        int8: bool = False,
        fixed_rows: int | None = None,
        in_files: dict[str, FileWeight] | None = None,
    ) -> None:
        self._group: TensorGroup = group or SingleRank()
        self.config = config = rank_config(config, self._group.size)
        self._vocabulary = even_range(config.vocab_size, self._group.rank, self._group.size)
        # Every rank computes as many logits, so that they can be gathered: padding follows the vocabulary's last rows.
        rows = even_range(config.vocab_size, 0, self._group.size).stop
        for name in ("embedding", "lm_head", "lm_head_bias"):
            if name in weights and len(weights[name]) < rows:
                padding = weights[name].new_zeros(rows - len(weights[name]), *weights[name].shape[1:])
                weights[name] = torch.cat([weights[name], padding])
        in_files = {} if in_files is None else in_files
        table = in_files.pop("embedding", None) or weights.pop("embedding")
        self._norm = Norm(config, "norm", weights, ops)
        self._dtype = dtype or table.dtype
        self._embedding = Embedding(table)
        self._later: list[Embedding | PlainLinear | Int8Linear] = [self._embedding]  # what is not laid out yet
        make_linear = LinearFactory(weights, ops, self._dtype, self._later, in_files, int8=int8, fixed_rows=fixed_rows)
        if "lm_head" in weights or "lm_head" in in_files:
            self._lm_head = make_linear("lm_head")
        else:
            self._lm_head = make_linear.tied(table, weights.pop("lm_head_bias", None))
        self._ropes = {rope: RopeTable(rope, table.device) for rope in config.ropes}
        self._layers = [_Layer(config, i, weights, ops, make_linear, self._group) for i in range(config.num_layers)]

    def lay_out_next(self) -> bool:
        """Lays one more weight out for its kernel. Returns whether there was one. Steps do so for those they find."""
        if self._later:
            self._later.pop().lay_out()
            return True
        return False

    def layer_specs(self) -> list[LayerSpec]:
        """Scale, window, softcap and sinks of each layer, for the attention backend."""
        config = self.config
        return [
            LayerSpec(config.attention_scale, c.window, config.attention_softcap, layer.sinks)
            for c, layer in zip(config.layers, self._layers, strict=True)
        ]

    @property
    def few_layers(self) -> int:
        """How many of the first layers run every kernel and take as much memory as all: one of each kind, and a last
        one, whose MLP runs for the outputs alone."""
        kinds = self.config.layers
        return min(2 + max(kinds.index(kind) for kind in kinds), len(kinds))

    def reserve(self, length: int) -> None:
        """Computes rotary tables for positions below ``length``, unless they exist."""
        for table in self._ropes.values():
            table.reserve(length)

    def forward(
        self,
        tokens: StepTokens,
        pool: KVPool,
        attention: AttentionBackend,
        outputs: Tensor | None = None,
        layers: int | None = None,
    ) -> Tensor:
        """Hidden states after the last norm.

        Args:
            tokens: the step's.
            pool: keys and values of every layer.
            attention: planned for this step.
            outputs: int64 ``[S]``, the query tokens whose hidden states are returned; None: all. The last layer's MLP
                runs for these alone: of other tokens only keys and values are used later.
            layers: run the first so many layers alone (`few_layers`), for what they load and allocate.

        Returns:
            ``[T, hidden]``, or ``[S, hidden]`` if ``outputs`` is given.
        """
        config = self.config
        hidden = self._embed(tokens.ids)
        if config.embed_scale != 1.0:
            hidden = hidden * torch.tensor(config.embed_scale, dtype=hidden.dtype)
        query_scale: Tensor | None = None
        if config.query_scaling is not None:
            query_scale = config.query_scaling(tokens.positions)[:, None, None].to(hidden.dtype)
        cos_sin = {rope: table.lookup(tokens.positions) for rope, table in self._ropes.items()}
        last = (layers or config.num_layers) - 1
        delta: Tensor | Addends | None = None
        for i, layer in enumerate(self._layers[: last + 1]):
            cos, sin = cos_sin[config.layers[i].rope]
            x = layer.input(delta, hidden)
            # Large tensors are deleted after their last use: the step's peak would be a third higher.
            del delta
            q, k, v = layer.queries_keys_values(x, cos, sin, pool.layer(i), tokens.slots)
            if query_scale is not None:
                q = q * query_scale
            attended = attention.run(i, q, k, v)
            del q, k, v
            if i == last and outputs is not None:
                hidden, attended = hidden.index_select(0, outputs), attended.index_select(0, outputs)
                x = x.index_select(0, outputs)
            if config.parallel:
                delta = layer.attention_and_mlp(attended.flatten(1), x)
                continue
            delta = layer.attention_output(attended.flatten(1))
            del attended, x
            x = layer.mlp_input(delta, hidden)
            del delta
            delta = layer.mlp_output(x)
        return self._norm.add(delta, hidden)

    def logits(self, hidden: Tensor) -> Tensor:
        """``[S, vocab]`` of hidden states ``[S, hidden]``: in the model's dtype, or in float32 where the config scales
        or caps them."""
        logits = self._lm_head(hidden)
        if self._group.size > 1:
            parts = self._group.all_gather(logits)
            logits = parts.transpose(0, 1).flatten(1)[:, : self.config.vocab_size]
        scale, cap = self.config.logits_scale, self.config.final_softcap
        if scale != 1.0:
            logits = logits.float() * scale
        return logits if cap is None else logits.float().div_(cap).tanh_().mul_(cap)

    def _embed(self, ids: Tensor) -> Tensor:
        """``[T, hidden]``: each rank looks up the tokens of its part of the vocabulary, and the sum has all of them."""
        if self._group.size == 1:
            return self._embedding(ids).to(self._dtype)
        elsewhere = (ids < self._vocabulary.start) | (ids >= self._vocabulary.stop)
        found = self._embedding((ids - self._vocabulary.start).masked_fill_(elsewhere, 0)).to(self._dtype)
        # A copy: the sum is only valid until the next one, and this is the residual stream.
        return self._group.all_reduce(found.masked_fill_(elsewhere[:, None], 0)).clone()


class _Layer:
    """One transformer layer.

    ``hidden`` ``[T, H]`` is the residual stream. The layer returns its last addition to it as a ``delta``, which the
    next norm adds in the same pass.
    """

    def __init__(
        self,
        config: ModelConfig,
        index: int,
        weights: dict[str, Tensor],
        ops: Ops,
        make_linear: LinearFactory,
        group: TensorGroup,
    ) -> None:
        def weight(name: str) -> Tensor:
            return weights.pop(f"layers.{index}.{name}")

        self.config, self.ops, self.group = config, ops, group
        self.attention_norm, self.attention_post_norm, self.mlp_norm, self.mlp_post_norm = (
            Norm(config, f"layers.{index}.{name}", weights, ops) if name in config.norms else None
            for name in ("attention_norm", "attention_post_norm", "mlp_norm", "mlp_post_norm")
        )
        self.qkv, self.o = make_linear(f"layers.{index}.qkv"), make_linear(f"layers.{index}.o")
        self.mlp = make_linear.fixed(_make_mlp(config, index, weights, ops, make_linear))
        self.sinks = weight("sinks") if config.sinks else None
        self.qk_norm: Tensor | None = None  # [heads + kv_heads, D]: queries and keys are normed in one call
        self.whole_norms: list[Tensor] = []  # of queries and of keys, over all heads at once
        if config.qk_norm in ("head", "head_rotated"):
            q, k = weight("q_norm"), weight("k_norm")
            self.qk_norm = torch.cat([q.expand(config.num_heads, -1), k.expand(config.num_kv_heads, -1)])
        elif config.qk_norm == "head_layer":
            q, k = _own_heads(weight("q_norm"), config, group), _own_heads(weight("k_norm"), config, group, kv=True)
            self.qk_norm = torch.cat([q, k])
        elif config.qk_norm == "all":
            self.whole_norms = [weight("q_norm"), weight("k_norm")]

    def input(self, delta: Tensor | Addends | None, hidden: Tensor) -> Rows:
        """Adds ``delta`` into ``hidden`` in place. Returns what attention reads, and a parallel MLP too."""
        return _add(delta, hidden, self.attention_norm, None if self.config.parallel else self.qkv.quantizer)

    def queries_keys_values(
        self, x: Rows, cos: Tensor, sin: Tensor, kv: KVLayer, slots: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Rotated queries and keys, and values; also stores keys and values."""
        config = self.config
        qkv = self.qkv(x)
        start = 0
        for norm in self.whole_norms:
            part = qkv[:, start : start + len(norm)]
            part.copy_(self._whole_norm(part.contiguous(), norm))
            start += len(norm)
        if config.clip_qkv is not None:
            qkv = qkv.clamp_(-config.clip_qkv, config.clip_qkv)
        qkv = qkv.view(-1, config.num_heads + 2 * config.num_kv_heads, config.head_dim)
        if config.qk_norm == "head_layer":
            assert self.qk_norm is not None
            qk = qkv[:, : len(self.qk_norm)]
            qk.copy_(F.layer_norm(qk.float(), qk.shape[2:], eps=config.norm_eps).mul_(self.qk_norm))
            return self.ops.rope_write(qkv, config.num_heads, cos, sin, kv, slots)
        normed = self.qk_norm, config.norm_eps, config.qk_norm == "head_rotated"
        return self.ops.rope_write(qkv, config.num_heads, cos, sin, kv, slots, *normed)

    def attention_output(self, attended: Tensor) -> Tensor | Addends:
        """What attention adds to ``hidden``. Of ranks, each has its heads' part of the product."""
        return self._scaled(self.group.addends(self.o(attended)), self.attention_post_norm)

    def mlp_input(self, delta: Tensor | Addends, hidden: Tensor) -> Rows:
        """Adds ``delta`` into ``hidden`` in place. Returns what the MLP reads."""
        return _add(delta, hidden, self.mlp_norm, self.mlp.quantizer)

    def mlp_output(self, x: Rows) -> Tensor | Addends:
        """What the MLP adds, the layer's delta. Of ranks, each has a part of it."""
        return self._scaled(self.group.addends(self.mlp(x)), self.mlp_post_norm)

    def attention_and_mlp(self, attended: Tensor, x: Rows) -> Tensor | Addends:
        """The delta of a layer whose MLP reads what attention reads, ``x``."""
        return self._scaled(self.group.addends(self.o(attended).add_(self.mlp(x))), None)

    def _whole_norm(self, x: Tensor, weight: Tensor) -> Tensor:
        """RMSNorm over the heads of all ranks. All have as many, so the mean over ranks is that over all heads."""
        if self.group.size == 1:
            return self.ops.rms_norm(x, weight, self.config.norm_eps)
        square = self.group.all_reduce(x.float().square().mean(-1, keepdim=True)) / self.group.size
        return (x * torch.rsqrt(square + self.config.norm_eps) * weight).to(x.dtype)

    def _scaled(self, delta: Tensor | Addends, norm: Norm | None) -> Tensor | Addends:
        """The output of attention or MLP, as it is added to the residual stream."""
        if norm is not None:
            delta = norm(summed(delta))
        return delta if self.config.residual_scale == 1.0 else summed(delta).mul_(self.config.residual_scale)


def _own_heads(weight: Tensor, config: ModelConfig, group: TensorGroup, *, kv: bool = False) -> Tensor:
    """``[heads of this rank, D]`` of the norm weights of all ranks' heads, channels in the order of the rotation."""
    heads = weight.view(-1, config.head_dim)
    count = config.num_kv_heads if kv else config.num_heads
    first = group.rank * len(heads) // group.size
    heads = heads[first : first + count]
    if config.interleaved_rope:
        heads = torch.cat([heads[:, 0::2], heads[:, 1::2]], 1)
    return heads


def _make_mlp(config: ModelConfig, index: int, weights: dict[str, Tensor], ops: Ops, make_linear: LinearFactory) -> MLP:
    """The MLP of a layer, whose weights it takes out of ``weights``."""
    layer = f"layers.{index}"
    if config.layers[index].sparse:
        return MixtureOfExperts(config, layer, weights, ops, make_linear)
    if config.gated_mlp:
        return GatedMLP(config, layer, ops, make_linear.plain)
    return PlainMLP(config, layer, weights, make_linear.plain)


def _add(delta: Tensor | Addends | None, hidden: Tensor, norm: Norm | None, quantizer: Quantizer | None) -> Rows:
    """Adds ``delta`` into ``hidden`` in place and returns the norm of the sum, for a linear layer with ``quantizer``;
    without a norm, the sum itself."""
    if norm is not None:
        return norm.add_quantized(delta, hidden, quantizer)
    return hidden if delta is None else hidden.add_(summed(delta))
