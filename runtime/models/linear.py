"""How a weight is stored on the device and multiplied."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from ...kernels.linear import Linear, PlainLinear

Scheme = Literal["none"]  # none: in the model's dtype


def make_linear(name: str, tensors: dict[str, Tensor], scheme: Scheme = "none") -> Linear:
    """The matrix product with weight ``name`` and, if there is one, its ``name_bias``.

    Takes both out of ``tensors``, so that a weight which is laid out anew does not stay twice.
    """
    if scheme != "none":
        raise ValueError(f"no storage scheme {scheme!r} for weights")
    return PlainLinear(tensors.pop(name), tensors.pop(f"{name}_bias", None))
