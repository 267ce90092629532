"""Which bytes of a checkpoint are read while torch is imported."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from branchwise.runtime.models import read_ahead

pytestmark = pytest.mark.skipif(not hasattr(os, "posix_fadvise"), reason="the system has no posix_fadvise")


def test_the_first_bytes_of_all_weights_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(read_ahead, "_CHUNK", 4)
    monkeypatch.setattr(read_ahead, "MAX_BYTES", 18)
    for name, size in (("model-2.safetensors", 50), ("model-1.safetensors", 10), ("consolidated.safetensors", 9)):
        (tmp_path / name).write_bytes(bytes(size))
    index = {"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors", "c": "model-1.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    asked: list[tuple[str, int]] = []

    def advise(descriptor: int, start: int, length: int, advice: int) -> None:
        assert (length, advice) == (4, os.POSIX_FADV_WILLNEED)
        asked.append((Path(f"/proc/self/fd/{descriptor}").readlink().name, start))

    monkeypatch.setattr(os, "posix_fadvise", advise)
    read_ahead._read(tmp_path)
    first, second = "model-1.safetensors", "model-2.safetensors"
    assert asked == [(first, 0), (first, 4), (first, 8), (second, 0), (second, 4)]


def test_a_folder_that_cannot_be_read_is_left_to_the_loader(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").mkdir()
    read_ahead._read(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text("{")
    read_ahead._read(tmp_path)
    read_ahead._read(tmp_path / "absent")
