"""People's type checkers know what an engine answers."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
# mypy would spend most of its time on other packages and on rooms whose types the program does not use.
SETTINGS = """
[mypy]
strict = true
follow_imports = silent
ignore_missing_imports = true
[mypy-torch.*,numpy.*,fastapi.*,pydantic.*,transformers.*,huggingface_hub.*,jinja2.*,aiohttp.*,uvicorn.*,markdown_it.*]
follow_imports = skip
[mypy-branchwise.kernels.*,branchwise.runtime.executor.*,branchwise.runtime.models.*,branchwise.runtime.server.http.*]
follow_imports = skip
"""


def test_types_follow_from_what_is_asked(tmp_path: Path) -> None:
    (tmp_path / "mypy.ini").write_text(SETTINGS)
    (tmp_path / "branchwise").symlink_to(HERE.parents[1])  # the package by its name: mypy knows no editable installs
    (tmp_path / "program.py").write_text((HERE / "typed_use.py").read_text())
    done = subprocess.run(
        [sys.executable, "-m", "mypy", "--cache-dir", "cache", "program.py"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        timeout=240,
    )
    assert done.returncode == 0, done.stdout + done.stderr
