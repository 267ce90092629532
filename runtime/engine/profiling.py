"""Profiling steps: torch's profiler around the engine's loop, behind ``--profile``."""

from __future__ import annotations

import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ..errors import InvalidRequest, LoadError, why

TOP_KERNELS = 20


class StepProfiler:
    """Records from `start` to `stop`. Each recording is a Chrome trace in ``folder`` (chrome://tracing, Perfetto).

    One recording at a time, and of a few seconds only: a trace of 1,000 steps has about a million events.
    """

    def __init__(self, folder: Path) -> None:
        """Makes the folder. Raises `LoadError` if it cannot be one."""
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise LoadError(f"--profile {folder} cannot be used: {why(error, folder)}") from error
        self._folder = folder
        self._recording: Any = None
        self._steps = 0

    def start(self, steps: int) -> None:
        """Raises `InvalidRequest` (409) if a recording is under way. ``steps``: the engine's step count."""
        from torch.profiler import ProfilerActivity, profile

        if self._recording is not None:
            raise InvalidRequest(None, "a recording is under way: stop it first", status=409)
        recording = profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA])
        recording.start()
        self._recording, self._steps = recording, steps

    def stop(self, steps: int) -> dict[str, Any]:
        """Ends the recording and writes its trace.

        Returns the file and the number of steps; the seconds from the first kernel to the last, those in which the
        device computed, and its idle share; and the slowest kernels with their seconds and launches. Raises
        `InvalidRequest` (409) if no recording is under way.
        """
        if self._recording is None:
            raise InvalidRequest(None, "no recording is under way", status=409)
        from torch.autograd import DeviceType

        recording, self._recording = self._recording, None
        recording.stop()
        path = self._folder / f"trace-{time.strftime('%Y%m%d-%H%M%S')}.json.gz"
        recording.export_chrome_trace(str(path))
        # The names that steps have in a trace span their kernels and the gaps between these.
        kernels = [
            row for row in recording.key_averages() if row.device_type == DeviceType.CUDA and not row.is_user_annotation
        ]
        kernels.sort(key=lambda row: -row.self_device_time_total)
        # From the first kernel to the end of the last: starting and stopping the profiler takes time too.
        ranges = [
            event.time_range
            for event in recording.events()
            if event.device_type == DeviceType.CUDA and not event.is_user_annotation
        ]
        seconds = (max(r.end for r in ranges) - min(r.start for r in ranges)) / 1e6 if ranges else 0.0
        busy = covered((r.start, r.end) for r in ranges) / 1e6
        return {
            "trace": str(path),
            "steps": steps - self._steps,
            "seconds": seconds,
            "device_seconds": busy,
            "device_idle_share": max(0.0, 1 - busy / seconds) if seconds else None,
            "kernels": [
                {"name": row.key, "seconds": row.self_device_time_total / 1e6, "launches": row.count}
                for row in kernels[:TOP_KERNELS]
            ],
        }


def covered(ranges: Iterable[tuple[float, float]]) -> float:
    """Length of the union of (start, end) ranges: kernels of several streams run side by side."""
    total, reached = 0.0, float("-inf")
    for start, end in sorted(ranges):
        total += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return total
