"""The deployment's version, which decides whether ``up`` keeps running replicas, and the cluster's secret."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import quote

import msgspec

from ... import __version__
from ...runtime.config import ServerConfig
from ...runtime.errors import LoadError
from ...runtime.tiers.folder import folder_secret

_PACKAGE = Path(__file__).parents[2]
_ROOMS = ("radix", "kernels", "runtime", "frontend")


def application_version(server: ServerConfig, settings: Mapping[str, Any], generation: int) -> str:
    """A digest, in hex, of a replica's arguments and of this package's source.

    Safe to log though ``server`` holds API keys: it also holds the cluster's random secret, so no key can be guessed by
    its digest.
    """
    digest = hashlib.sha256(msgspec.json.encode((__version__, server, settings, generation)))
    for room in _ROOMS:
        for path in sorted((_PACKAGE / room).rglob("*.py")):
            source = path.read_bytes()
            digest.update(f"{path.relative_to(_PACKAGE)} {len(source)}\n".encode() + source)
    return digest.hexdigest()


def cluster_secret(name: str) -> str:
    """The ``namespace_secret`` of the cluster of this name: random, and the same at every later ``up`` of this user.

    In a file that only the user may read, in ``$XDG_STATE_HOME`` or ``~/.local/state``. Raises `LoadError`.
    """
    state = Path(os.environ.get("XDG_STATE_HOME") or "~/.local/state").expanduser()
    try:
        return folder_secret(state / "branchwise" / f"cluster-{quote(name, safe='')}").hex()
    except LoadError as error:
        raise LoadError(f"the cluster's secret: {error}; XDG_STATE_HOME names another folder for it") from error
