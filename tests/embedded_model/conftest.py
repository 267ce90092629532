"""The example's folder is no package of Branchwise: its `corpus` is importable as it is for the scripts beside it."""

from __future__ import annotations

import sys
from pathlib import Path

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "embedded_model"
if str(EXAMPLE) not in sys.path:
    sys.path.insert(0, str(EXAMPLE))
