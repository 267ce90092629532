"""Tests that need a CUDA device: run them with ``make test-gpu``. Elsewhere they are skipped."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = Path(__file__).parent
    for item in items:
        if here in item.path.parents:
            item.add_marker(pytest.mark.gpu)
            if not torch.cuda.is_available():
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(scope="session")
def gpu_checkpoint(checkpoints: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """``gpu_checkpoint(family)``: a small random checkpoint with heads of 64 channels, which FlashInfer has kernels
    for."""
    built: dict[str, Path] = {}

    def folder(family: str) -> Path:
        if family not in built:
            built[family] = checkpoints.build(family, tmp_path_factory.mktemp("gpu") / family, head_dim=64)
        return built[family]

    return folder
