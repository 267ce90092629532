"""Torch as the scheduler's process imports it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

IMPORT = """
import sys
from branchwise.runtime.parallel import early_torch
early_torch._driver = lambda: {driver}
early_torch._import_torch()
import torch
"""
LATER = """
assert "torch._meta_registrations" not in sys.modules and not hasattr(torch, "_meta_registrations")
assert "torch._decomp" not in sys.modules  # what takes the time
assert torch.mm(torch.ones(2, 3), torch.ones(3, 2)).tolist() == [[3, 3], [3, 3]]
import torch._meta_registrations
"""
COMPLETE = """
x = torch.ones(1, 1, 4, device="meta")
assert torch.conv1d(x, x[..., :2]).shape == (1, 1, 3)  # a kernel of that module
"""


PROFILE = """
from pathlib import Path
from branchwise.runtime.engine.profiling import StepProfiler
profiler = StepProfiler(Path("."))
profiler.start(0)
assert torch.ones(2).sum() == 2
assert profiler.stop(1)["steps"] == 1
"""

TRANSFORMERS = """
from branchwise.runtime.models.folder import SHIPPED
from branchwise.runtime.models.hf.config import load_transformers_config
assert load_transformers_config(SHIPPED).num_layers == 8
"""


def run(program: str) -> None:
    subprocess.run([sys.executable, "-c", program], check=True)


def test_meta_kernels_are_imported_on_demand_without_a_gpu() -> None:
    run(IMPORT.format(driver=None) + LATER + COMPLETE)


def test_steps_can_be_profiled_without_a_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    run(IMPORT.format(driver=None) + PROFILE)


def test_models_of_transformers_are_built_without_a_gpu() -> None:
    run(IMPORT.format(driver=None) + TRANSFORMERS)


def test_meta_kernels_are_imported_with_torch_beside_a_driver() -> None:
    run(IMPORT.format(driver="object()") + COMPLETE)
