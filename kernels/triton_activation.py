"""Gated activations in Triton, for every kernel that ends with one."""

from __future__ import annotations

import triton
import triton.language as tl

from .ops import SWIGLU_ALPHA, SWIGLU_LIMIT

_ALPHA = tl.constexpr(SWIGLU_ALPHA)
_LIMIT = tl.constexpr(SWIGLU_LIMIT)


@triton.jit
def gated(gate: tl.tensor, up: tl.tensor, ACTIVATION: tl.constexpr) -> tl.tensor:
    """``activation(gate) * up`` of float32 tiles: see `ops.gate_mul`."""
    if ACTIVATION == "swigluoai":
        gate = tl.minimum(gate, _LIMIT)
        gate = gate * tl.sigmoid(gate * _ALPHA)
        up = tl.minimum(tl.maximum(up, -_LIMIT), _LIMIT) + 1.0
    elif ACTIVATION == "silu":
        gate = gate * tl.sigmoid(gate)
    elif ACTIVATION == "gelu_tanh":  # 0.5 * (1 + tanh(z)) is sigmoid(2 z); 1.5957… is 2 * sqrt(2 / pi)
        gate = gate * tl.sigmoid(1.5957691216057308 * (gate + 0.044715 * gate * gate * gate))
    else:
        gate = gate * 0.5 * (1.0 + tl.erf(gate * 0.7071067811865476))
    return gate * up
