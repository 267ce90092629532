"""Imports torch while a process does other parts of its start."""

from __future__ import annotations

import contextlib
import importlib
import threading


def import_torch_early() -> None:
    """Imports torch in a thread. ``import torch`` waits for it.

    Until then, other threads may import nothing that torch imports too: two threads that import parts of one package
    in different orders can deadlock.
    """
    threading.Thread(target=_import_torch, name="torch-import", daemon=True).start()


def _import_torch() -> None:
    with contextlib.suppress(Exception):  # who needs torch imports it again, and reports why that fails
        importlib.import_module("torch")
