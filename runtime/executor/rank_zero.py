"""Rank 0 of a model that is split over several processes: hands each step to the others, and runs its own part."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import TimeoutError
from contextlib import ExitStack, contextmanager

import msgspec
import torch

from ..config import EngineConfig
from ..errors import EngineDead
from ..models.loader import Progress
from ..parallel.connect import connect
from ..parallel.group import TensorGroup
from ..parallel.place import Place
from ..parallel.ranks import BEAT, CAPTURE, COPIES, Ranks
from ..step import StepPlan
from ..step_codec import encode
from .device import pick_device
from .executor import LaunchedStep, ModelExecutor
from .startup_times import StartupTimes

_REASON_SECONDS = 0.5  # how long the end of a rank may take to be noticed, after a collective with it has failed


class RankZero:
    """Implements `runtime.step.Executor`. A step is planned and sampled here; the other ranks hold no policy.

    A step that fails on one rank leaves the others inside it, so the first failure ends them all: `Ranks.failed`, and
    `EngineDead` here.
    """

    def __init__(self, local: ModelExecutor, ranks: Ranks) -> None:
        self.local, self.ranks, self.size = local, ranks, ranks.size
        self.num_pages, self.page_size, self.vocab_size = local.num_pages, local.page_size, local.vocab_size

    @classmethod
    def load(cls, config: EngineConfig, ranks: Ranks, progress: Progress | None, times: StartupTimes) -> RankZero:
        """Loads this rank's part of the model, while the other ranks load theirs.

        Raises `LoadError`: one line with the rank, the problem and its fix.
        """

        def meet(device: torch.device) -> TensorGroup:
            ranks.wait("loaded")
            return connect(ranks.store, 0, ranks.size, device)

        config = msgspec.structs.replace(config, device=str(pick_device(config)))
        ranks.start(config)
        local = ModelExecutor.load(config, progress, times, Place(0, ranks.size, meet))
        with ExitStack() as undo:
            if local.host is not None:
                undo.callback(local.host.close)
            ranks.wait("ready")
            undo.pop_all()
        return cls(local, ranks)

    def launch(self, plan: StepPlan) -> LaunchedStep:
        """See `runtime.step.Executor`."""
        with self._failing():
            self.ranks.send(encode(plan))
            return self.local.launch(plan)

    def prepare_next(self) -> bool:
        """See `runtime.step.Executor`. All ranks capture the same shape, since they run it together first."""
        shape = self.local.next_capture()
        if shape is None:
            return False
        with self._failing():
            self.ranks.send(CAPTURE + msgspec.json.encode(shape))
            self.local.capture(shape)
        return True

    def send_copies(self, message: bytes) -> None:
        """See `runtime.tiers.split.Link`."""
        with self._failing():
            self.ranks.send(COPIES + message)

    def copy_reports(self) -> list[tuple[int, bytes]]:
        """See `runtime.tiers.split.Link`."""
        return self.ranks.copy_reports()

    def beat(self) -> None:
        """See `runtime.step.Executor`."""
        with self._failing():
            self.ranks.send(BEAT)
            self.local.beat()

    def close(self) -> None:
        """Ends the other ranks, and frees this one's memory."""
        self.ranks.close()
        self.local.close()

    @contextmanager
    def _failing(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            try:
                why = self.ranks.failed.result(_REASON_SECONDS)
            except TimeoutError:
                why = f"a step failed on rank 0: {type(error).__name__}: {error}"
                self.ranks.fail(why)
            raise EngineDead(why) from error
