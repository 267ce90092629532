"""How the weight of a linear layer is stored on the device and multiplied."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from ...kernels.base import Ops
from ...kernels.experts import Experts, ExpertWeight, LoopedExperts
from ...kernels.file_weight import FileWeight
from ...kernels.fp8_linear import Fp8Linear, has_fp8, multiplies_fp8
from ...kernels.linear import FixedRows, Int8Linear, Linear, PlainLinear, linear_bytes, packs
from ...kernels.ops import Activation
from ...kernels.quantize import BLOCK, Quantizer, dequantize_weight, in_blocks
from .config import ModelConfig
from .embedding import Embedding
from .hf.config import TransformersConfig
from .weights import is_linear, shard_shape, stored_dtype, weight_specs


class LinearFactory:
    """Makes the linear layers of a decoder from its weights.

    A weight in FP8 stays so on a GPU that multiplies FP8. Elsewhere it is dequantized: on a CPU `torch._scaled_mm`
    takes 3 to 60 times as long as float32 packed for oneDNN (4096 × 1024 and 1024 × 3072, 1 to 256 rows).

    Args:
        weights: of `loader.load_weights`. Each weight is taken out, so that one that is laid out anew for its kernel
            does not stay twice.
        ops: the small operations.
        dtype: the model's.
        later: where layers are put whose weights are not laid out yet, for the caller to do so or their first call;
            None: every weight is laid out at once.
        in_files: weights that are not in ``weights`` but still in the checkpoint's files; taken out likewise.
        int8: quantize weights to int8, for a CPU.
        fixed_rows: multiply so many rows at a time, always (`FixedRows`); None: those that there are.
    """

    def __init__(
        self,
        weights: dict[str, Tensor],
        ops: Ops,
        dtype: torch.dtype,
        later: list[Embedding | PlainLinear | Int8Linear] | None = None,
        in_files: dict[str, FileWeight] | None = None,
        *,
        int8: bool = False,
        fixed_rows: int | None = None,
    ) -> None:
        self._weights, self._ops, self._dtype, self._int8 = weights, ops, dtype, int8
        self._later, self._fixed_rows = later, fixed_rows
        self._in_files = {} if in_files is None else in_files

    def fixed(self, layer: Linear) -> Linear:
        """``layer``, which works row by row, with ``fixed_rows``."""
        return layer if self._fixed_rows is None else FixedRows(layer, self._fixed_rows)

    def __call__(self, name: str) -> Linear:
        """The product with weight ``name`` and, if there is one, its ``name_bias``."""
        return self.fixed(self.plain(name))

    def plain(self, name: str) -> Linear:
        """The same without ``fixed_rows``, for a part of what is `fixed` as a whole."""
        if name in self._in_files:
            return self._unquantized(self._in_files.pop(name), self._weights.pop(f"{name}_bias", None))
        return self._linear(*self._pop(name))

    def tied(self, table: Tensor | FileWeight, bias: Tensor | None) -> Linear:
        """The product with the embedding's table, which stays in memory."""
        if isinstance(table, FileWeight):
            return self.fixed(self._unquantized(table, bias, shared=True))
        return self.fixed(self._linear(table, None, bias=bias, shared=True))

    def experts(self, name: str, count: int, activation: Activation) -> Experts:
        """The ``count`` experts whose rows weights ``name.gate_up`` and ``name.down`` hold one below the other."""
        gate_up, down = (self._expert_weight(f"{name}.{part}") for part in ("gate_up", "down"))
        if gate_up.values.device.type == "cuda":
            from ...kernels.triton_experts import TritonExperts

            return TritonExperts(gate_up, down, count, activation)

        def linears(weight: ExpertWeight) -> list[Linear]:
            # How many rows an expert has depends on all tokens of the step.
            # No copies: most experts' weights are not read in a step.
            parts = weight.chunk(count)
            return [self.fixed(self._linear(one.values, one.scale, bias=one.bias, copied=False)) for one in parts]

        return LoopedExperts(linears(gate_up), linears(down), activation)

    def _expert_weight(self, name: str) -> ExpertWeight:
        """An input of experts is not quantized: a static scale of it is not used."""
        weight, scale, _, bias = self._pop(name)
        if weight.dtype == torch.float8_e4m3fn and not multiplies_fp8(weight.device):
            assert scale is not None
            weight, scale = dequantize_weight(weight, scale, self._dtype), None
        return ExpertWeight(weight, scale, bias)

    def _pop(self, name: str) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
        """The weight, its scale, its static input scale and its bias."""
        scale, input_scale, bias = (self._weights.pop(name + end, None) for end in ("_scale", "_input_scale", "_bias"))
        return self._weights.pop(name), scale, input_scale, bias

    def _linear(
        self,
        weight: Tensor,
        scale: Tensor | None,
        input_scale: Tensor | None = None,
        bias: Tensor | None = None,
        copied: bool = True,
        shared: bool = False,
    ) -> Linear:
        if scale is not None and has_fp8(weight, scale):
            group = BLOCK if in_blocks(weight, scale) else 0
            static = None if input_scale is None else input_scale.amax(0, keepdim=True)
            quantizer = Quantizer(weight.dtype, group, static)
            return Fp8Linear(weight, scale, bias, quantizer, self._dtype, self._ops)
        if scale is not None:
            weight = dequantize_weight(weight, scale, self._dtype)
        if weight.device.type == "cuda":
            from ...kernels.streamed_linear import StreamedLinear, streams

            weight = weight.to(self._dtype)
            if streams(weight):
                return StreamedLinear(weight, bias)
        return self._unquantized(weight, bias, copied=copied, shared=shared)

    def _unquantized(
        self, weight: Tensor | FileWeight, bias: Tensor | None, *, copied: bool = True, shared: bool = False
    ) -> Linear:
        linear: PlainLinear | Int8Linear
        if self._int8:
            linear = Int8Linear(weight, bias, self._dtype, copied=copied)
        else:
            linear = PlainLinear(weight, bias, self._dtype, copied=copied, shared=shared)
        if self._later is None or weight.device.type != "cpu":
            linear.lay_out()
        else:
            self._later.append(linear)
        return linear


