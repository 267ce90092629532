"""Steps captured as CUDA graphs: one launch instead of some four hundred.

A captured step has a `StepShape`; a step runs as the smallest shape that fits it. Chunks of prompts and decodes are
captured together, so a step that continues a few branches costs the host no more than one that only decodes. Larger
steps run eagerly: they keep the device busy for longer than their launches take.

A capture takes the host some 20 ms. Where chunks and decodes have joint shapes (`StepShape`) there are some 50, all of
them captured at start. Otherwise there is a shape for each pair of numbers, some 80. Those of pairs are captured when a
step first has them or while the engine is idle.
"""

from __future__ import annotations

import logging
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch

from ...kernels.attention.base import StepShape
from ..step import StepPlan

# No shape has 448 tokens: on an H200, cuBLAS multiplies as many in 12.9 ms a step of an 8B, and 512 in 9.6.
DECODES = (1, 2, 4, 8, 16, 32, 64, 96, 128, 160, 192, 224, 256, 320, 384, 512)
MIXED_DECODES = (16, 32, 64, 96, 128, 192, 256, 384, 512)
CHUNK_TOKENS = (32, 64, 128, 192, 256, 384, 512, 768, 1024)
# Up to about 200 tokens a step takes the time of reading the weights, however many it has; from there on padding costs.
# 832 tokens take cuBLAS as long as 896.
JOINT_TOKENS = (32, *range(64, 385, 64), *range(512, 769, 64), *range(896, 1025, 64), *range(1152, 2049, 128))
CHUNKS = 64  # the most chunks in a captured step, but for joint ones
WARM_UPS = 2  # runs before the first capture: kernels are compiled and libraries initialized on first use

logger = logging.getLogger(__name__)


