"""What a process can do of its start before it knows its settings, or while it imports torch."""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import re
import sys
import threading
from collections.abc import Iterator
from types import ModuleType

_DRIVER = "libcuda.so.1"
_META_KERNELS = "torch._meta_registrations"
_CUDA_DEVICE = re.compile(r"auto|cuda(?::(\d+))?")


def import_torch_early() -> None:
    """Imports torch in a thread. ``import torch`` waits for it.

    Until then, other threads may import nothing that torch imports too: two threads that import parts of one package
    in different orders can deadlock.
    """
    threading.Thread(target=_import_torch, name="torch-import", daemon=True).start()


def _import_torch() -> None:
    with contextlib.suppress(Exception), _without_meta_kernels():  # `load_engine` reports why it fails
        importlib.import_module("torch")


@contextlib.contextmanager
def _without_meta_kernels() -> Iterator[None]:
    """Leaves them out of ``import torch`` on a machine without a GPU: a third of its CPU time, 0.3 s.

    These kernels compute shapes alone, for `torch.compile`, `torch.export` and tensors on the device ``meta``. Where
    they are needed, ``import torch._meta_registrations`` comes first: other parts of torch fail to import without. Here
    that is before transformers and torch's profiler.
    """
    if "torch" in sys.modules or _driver() is not None:
        yield
        return
    stub = ModuleType(_META_KERNELS)
    sys.modules[_META_KERNELS] = stub
    try:
        yield
    finally:
        if sys.modules.get(_META_KERNELS) is stub:
            del sys.modules[_META_KERNELS]
        vars(sys.modules.get("torch", stub)).pop("_meta_registrations", None)


def _driver() -> ctypes.CDLL | None:
    try:
        return ctypes.CDLL(_DRIVER)
    except OSError:
        return None


def create_cuda_context(device: str) -> None:
    """Creates the context of the GPU that ``device`` (as in `EngineConfig`) names, for torch to use later. Takes 0.3 to
    0.6 s, without the GIL. Does nothing where there is no GPU, and leaves a failure for torch to report."""
    named = _CUDA_DEVICE.fullmatch(device)
    if named is None:
        return
    driver = _driver()
    if driver is None:
        return
    handle, context = ctypes.c_int(), ctypes.c_void_p()
    if driver.cuInit(0) == 0 and driver.cuDeviceGet(ctypes.byref(handle), int(named[1] or 0)) == 0:
        driver.cuDevicePrimaryCtxRetain(ctypes.byref(context), handle)
