"""Property tests draw the same examples in every run, whatever the process has imported and run before."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st


def draw() -> list[int]:
    drawn: list[int] = []

    @settings(max_examples=200)
    @given(st.integers())
    def collect(number: int) -> None:
        drawn.append(number)

    collect()
    return drawn


@pytest.mark.skipif(not settings().derandomize, reason="new examples are wanted")
def test_what_is_imported_meanwhile_changes_no_example(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Hypothesis takes constants from the source of imported modules, and so from those of earlier tests."""
    before = draw()
    (tmp_path / "full_of_constants.py").write_text(f"VALUES = {[10**9 + 7 * i for i in range(1000)]}\n")
    monkeypatch.syspath_prepend(tmp_path)
    importlib.import_module("full_of_constants")
    assert draw() == before