class StepGraphs:
    """Captures shapes in one memory pool.

    Args:
        run: enqueues the step of a shape over its staged inputs. Its results must be in memory allocated before:
            memory that it allocates itself is reused by the shapes captured later.
        warm_up: runs every kernel of such a step: those that have not run yet are loaded, which a capture cannot do.
        prepare: stages a step of nothing but padding.
        max_requests: the most requests in a step.
        max_tokens: the most query tokens in a step.
        device: where steps run; the calling thread's current device.
        forms, joint: as in `AttentionBackend`.
        alone: a shape that cannot be captured runs eagerly from then on. Not where other ranks took part in the run
            that failed: they would stay inside it, so the error ends this rank.
    """

    def __init__(
        self,
        run: Callable[[StepShape], None],
        warm_up: Callable[[StepShape], None],
        prepare: Callable[[StepShape], None],
        max_requests: int,
        max_tokens: int,
        device: torch.device,
        forms: Callable[[StepShape], list[StepShape]] = lambda shape: [shape],
        joint: bool = False,
        alone: bool = True,
    ) -> None:
        self._alone = alone
        self._run, self._warm_up, self._prepare, self._device, self._forms = run, warm_up, prepare, device, forms
        self._decodes = _upto(DECODES, max_requests)
        self._mixed = _upto(MIXED_DECODES, max_requests)
        self._chunk_tokens = [n for n in CHUNK_TOKENS if n <= max_tokens]
        self._chunks = min(CHUNKS, max_requests)
        self._joint = [n for n in JOINT_TOKENS if n <= max_tokens] if joint else []
        self._max_requests = max_requests
        self._off = False  # whether the model itself cannot be captured
        self._captured: dict[StepShape, torch.cuda.CUDAGraph | None] = {}  # None: failed, runs eagerly
        self._missing = self.shapes()
        self._pool: Any = None
        self._stream: torch.cuda.Stream | None = None

    def shapes(self) -> list[StepShape]:
        """Every shape in each of its forms, the largest first: smaller ones fit into memory allocated for it."""
        decodes = [StepShape(n, 0, 0) for n in self._decodes]
        if self._joint:
            mixed = [self._joint_shape(tokens) for tokens in self._joint]
        else:
            mixed = [StepShape(n, tokens, self._chunks) for n in self._mixed for tokens in self._chunk_tokens]
        forms = [form for shape in decodes + mixed for form in self._forms(shape)]
        return sorted(forms, key=lambda shape: (shape.num_tokens, shape.num_outputs), reverse=True)

    def capture(self) -> None:
        """Captures the largest shapes, those without chunks and the joint ones. Called once, before the first step."""
        # A stream of this device: torch's default capture stream belongs to the device of the process's first capture.
        self._pool, self._stream = torch.cuda.graph_pool_handle(), torch.cuda.Stream(self._device)
        largest = replace(self._missing[0], tree=False)
        for shape in self.shapes():
            if self._off:
                return
            if replace(shape, tree=False) == largest:
                self._prepare(shape)
                for _ in range(WARM_UPS):
                    self._warm_up(shape)
                torch.cuda.synchronize(self._device)
                self._capture(shape)
            elif shape.joint or not shape.tokens:
                self.capture_missing(shape)

    def next_missing(self) -> StepShape | None:
        """A shape that is yet to be captured; None: all are."""
        while self._missing and self._missing[0] in self._captured:
            self._missing.pop(0)
        return self._missing[0] if self._missing and not self._off else None

    def capture_missing(self, shape: StepShape) -> None:
        """Captures the shape, which takes some 35 ms; the step staged before is lost."""
        self._prepare(shape)
        self._capture(shape, warm_up=True)

    def replay(self, shape: StepShape) -> None:
        """Runs the step that was staged last, in the form that `AttentionBackend.plan` returned.

        The first step of a shape runs eagerly, which compiles kernels that have not run yet. The shape is captured
        while the device computes that step.
        """
        graph = self._captured.get(shape)
        if graph is not None:
            graph.replay()
            return
        self._run(shape)
        if shape not in self._captured:
            self._capture(shape)

    def _capture(self, shape: StepShape, warm_up: bool = False) -> None:
        """Records the staged step. Not with `torch.cuda.graph`: it waits for the device and empties torch's caches."""
        graph = torch.cuda.CUDAGraph()
        try:
            if warm_up:
                self._warm_up(shape)
            with torch.cuda.stream(self._stream):
                # thread_local: other engines of this process may allocate and copy while this one captures.
                graph.capture_begin(self._pool, capture_error_mode="thread_local")
                try:
                    self._run(shape)
                finally:
                    graph.capture_end()
        except RuntimeError as error:  # mostly `torch.OutOfMemoryError`: other processes took what was reserved
            if not self._alone:
                raise
            if not self._captured and not isinstance(error, torch.OutOfMemoryError):
                self._off = True
                logger.warning("steps run eagerly, because the model cannot be captured in a CUDA graph: %s", error)
                return
            logger.warning("steps of %s run eagerly, because they could not be captured: %s", shape, error)
            self._captured[shape] = None
        else:
            self._captured[shape] = graph

    def shape_for(self, plan: StepPlan) -> StepShape | None:
        """The captured shape this step runs as, or None."""
        n = plan.num_decodes
        chunks, tokens = len(plan.rows) - n, plan.num_tokens - n
        if self._off or plan.prompt_logprobs or len(plan.samples) > len(plan.rows):
            return None
        if chunks and self._joint:
            total = _at_least(self._joint, plan.num_tokens)
            return None if total is None else self._joint_shape(total)
        if chunks > self._chunks:
            return None
        decodes = _at_least(self._mixed if chunks else self._decodes, n)
        chunk_tokens = _at_least(self._chunk_tokens, tokens) if chunks else 0
        if decodes is None or chunk_tokens is None:
            return None
        return StepShape(decodes, chunk_tokens, self._chunks if chunks else 0)

    def _joint_shape(self, tokens: int) -> StepShape:
        return StepShape(0, tokens, 0, joint=min(tokens, self._max_requests))


def largest_shape(max_requests: int) -> int:
    """Query tokens of the largest shape captured for steps of ``max_requests``."""
    return max(max(_upto(DECODES, max_requests)) + CHUNK_TOKENS[-1], JOINT_TOKENS[-1])


def _upto(sizes: Sequence[int], largest: int) -> list[int]:
    """The sizes below ``largest``, and ``largest`` itself, unless it is beyond them all."""
    found = [n for n in sizes if n < largest]
    return [*found, largest] if largest <= sizes[-1] else found


def _at_least(sizes: Sequence[int], n: int) -> int | None:
    i = bisect_left(sizes, n)
    return sizes[i] if i < len(sizes) else None
