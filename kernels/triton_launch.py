"""Launching Triton kernels from Python at a fraction of Triton's own cost per launch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import triton
from torch import Tensor

DEFAULT_STAGES = 3  # Triton's default; only loops use it
ALIGNMENT = 16  # bytes; Triton compiles wider loads and stores for pointers that are multiples of it


class Kernel:
    """A compiled kernel for each combination of dtypes, alignments and constants it has been called with.

    Triton's own launch examines every argument each time, which takes longer than most kernels of a decode step run.
    Here the arguments are sorted: tensors, then integers (compiled once for all values), then constants. A call looks
    up the compiled kernel and launches it, without allocating or waiting. Once a call has run, it can be captured in a
    CUDA graph.
    """

    def __init__(self, function: Callable[..., None], integers: Sequence[str], jit: Callable[..., Any]) -> None:
        self._jit: Any = jit(function, do_not_specialize=list(integers))
        self._compiled: dict[tuple[object, ...], Any] = {}

    def __call__(
        self,
        grid: tuple[int, int, int],
        tensors: tuple[Tensor, ...],
        integers: tuple[int, ...],
        constants: tuple[object, ...],
        warps: int,
        stages: int = DEFAULT_STAGES,
    ) -> None:
        """``grid``: programs, none of them 0. ``tensors``: on one device; ``integers``: of 32 bits."""
        key = (
            tensors[0].get_device(),
            constants,
            warps,
            stages,
            *[(tensor.dtype, tensor.data_ptr() % ALIGNMENT == 0) for tensor in tensors],
        )
        compiled = self._compiled.get(key)
        if compiled is not None:
            compiled[grid](*tensors, *integers, *constants)
            return
        compiled = self._jit[grid](*tensors, *integers, *constants, num_warps=warps, num_stages=stages)
        if compiled is not None:  # None under Triton's interpreter
            self._compiled[key] = compiled


def kernel(*integers: str, jit: Callable[..., Any] = triton.jit) -> Callable[[Callable[..., None]], Kernel]:
    """Decorates a kernel; ``integers`` names its integer parameters that are not constants; ``jit``: or Gluon's."""
    return lambda function: Kernel(function, integers, jit)
