"""How torch's threads wait for each other on a CPU. Import it before torch."""

from __future__ import annotations

import os

# OpenMP's threads spin between two parallel regions. With one other busy process on two cores a decode step took
# 235 ms so, and 16 ms with threads that sleep (4-layer model, 3 requests at 4k tokens, 2-core AMD EPYC).
VARIABLE, VALUE = "OMP_WAIT_POLICY", "PASSIVE"


def wait_politely() -> None:
    """Makes the threads of this process sleep instead of spin, unless the user has chosen. No effect once torch is
    imported: OpenMP reads it once."""
    os.environ.setdefault(VARIABLE, VALUE)