def weight_bytes(
    config: ModelConfig,
    dtype: torch.dtype,
    device: torch.device,
    rank: int = 0,
    ranks: int = 1,
    *,
    int8: bool = False,
    copied: bool = True,
) -> int:
    """Bytes of a rank's weights as a decoder stores them. ``int8``: see `LinearFactory`. ``copied``: with the copies
    for few rows; a step reads a weight or its copy."""
    checkpoint, total = config.quantization, 0
    fp8 = checkpoint is not None and multiplies_fp8(device)
    # Layers with experts may follow ones without, and a checkpoint may leave some layers' weights unquantized.
    alike = config.experts is None and (checkpoint is None or checkpoint.scale is None)
    for spec in weight_specs(replace(config, layers=config.layers[:1]) if alike else config):
        shape = shard_shape(spec, rank, ranks)
        if is_linear(spec) and (spec.kind == "weight" or not fp8):
            size = linear_bytes(device, shape, dtype, int8=int8, copied=copied and ".experts." not in spec.name)
        elif spec.kind == "bytes" and device.type != "cuda":  # MXFP4, dequantized: two values a byte
            size = 0 if spec.name.endswith("_scale") else 2 * math.prod(shape) * dtype.itemsize
        else:  # the scales of a weight that is dequantized are not kept
            size = math.prod(shape) * stored_dtype(spec, dtype).itemsize if fp8 or spec.kind != "scale" else 0
        total += size * config.num_layers if alike and spec.name.startswith("layers.") else size
    if config.tied_embeddings and (int8 or packs(device, dtype)):  # the output layer is packed, the embedding stays
        shape = config.vocab_size // ranks, config.hidden_size
        total += linear_bytes(device, shape, dtype, int8=int8, copied=copied)
    return total


def weight_format(
    config: ModelConfig | TransformersConfig, dtype: torch.dtype, device: torch.device, *, int8: bool = False
) -> str:
    """How a decoder stores its weights, in words."""
    plain = str(dtype).removeprefix("torch.")
    if int8:
        return f"int8 with a scale for each output channel; embedding and norms {plain}"
    if config.quantization is None or not config.quantization.targets:
        return plain
    if config.quantization.weights == "mxfp4":
        where = "experts MXFP4" if device.type == "cuda" else "experts dequantized from MXFP4"
        return f"{plain}; {where}"
    if not multiplies_fp8(device):
        return f"{plain}, dequantized from FP8, which {device} does not multiply"
    scales = {"tensor": "tensor", "channel": "output channel", "block": "128 × 128 block"}
    return f"FP8 with a scale for each {scales[config.quantization.weights]}; embedding and norms {plain}"
