"""The run directory: a private place for the sockets and for what the children are told."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path
from typing import Literal

import msgspec

from ...config import ServerConfig
from ...errors import LoadError
from .channels import MAX_PATH

Role = Literal["tokenizer", "scheduler", "detokenizer"]
# The scheduler first: it has the most to import and to load.
ROLES: tuple[Role, ...] = ("scheduler", "detokenizer", "tokenizer")
_LONGEST = "/branchwise-xxxxxxxx/detokenizer.sock"


class Launch(msgspec.Struct, frozen=True):
    """What every child reads when it starts. API keys are none of their business and are not written."""

    parent: int  # process id
    config: ServerConfig


class RunDirectory:
    """A fresh directory, mode 0700. Paths of Unix sockets are short, so a long TMPDIR falls back to /tmp."""

    def __init__(self, config: ServerConfig) -> None:
        try:
            base = tempfile.gettempdir()
        except OSError as error:
            raise LoadError("no temporary directory can be written to; set TMPDIR to one that can") from error
        if len(os.fsencode(base)) + len(_LONGEST) > MAX_PATH:
            base = "/tmp"
        self.path = Path(tempfile.mkdtemp(prefix="branchwise-", dir=base))  # mkdtemp: mode 0700
        keyless = msgspec.structs.replace(
            config, api_key=None, api_key_file=None, extra_api_keys=(), admin_api_key=None
        )
        launch = Launch(os.getpid(), keyless)
        (self.path / "launch.json").write_bytes(msgspec.json.encode(launch))

    def remove(self) -> None:
        shutil.rmtree(self.path, ignore_errors=True)


def read_launch(run_dir: Path) -> Launch:
    """What `RunDirectory` wrote, as a child reads it."""
    return msgspec.json.decode((run_dir / "launch.json").read_bytes(), type=Launch)
