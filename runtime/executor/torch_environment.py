"""Environment variables that torch reads once, when it is imported. Import this before torch."""

from __future__ import annotations

import os

_SETTINGS = {
    # By default, OpenMP's threads spin between parallel regions. With another busy process on two cores a decode step
    # then took 235 ms, and 16 ms with threads that sleep (4-layer model, 3 requests at 4k tokens, 2-core AMD EPYC).
    "OMP_WAIT_POLICY": "PASSIVE",
    # oneDNN caches what it compiles for each number of rows, 1,024 of them by default: a server, whose steps have all
    # numbers of tokens, grew by 450 MB. A model has a handful of matrix shapes, so 64 is enough for several steps.
    "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "64",
    "LRU_CACHE_CAPACITY": "64",  # the same, in the layer between torch and oneDNN
}


def prepare_torch() -> None:
    """Sets the variables that the user has not set. No effect on a torch that is already imported."""
    for name, value in _SETTINGS.items():
        os.environ.setdefault(name, value)
