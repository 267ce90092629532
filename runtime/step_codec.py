"""Encodes plans as msgpack bytes, for an executor in another process."""

from __future__ import annotations

import math
from typing import Any, get_args

import msgspec
import numpy as np

from .step import StepPlan

_Array = tuple[str, tuple[int, ...], bytes]  # dtype, shape, values in C order, little-endian


def encode(step: StepPlan) -> bytes:
    """The byte form that `decode_plan` reads."""
    return _encoder.encode(step)


def decode_plan(data: bytes) -> StepPlan:
    """Raises `msgspec.ValidationError` for bytes that are not a plan. The arrays are new and writable."""
    return _plan_decoder.decode(data)


def _from_array(array: Any) -> _Array:
    if not isinstance(array, np.ndarray):
        raise NotImplementedError(f"a step cannot hold a {type(array).__name__}")
    little = array.astype(array.dtype.newbyteorder("<"), copy=False)
    return little.dtype.str, array.shape, little.tobytes()


def _to_array(wanted: Any, value: Any) -> Any:
    """``wanted``: an ``NDArray[scalar type]``."""
    dtype, shape, values = msgspec.convert(value, _Array)
    expected = np.dtype(get_args(get_args(wanted)[1])[0]).newbyteorder("<")
    if dtype != expected.str:
        raise ValueError(f"an array of {dtype}, expected {expected.str}")
    if min(shape, default=0) < 0 or math.prod(shape) * expected.itemsize != len(values):
        raise ValueError(f"{len(values)} bytes do not fill an array {shape} of {dtype}")
    return np.frombuffer(bytearray(values), expected).reshape(shape)


_encoder = msgspec.msgpack.Encoder(enc_hook=_from_array)
_plan_decoder = msgspec.msgpack.Decoder(StepPlan, dec_hook=_to_array)
