"""Rotary position embeddings (Su et al., 2021): frequencies of each variant, and tables of cosines and sines."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..errors import LoadError

# "dynamic" (NTK-aware scaling by the length of the context) equals "default" up to max_position_embeddings, and longer
# contexts are not served.
KINDS = ("default", "dynamic", "linear", "llama3", "longrope", "su", "yarn")


@dataclass(frozen=True, slots=True)
class RopeConfig:
    """One rotary embedding. Each field after ``kind`` is used by the kinds in its comment."""

    theta: float
    dim: int  # channels of a head that are rotated
    kind: str = "default"
    factor: float = 1.0  # linear, llama3, yarn: how much longer the context became
    original_length: int = 0  # llama3, longrope, yarn: context before stretching
    low_freq_factor: float = 1.0  # llama3
    high_freq_factor: float = 4.0  # llama3
    beta_fast: float = 32.0  # yarn
    beta_slow: float = 1.0  # yarn
    truncate: bool = True  # yarn
    attention_factor: float = 1.0  # yarn, longrope: multiplies cosines and sines
    short_factor: tuple[float, ...] = ()  # longrope: divides each frequency, in contexts up to ``original_length``
    long_factor: tuple[float, ...] = ()  # longrope: the same in longer ones
    long: bool = False  # longrope: which of the two

    def inverse_frequencies(self) -> Tensor:
        """Radians a position, float32 ``[dim / 2]``, as Hugging Face computes them."""
        if self.kind == "none":  # angles of 0: no rotation
            return torch.zeros(self.dim // 2)
        powers = self.theta ** (torch.arange(0, self.dim, 2, dtype=torch.float32) / self.dim)
        if self.kind == "longrope":
            return 1.0 / (
                torch.tensor(self.long_factor if self.long else self.short_factor, dtype=torch.float32) * powers
            )
        if self.kind == "linear":
            return 1.0 / powers / self.factor
        if self.kind == "llama3":
            return self._llama3(1.0 / powers)
        if self.kind == "yarn":
            return self._yarn(powers)
        return 1.0 / powers

    def _llama3(self, frequencies: Tensor) -> Tensor:
        """Llama 3.1: long waves are slowed by ``factor``, short ones kept, those between interpolated."""
        wavelength = 2 * math.pi / frequencies
        longest = self.original_length / self.low_freq_factor
        shortest = self.original_length / self.high_freq_factor
        smooth = (self.original_length / wavelength - self.low_freq_factor) / (
            self.high_freq_factor - self.low_freq_factor
        )
        between = (1 - smooth) * frequencies / self.factor + smooth * frequencies
        slowed = torch.where(wavelength > longest, frequencies / self.factor, frequencies)
        return torch.where((wavelength >= shortest) & (wavelength <= longest), between, slowed)

    def _yarn(self, powers: Tensor) -> Tensor:
        """YaRN (Peng et al., 2023): a ramp over channels from extrapolation to interpolation."""

        def channel(rotations: float) -> float:
            return self.dim * math.log(self.original_length / (rotations * 2 * math.pi)) / (2 * math.log(self.theta))

        low, high = channel(self.beta_fast), channel(self.beta_slow)
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, self.dim - 1)
        if low == high:
            high += 0.001
        ramp = ((torch.arange(self.dim // 2, dtype=torch.float32) - low) / (high - low)).clamp(0, 1)
        return 1.0 / (self.factor * powers) * ramp + 1.0 / powers * (1 - ramp)


class RopeTable:
    """Cosines and sines of positions ``0 … n - 1``, float32 on ``device``. `reserve` makes the table longer."""

    def __init__(self, config: RopeConfig, device: torch.device) -> None:
        self._factor = config.attention_factor
        self._frequencies = config.inverse_frequencies().to(device)
        self._table = torch.empty(0, 2, config.dim // 2, device=device)

    def reserve(self, length: int) -> None:
        """Makes positions below ``length`` available."""
        have = self._table.shape[0]
        if length <= have:
            return
        positions = torch.arange(max(length, 2 * have, 1024), dtype=torch.float32, device=self._table.device)
        angles = positions[:, None] * self._frequencies
        self._table = torch.stack([angles.cos(), angles.sin()], dim=1).mul_(self._factor)

    def lookup(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """(cos, sin), each ``[T, dim / 2]``, of int64 ``positions`` ``[T]`` below the reserved length."""
        cos, sin = self._table.index_select(0, positions).unbind(1)
        return cos, sin


def parse_rope(config: Mapping[str, Any], layer_type: str, head_dim: int, where: str) -> RopeConfig:
    """The rotary embedding of layers of ``layer_type``.

    transformers 5 writes ``rope_parameters`` (one object, or one for each layer type); 4 writes ``rope_theta``,
    ``rope_scaling`` and, for Gemma 3's sliding layers, ``rope_local_base_freq``.
    """
    theta = config.get("rope_theta", 10_000.0)
    local = config.get("rope_local_base_freq")
    sliding = layer_type == "sliding_attention" and local is not None
    values = config.get("rope_parameters")
    if values is None:
        values = {} if sliding else config.get("rope_scaling") or {}
    elif isinstance(values, dict) and ("full_attention" in values or "sliding_attention" in values):
        values = values.get(layer_type) or {}
    if not isinstance(values, dict):
        raise LoadError(f"{where}: rope_parameters must be an object, got {type(values).__name__}")
    kind = values.get("rope_type", values.get("type", "default"))
    if kind == "mrope":  # of Qwen's vision models: text has the same position in every section of channels
        kind = "default"
    if kind not in KINDS:
        raise LoadError(f"{where}: rope_type {kind!r} is not supported; supported: {', '.join(KINDS)}")

    def number(key: str, default: Any = None) -> float:
        value = values.get(key)
        value = default if value is None else value
        if not _positive(value):
            raise LoadError(f"{where}: rope {key} must be a positive number, got {value!r}")
        return float(value)

    rotated: Any = config.get("rotary_dim")  # MiniMax
    partial = number(
        "partial_rotary_factor", config.get("partial_rotary_factor", rotated / head_dim if _positive(rotated) else 1.0)
    )
    base = RopeConfig(theta=float(number("rope_theta", local if sliding else theta)), dim=int(head_dim * partial))
    if kind == "dynamic" and values.get("alpha") is not None:  # Hunyuan: NTK-aware scaling by a fixed factor
        return replace(base, theta=base.theta * number("alpha") ** (base.dim / (base.dim - 2)))
    if kind in ("default", "dynamic"):
        return base
    if kind == "linear":
        return replace(base, kind=kind, factor=number("factor"))
    length = int(
        config.get("original_max_position_embeddings")
        or number("original_max_position_embeddings", config.get("max_position_embeddings"))
    )
    if kind == "llama3":
        low, high = number("low_freq_factor"), number("high_freq_factor")
        return replace(
            base,
            kind=kind,
            factor=number("factor"),
            original_length=length,
            low_freq_factor=low,
            high_freq_factor=high,
        )
    if kind in ("longrope", "su"):
        return _longrope(base, values, length, config.get("max_position_embeddings", length), where)
    factor = number("factor", config.get("max_position_embeddings", 0) / length)
    return replace(
        base,
        kind=kind,
        factor=factor,
        original_length=length,
        beta_fast=number("beta_fast", 32.0),
        beta_slow=number("beta_slow", 1.0),
        truncate=bool(values.get("truncate", True)),
        attention_factor=_attention_factor(values, factor),
    )


def _longrope(base: RopeConfig, values: Mapping[str, Any], length: int, longest: int, where: str) -> RopeConfig:
    """LongRoPE (Ding et al., 2024), with its short factors: see `ModelConfig.for_length`."""

    def factors(key: str) -> tuple[float, ...]:
        found = values.get(key)
        if not isinstance(found, list) or len(found) != base.dim // 2 or not all(_positive(one) for one in found):
            raise LoadError(f"{where}: rope {key} must hold {base.dim // 2} positive numbers")
        return tuple(map(float, found))

    factor = longest / length
    temperature = values.get("attention_factor")
    if temperature is None:
        temperature = math.sqrt(1 + math.log(factor) / math.log(length)) if factor > 1 else 1.0
    return replace(
        base,
        kind="longrope",
        original_length=length,
        attention_factor=float(temperature),
        short_factor=factors("short_factor"),
        long_factor=factors("long_factor"),
    )


def _positive(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and value > 0


def _attention_factor(values: Mapping[str, Any], factor: float) -> float:
    """YaRN's temperature: given, or 0.1 ln(factor) + 1, or DeepSeek's ratio of two such terms.

    ``attn_factor`` multiplies it, as in YaRN's own code, vLLM and SGLang; transformers does not read it.
    """

    def term(scale: float) -> float:
        return 0.1 * scale * math.log(factor) + 1.0 if factor > 1 else 1.0

    if values.get("attention_factor") is not None:
        return float(values["attention_factor"])
    mscale, mscale_all_dim = values.get("mscale"), values.get("mscale_all_dim")
    multiplier = float(values.get("attn_factor") or 1.0)
    if mscale and mscale_all_dim:
        return multiplier * term(mscale) / term(mscale_all_dim)
    return multiplier * term(1.0)
