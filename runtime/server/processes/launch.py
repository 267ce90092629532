"""The run directory: a private place for the sockets and for the settings that child processes read when they start."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import signal
import tempfile
from pathlib import Path
from typing import IO, Literal

import msgspec

from ...config import ServerConfig
from ...errors import LoadError
from .channels import MAX_PATH

EXIT_FAILED = 2  # exit code of a process that has sent its reason as a `Failed`

Role = Literal["tokenizer", "scheduler", "detokenizer"]
# The scheduler first: it has the most to import and to load.
ROLES: tuple[Role, ...] = ("scheduler", "detokenizer", "tokenizer")
_PREFIX = "branchwise-"
_LONGEST = f"/{_PREFIX}xxxxxxxx/detokenizer.sock"


class RunDirectory:
    """A new directory, mode 0700, in the temporary directory, or in /tmp where that path is too long for a socket's.

    Removes the directories of servers that were killed first.
    """

    def __init__(self, config: ServerConfig) -> None:
        try:
            base = tempfile.gettempdir()
        except OSError as error:
            raise LoadError("no temporary directory can be written to; set TMPDIR to one that can") from error
        if len(os.fsencode(base)) + len(_LONGEST) > MAX_PATH:
            base = "/tmp"
        remove_stale(Path(base))
        keyless = msgspec.structs.replace(
            config, api_key=None, api_key_file=None, extra_api_keys=(), admin_api_key=None, namespace_secret=None
        )
        try:
            with contextlib.ExitStack() as undo:
                self.path = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=base))  # mkdtemp: mode 0700
                undo.callback(shutil.rmtree, self.path, ignore_errors=True)
                self._lock = hold_lock(self.path, "http")
                undo.callback(self._lock.close)
                (self.path / "launch.json").write_bytes(msgspec.json.encode(keyless))
                undo.pop_all()
        except OSError as error:  # no space, no inodes, no permission
            raise LoadError(f"{base} cannot take the server's sockets: {error.strerror}; set TMPDIR") from error

    def remove(self) -> None:
        shutil.rmtree(self.path, ignore_errors=True)
        self._lock.close()


def read_launch(run_dir: Path) -> ServerConfig:
    """Reads the settings that `RunDirectory` wrote, in a child. Keys and secrets are left out: no child needs them."""
    return msgspec.json.decode((run_dir / "launch.json").read_bytes(), type=ServerConfig)


def hold_lock(run_dir: Path, name: str) -> IO[str]:
    """Locks a file in the run directory until it is closed or this process ends, however that ends. Holds our pid."""
    path = run_dir / f".{name}.lock"
    file = path.open("w")
    with contextlib.ExitStack() as undo:
        undo.callback(file.close)
        fcntl.flock(file, fcntl.LOCK_EX)
        file.write(str(os.getpid()))
        file.flush()
        path.rename(run_dir / f"{name}.lock")  # after locking: it must never be unlocked while its owner runs
        undo.pop_all()
    return file


def remove_stale(base: Path) -> None:
    """Removes this user's run directories in ``base`` whose server has ended without doing so, and kills what is left
    of its children: one that was stopped (SIGSTOP) or stuck when its server was killed could not end by itself."""
    for run_dir in base.glob(f"{_PREFIX}*"):
        with contextlib.suppress(OSError):
            if run_dir.is_symlink() or run_dir.stat().st_uid != os.getuid():
                continue
            if not (run_dir / "http.lock").exists() or _owner(run_dir, "http") is not None:
                continue
            for role in ROLES:
                pid = _owner(run_dir, role)
                if pid is not None:
                    os.kill(pid, signal.SIGKILL)
            shutil.rmtree(run_dir, ignore_errors=True)


def _owner(run_dir: Path, name: str) -> int | None:
    """The process that holds the lock: it is alive, so its pid has not been reused. None: it is not locked."""
    try:
        with (run_dir / f"{name}.lock").open() as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return int(file.read())
    except (FileNotFoundError, ValueError):
        pass
    return None
