"""Recordings of the engine's steps."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from branchwise.runtime.engine.profiling import StepProfiler, covered
from branchwise.runtime.errors import InvalidRequest


def test_a_recording_is_a_chrome_trace(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    profiler = StepProfiler(tmp_path / "traces")
    with pytest.raises(InvalidRequest, match="no recording is under way"):
        profiler.stop(0)
    profiler.start(10)
    with pytest.raises(InvalidRequest, match="a recording is under way"):
        profiler.start(11)
    torch.ones(64, 64) @ torch.ones(64, 64)
    report = profiler.stop(13)
    assert report["steps"] == 3
    if not torch.cuda.is_available():
        assert report["seconds"] == 0.0 and report["device_idle_share"] is None
    with gzip.open(report["trace"]) as file:
        assert any("aten::mm" in event.get("name", "") for event in json.load(file)["traceEvents"])
    profiler.start(13)
    assert profiler.stop(14)["steps"] == 1


def test_kernels_side_by_side_are_counted_once() -> None:
    assert covered([(0.0, 4.0), (2.0, 3.0), (6.0, 9.0), (3.5, 5.0)]) == 8.0
    assert covered([]) == 0.0


def test_the_names_of_steps_are_not_kernels(tmp_path: Path) -> None:
    """A named step spans its kernels and the gaps between them: counted, it would hide that the device was idle."""
    torch = pytest.importorskip("torch")

    def event(name: str, start: float, end: float, named: bool = False) -> SimpleNamespace:
        return SimpleNamespace(
            key=name,
            device_type=torch.autograd.DeviceType.CUDA,
            is_user_annotation=named,
            self_device_time_total=end - start,
            count=1,
            time_range=SimpleNamespace(start=start, end=end),
        )

    found = [event("step: decode 8", 0.0, 10.0, named=True), event("attend", 0.0, 4.0), event("merge", 9.0, 10.0)]
    profiler = StepProfiler(tmp_path)
    profiler._recording = SimpleNamespace(
        stop=lambda: None, export_chrome_trace=lambda path: None, key_averages=lambda: found, events=lambda: found
    )
    report = profiler.stop(1)
    assert [kernel["name"] for kernel in report["kernels"]] == ["attend", "merge"]
    assert report["device_idle_share"] == pytest.approx(0.5)
