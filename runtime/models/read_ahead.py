"""Reads a checkpoint's files from disk while torch is imported. No torch here."""

from __future__ import annotations

import contextlib
import os
import threading
from pathlib import Path

from ..errors import LoadError
from .folder import weight_files

MAX_BYTES = 2 << 30  # what a disk may read meanwhile. More might be dropped again before it is used
_CHUNK = 1 << 20  # Linux reads no more than its limit of one request for a call, 2 MiB or more on usual disks


def read_ahead(folder: Path) -> None:
    """Has the system read the weights in ``folder`` into its page cache, up to `MAX_BYTES`, in a thread.

    Files that are there already cost 5 ms a GB. Does nothing where the system cannot, and leaves a failure for the
    loader to report.
    """
    if hasattr(os, "posix_fadvise"):
        threading.Thread(target=_read, args=(folder,), name="read-ahead", daemon=True).start()


def _read(folder: Path) -> None:
    left = MAX_BYTES
    with contextlib.suppress(OSError, LoadError):
        for name in sorted(weight_files(folder)):  # a folder may hold a second copy of the weights, in Mistral's format
            with (folder / name).open("rb", buffering=0) as file:
                size = min(os.fstat(file.fileno()).st_size, left)
                for start in range(0, size, _CHUNK):
                    os.posix_fadvise(file.fileno(), start, _CHUNK, os.POSIX_FADV_WILLNEED)
            left -= size
