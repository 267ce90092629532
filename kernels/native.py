"""Compiles `native.c` for a processor with AVX512 and loads it: kernels for the few rows of a decode step.

`start` compiles in a thread, with the C compiler that is on the path, once for each source, compiler and processor; the
library stays in the user's cache folder. Until it is there, and without a compiler, callers run torch, which specifies
every function. ``BRANCHWISE_NATIVE=off`` leaves it at that.
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import platform
import shutil
import signal
import stat
import subprocess
import tempfile
import threading
from ctypes import c_float, c_long, c_void_p
from pathlib import Path

import torch

logger = logging.getLogger(__name__)

ROWS = 16  # the most rows of the elementwise kernels: for more, torch's are as fast
LANES = 16  # rows are multiples of it; those of int8 of four times as much
SWITCH = "BRANCHWISE_NATIVE"
_SOURCE = Path(__file__).with_name("native.c")
_COMPILERS = ("cc", "gcc", "clang")
_FLAGS = ("-std=gnu11", "-O3", "-march=native", "-shared", "-fPIC", "-fvisibility=default")
_COMPILE_SECONDS = 120
_OUTPUT_BYTES = 4096  # of a compiler's messages that are logged
_NICENESS = 10


class Layer(ctypes.Structure):
    """``Layer`` of native.c."""

    _fields_ = (
        *((name, c_void_p) for name in ("keys", "values", "sinks")),
        *((name, c_long) for name in ("page_size", "heads", "kv_heads", "dim", "bf16")),
        *((name, c_float) for name in ("scale", "softcap")),
    )


class Plan(ctypes.Structure):
    """``Plan`` of native.c."""

    _fields_ = (
        *((name, c_void_p) for name in ("table", "queries", "first", "count", "row", "start", "stop")),
        *((name, c_long) for name in ("columns", "shared", "own")),
    )


_P, _N, _F = c_void_p, c_long, c_float
_FUNCTIONS = {
    "set_team": (_P,),
    "add_rms_norm": (_P, _P, _P, _F, _N, _N, _N, _P, _P, _P),
    "silu_mul": (_P, _N, _N, _N, _P, _P, _P),
    "rope_write": (_P, *(_N,) * 5, _P, _P, _N, _P, _F, _N, _P, _P, _P, _N),
    "linear": (*(_P,) * 4, *(_N,) * 3, *(_P,) * 3, _N),
    "attention": (_P, _P, _P, _N, _P, _P, _N),
}

_lock = threading.Lock()
_builder: threading.Thread | None = None
_library: ctypes.CDLL | None = None


def library() -> ctypes.CDLL | None:
    """The library with the functions of native.c; None: run torch."""
    return _library


def start() -> None:
    """Compiles and loads the library in a thread, once a process, unless it is switched off."""
    global _builder
    with _lock:
        if _builder is None and not _switched_off():
            _builder = threading.Thread(target=_build, name="native-build", daemon=True)
            _builder.start()


def building() -> bool:
    """Whether `start` is still at work."""
    return _builder is not None and _builder.is_alive()


def expected() -> bool:
    """Whether there is a library, or will be one."""
    return _library is not None or (not _switched_off() and problem() is None)


def problem() -> str | None:
    """Why there can be no library here; None if there can."""
    if torch.backends.cpu.get_cpu_capability() != "AVX512":
        return "the processor has no AVX512"
    return None if _compiler() else f"no C compiler is on the path ({', '.join(_COMPILERS)})"


def describe() -> str:
    """What `start` would do here, for people."""
    reason, compiler = f"{SWITCH} is off" if _switched_off() else problem(), _compiler()
    if reason is not None or compiler is None:
        return f"no: {reason}"
    try:
        path = library_path(compiler)
    except (OSError, RuntimeError, subprocess.SubprocessError) as error:  # RuntimeError: of a user without a home
        return f"no: {error}"
    return f"yes, {path}" if path.exists() else f"yes, once {compiler} has compiled them while the first server runs"


def load() -> ctypes.CDLL:
    """The library, compiled unless the cache has it. Raises `OSError`, `RuntimeError` or `SubprocessError`."""
    reason, compiler = problem(), _compiler()
    if reason is not None or compiler is None:
        raise RuntimeError(reason)
    path = library_path(compiler)
    if not path.exists():
        compile_library(compiler, path)
    _check_private(path)
    found = ctypes.CDLL(str(path))
    for name, arguments in _FUNCTIONS.items():
        function = getattr(found, name, None)
        if function is None:
            raise RuntimeError(f"{path} has no function {name}: remove it")
        function.argtypes, function.restype = arguments, None
    found.set_team(_torch_team())
    return found


def _build() -> None:
    global _library
    try:
        _library = load()
        logger.info("compiled kernels compute small steps")
    except (OSError, RuntimeError, subprocess.SubprocessError) as error:
        logger.info("torch computes small steps: compiled kernels are not available: %s", error)


def _switched_off() -> bool:
    return os.environ.get(SWITCH, "").lower() in ("off", "0", "no", "false")


def _compiler() -> str | None:
    return next((found for found in map(shutil.which, _COMPILERS) if found), None)


def library_path(compiler: str) -> Path:
    """Where the library for this source, compiler and processor is or belongs. Makes the folder, which only its owner
    can enter. Raises `OSError` where that is not so."""
    version = subprocess.run(
        [compiler, "--version"], stdin=subprocess.DEVNULL, capture_output=True, timeout=_COMPILE_SECONDS, check=True
    ).stdout
    parts = (_SOURCE.read_bytes(), " ".join(_FLAGS).encode(), version, _processor())
    name = hashlib.sha256(b"\0".join(parts)).hexdigest()[:32]
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "branchwise"
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    _check_private(folder)
    return folder / f"native-{name}.so"


def compile_library(compiler: str, path: Path) -> None:
    """Compiles native.c to ``path``, under a temporary name until it is whole. Raises `RuntimeError` with the
    compiler's first messages."""
    with tempfile.TemporaryDirectory(dir=path.parent) as folder, tempfile.TemporaryFile() as messages:
        made = Path(folder) / path.name
        command = [compiler, *_FLAGS, "-o", path.name, str(_SOURCE), "-lm"]
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=messages,
            stderr=messages,
            cwd=folder,
            start_new_session=True,
        )
        try:  # with its group: the command runs the compiler proper as another process
            niceness = max(_NICENESS, os.getpriority(os.PRIO_PROCESS, 0))  # only root may lower it
            os.setpriority(os.PRIO_PGRP, process.pid, niceness)
            code = process.wait(timeout=_COMPILE_SECONDS)
        except BaseException:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            raise
        messages.seek(0)
        said = messages.read(_OUTPUT_BYTES).decode(errors="replace").strip()
        logger.debug("%s: %s", " ".join(command), said)
        if code:
            raise RuntimeError(f"{compiler} failed with exit status {code}: {said[:200]}")
        made.chmod(0o700)
        with made.open("rb") as file:
            os.fsync(file.fileno())  # after a power failure, a part of a library would end each process that loads it
        made.replace(path)


def _check_private(path: Path) -> None:
    """Raises `OSError` unless ``path`` is this user's, and no link, and others cannot write to it."""
    found = path.lstat()
    if stat.S_ISLNK(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o022:
        raise OSError(f"{path} is not this user's alone")


def _processor() -> bytes:
    """What ``-march=native`` depends on: the processor's model and flags."""
    try:
        lines = Path("/proc/cpuinfo").read_bytes().split(b"\n\n")[0].splitlines()
    except OSError:
        return platform.processor().encode()
    kept = (b"flags", b"Features", b"model", b"vendor_id", b"CPU ", b"cpu family", b"stepping")
    return b"\n".join(line for line in lines if line.startswith(kept))


def _torch_team() -> int | None:
    """The address of ``GOMP_parallel`` of the OpenMP library that torch has loaded, so that its threads are used; None
    where it has another: then one thread computes."""
    for found in (Path(torch.__file__).parent / "lib").glob("libgomp*"):
        return ctypes.cast(ctypes.CDLL(str(found)).GOMP_parallel, c_void_p).value
    return None
