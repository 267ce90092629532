"""The suites of the ``openai`` package once more, with the older of its two majors."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import openai
import pytest

HERE = Path(__file__).resolve().parent
OLDER = Path(sys.prefix) / "openai-2"
SUITES = [HERE / name for name in ("test_openai_chat.py", "test_openai_completions.py", "test_openai_responses.py")]


@pytest.mark.skipif(not OLDER.is_dir(), reason=f"openai 2 is not there: `make test` installs it into {OLDER}")
def test_the_older_major_of_the_package_finds_the_same(shipped: Any) -> None:
    """In a pytest of its own, which imports the older package and borrows this one's server."""
    assert int(openai.__version__.split(".")[0]) > 2, "the suites themselves have run with the newer one"
    environment = {
        **os.environ,
        "PYTHONPATH": str(OLDER),
        "BRANCHWISE_TEST_OPENAI": "2.",
        "BRANCHWISE_TEST_SERVER": json.dumps(shipped.info),
    }
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--tb=short", *SUITES],
        cwd=HERE.parent.parent,
        env=environment,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert re.search(r"\b[1-9]\d+ passed\b", done.stdout) and "skipped" not in done.stdout, done.stdout
