"""What torch reads from the environment, once, when it is imported. Import this before torch."""

from __future__ import annotations

import os

_SETTINGS = {
    # OpenMP's threads spin between two parallel regions. With one other busy process on two cores a decode step took
    # 235 ms so, and 16 ms with threads that sleep (4-layer model, 3 requests at 4k tokens, 2-core AMD EPYC).
    "OMP_WAIT_POLICY": "PASSIVE",
    # oneDNN keeps what it compiled for each number of rows it has met, 1,024 of them by default: a server, whose steps
    # have every number of tokens, grew by 450 MB. A model has a handful of matrix shapes, so this holds several steps'.
    "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "64",
    "LRU_CACHE_CAPACITY": "64",  # the same, in the layer between torch and oneDNN
}


def prepare_torch() -> None:
    """Sets what the user has not set. No effect on a torch that is already imported."""
    for name, value in _SETTINGS.items():
        os.environ.setdefault(name, value)
