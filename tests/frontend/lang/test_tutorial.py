"""The tutorial in docs/language.md is a program: it runs, and says what it should."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import branchwise as bw

ROOT = Path(__file__).resolve().parents[3]
PAGE = (ROOT / "docs" / "language.md").read_text()


def test_the_tutorial_runs() -> None:
    code = "\n".join(re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL))
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=240,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stderr == ""
    first, cached, chosen, *rest = done.stdout.splitlines()
    assert first == "Mira is the baker of Fernhollow. She lives next to the market square."
    assert cached == "0 of 14 prompt tokens were cached"
    assert chosen == "The baker of Fernhollow is Mira."
    assert [line.split()[0] for line in rest[:5]] == ["Mira", "Tobin", "Sol", "Rook", "Wren"]
    assert rest[5].startswith("Hesper is the librarian")
    assert "12 + 30 = 42" in rest[6]
    assert "= 24" in rest[7]


def test_the_names_it_uses_exist() -> None:
    for name in set(re.findall(r"\bbw\.(\w+)", PAGE)):
        assert hasattr(bw, name), name
    for path in re.findall(r"`((?:tests|examples)/[\w./]*)`", PAGE):
        assert (ROOT / path).exists(), path
