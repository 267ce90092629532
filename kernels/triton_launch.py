"""Launching Triton kernels from Python at a fraction of Triton's own cost per launch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

DEFAULT_STAGES = 3  # Triton's default; only loops use it
OVERLAP = True  # programmatic dependent launch, and `streamed_linear`, where the device has it
ALIGNMENT = 16  # bytes; Triton compiles wider loads and stores for pointers that are multiples of it


@triton.jit
def wait_for_inputs(OVERLAPS: tl.constexpr) -> None:
    """Waits until the kernels before this one have ended. Every program of a kernel that overlaps calls it, before it
    writes, or reads what kernels write: weights and the plan of a step may be read earlier.

    Programmatic dependent launch: its programs may start before those of the kernel ahead have ended. As all such
    kernels wait, and end after those before them, the stream keeps its order.
    """
    if OVERLAPS:
        tl.extra.cuda.gdc_wait()


@triton.jit
def start_next(OVERLAPS: tl.constexpr) -> None:
    """Lets the next kernel's programs start once all of this one's have called it, or ended.

    Early where those have weights to request before they wait. Otherwise late or never: programs that start beside
    others fill the multiprocessors unevenly.
    """
    if OVERLAPS:
        tl.extra.cuda.gdc_launch_dependents()


class Kernel:
    """A compiled kernel for each combination of dtypes, alignments and constants it has been called with.

    Triton's own launch examines every argument each time, which takes longer than most kernels of a decode step run.
    Here the arguments are sorted: tensors, then integers (compiled once for all values), then constants. A call looks
    up the compiled kernel and launches it, without allocating or waiting. Once a call has run, it can be captured in a
    CUDA graph.

    A kernel that ``overlaps`` has one more constant, the last, which is no argument of a call: see `wait_for_inputs`.
    """

    def __init__(
        self, function: Callable[..., None], integers: Sequence[str], overlaps: bool, jit: Callable[..., Any]
    ) -> None:
        self._jit: Any = jit(function, do_not_specialize=list(integers))
        self.overlaps = overlaps
        self._compiled: dict[tuple[object, ...], tuple[Any, tuple[object, ...]]] = {}

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
        found = self._compiled.get(key)
        if found is not None:
            compiled, constants = found
            compiled[grid](*tensors, *integers, *constants)
            return
        options: dict[str, object] = {"num_warps": warps, "num_stages": stages}
        if self.overlaps:
            constants = (*constants, overlaps(tensors[0].device))
            if constants[-1]:
                options["launch_pdl"] = True
        compiled = self._jit[grid](*tensors, *integers, *constants, **options)
        if compiled is not None:  # None under Triton's interpreter
            self._compiled[key] = compiled, constants


def kernel(
    *integers: str, overlaps: bool = False, jit: Callable[..., Any] = triton.jit
) -> Callable[[Callable[..., None]], Kernel]:
    """Decorates a kernel.

    Args:
        integers: names of its integer parameters that are not constants.
        overlaps: it may start before the kernel ahead of it has ended.
        jit: Triton's or Gluon's.
    """
    return lambda function: Kernel(function, integers, overlaps, jit)


def overlaps(device: torch.device) -> bool:
    """Whether kernels start before those ahead of them have ended: on a GPU of compute capability 9 or later."""
    return OVERLAP and device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)
