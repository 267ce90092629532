"""What a process can do of its start before it knows its settings, or while it imports torch."""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import re
import threading

_CUDA_DEVICE = re.compile(r"auto|cuda(?::(\d+))?")


def import_torch_early() -> None:
    """Imports torch in a thread. ``import torch`` waits for it.

    Until then, other threads may import nothing that torch imports too: two threads that import parts of one package
    in different orders can deadlock.
    """
    threading.Thread(target=_import_torch, name="torch-import", daemon=True).start()


def _import_torch() -> None:
    with contextlib.suppress(Exception):  # who needs torch imports it again, and reports why that fails
        importlib.import_module("torch")


def create_cuda_context(device: str) -> None:
    """Creates the context of the GPU that ``device`` (as in `EngineConfig`) names, for torch to use later. Takes 0.3 to
    0.6 s, without the GIL. Does nothing where there is no GPU, and leaves a failure for torch to report."""
    named = _CUDA_DEVICE.fullmatch(device)
    if named is None:
        return
    with contextlib.suppress(OSError):  # no driver
        driver = ctypes.CDLL("libcuda.so.1")
        handle, context = ctypes.c_int(), ctypes.c_void_p()
        if driver.cuInit(0) == 0 and driver.cuDeviceGet(ctypes.byref(handle), int(named[1] or 0)) == 0:
            driver.cuDevicePrimaryCtxRetain(ctypes.byref(context), handle)
