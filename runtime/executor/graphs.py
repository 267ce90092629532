"""Steps captured as CUDA graphs: one launch instead of some four hundred.

A captured step has a `StepShape`; a step runs as the smallest shape that fits it. Chunks of prompts and decodes are
captured together, so a step that continues a few branches costs the host no more than one that only decodes. Larger
steps run eagerly: they keep the device busy for longer than their launches take.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence

import torch

from ...kernels.attention.base import StepShape
from ..step import StepPlan

DECODES = (1, 2, 4, 8, 16, 24, 32, 48, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320, 384, 448, 512)
MIXED_DECODES = (16, 32, 64, 96, 128, 192, 256, 384, 512)
CHUNK_TOKENS = (32, 64, 128, 192, 256, 384, 512, 768, 1024)
CHUNKS = 64  # the most chunks in a captured step
WARM_UPS = 2  # runs before the first capture: kernels are compiled and libraries initialized on first use


class StepGraphs:
    """Captures every shape at once, largest first, in one memory pool.

    Args:
        run: enqueues the step of a shape over its staged inputs. Its results must be in memory allocated before:
            memory that it allocates itself is reused by the shapes captured later.
        prepare: stages a step of nothing but padding.
        max_requests: the most requests in a step.
        max_tokens: the most query tokens in a step.
        device: where steps run; the calling thread's current device.
        forms: the forms in which a shape is captured (`AttentionBackend.forms`).
    """

    def __init__(
        self,
        run: Callable[[StepShape], None],
        prepare: Callable[[StepShape], None],
        max_requests: int,
        max_tokens: int,
        device: torch.device,
        forms: Callable[[StepShape], list[StepShape]] = lambda shape: [shape],
    ) -> None:
        self._run, self._prepare, self._device, self._forms = run, prepare, device, forms
        self._decodes = _upto(DECODES, max_requests)
        self._mixed = _upto(MIXED_DECODES, max_requests)
        self._chunk_tokens = [n for n in CHUNK_TOKENS if n <= max_tokens]
        self._chunks = min(CHUNKS, max_requests)
        self._captured: dict[StepShape, torch.cuda.CUDAGraph] = {}

    def shapes(self) -> list[StepShape]:
        """Largest first, so that smaller ones fit into memory that is already allocated."""
        decodes = [StepShape(n, 0, 0) for n in self._decodes]
        mixed = [StepShape(n, tokens, self._chunks) for n in self._mixed for tokens in self._chunk_tokens]
        forms = [form for shape in decodes + mixed for form in self._forms(shape)]
        return sorted(forms, key=lambda shape: (shape.num_tokens, shape.num_outputs), reverse=True)

    def capture(self) -> None:
        """Called once, before the first step. Kernels that have not run yet are compiled here, not during a request."""
        # A stream of this device: torch's default capture stream belongs to the device of the process's first capture.
        pool, stream = torch.cuda.graph_pool_handle(), torch.cuda.Stream(self._device)
        ran_trees = False
        for i, shape in enumerate(self.shapes()):
            self._prepare(shape)
            if i == 0:
                for _ in range(WARM_UPS):
                    self._run(shape)
            if not (shape.tree and ran_trees):  # kernels that differ between shapes have run in the other form
                self._run(shape)
            ran_trees |= shape.tree
            torch.cuda.synchronize(self._device)
            graph = torch.cuda.CUDAGraph()
            # thread_local: other engines of this process may allocate and copy while this one captures.
            with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
                self._run(shape)
            self._captured[shape] = graph

    def shape_for(self, plan: StepPlan) -> StepShape | None:
        """The captured shape this step runs as, or None."""
        n = plan.num_decodes
        chunks, tokens = len(plan.rows) - n, plan.num_tokens - n
        if plan.prompt_logprobs or chunks > self._chunks or len(plan.samples) > len(plan.rows):
            return None
        decodes = _at_least(self._mixed if chunks else self._decodes, n)
        chunk_tokens = _at_least(self._chunk_tokens, tokens) if chunks else 0
        if decodes is None or chunk_tokens is None:
            return None
        return StepShape(decodes, chunk_tokens, self._chunks if chunks else 0)

    def replay(self, shape: StepShape) -> None:
        """Runs the step that was staged last, in the form that `AttentionBackend.plan` returned."""
        self._captured[shape].replay()


def largest_shape(max_requests: int) -> int:
    """Query tokens of the largest shape captured for steps of ``max_requests``."""
    return max(_upto(DECODES, max_requests)) + CHUNK_TOKENS[-1]


def _upto(sizes: Sequence[int], largest: int) -> list[int]:
    """The sizes below ``largest``, and ``largest`` itself, unless it is beyond them all."""
    found = [n for n in sizes if n < largest]
    return [*found, largest] if largest <= sizes[-1] else found


def _at_least(sizes: Sequence[int], n: int) -> int | None:
    i = bisect_left(sizes, n)
    return sizes[i] if i < len(sizes) else None
