"""Checks of a server and its system resources, before its first process starts."""

from __future__ import annotations

import errno
import ipaddress
import logging
import resource
import socket
from pathlib import Path
from typing import Any

from ..config import ServerConfig
from ..errors import LoadError

logger = logging.getLogger(__name__)

BACKLOG = 512
ACCEPT_BURST = 64  # connections accepted in one turn of the event loop
MAX_DESCRIPTORS = 65_536
_OWN_DESCRIPTORS = 128  # of the process itself: channels, logs, the model's files


def check_parsers(config: ServerConfig) -> None:
    """Raises `LoadError` if a tool-call or reasoning format is unknown, or if one output cannot have both."""
    names = config.tool_call_parser, config.reasoning_parser
    if set(names) <= {"auto", "none"}:
        return  # usual, and the formats take 0.1 s to import, which the engine's processes need not wait for
    from ..chat.tools.formats import check_together, tool_format
    from ..chat.tools.reasoning_formats import reasoning_format

    flags = "--tool-call-parser", "--reasoning-parser"
    found: list[Any] = [None, None]
    for i, find in enumerate((tool_format, reasoning_format)):
        try:
            found[i] = find(names[i]) if names[i] not in ("auto", "none") else None
        except ValueError as error:
            raise LoadError(f"{flags[i]}: {error}, auto and none") from error
    try:
        check_together(*found)
    except ValueError as error:
        raise LoadError(f"{' and '.join(flags)}: {error}; set one of them to none") from error


def raise_descriptor_limit() -> None:
    """Raises this process's soft limit of file descriptors: each client takes one, and the usual limit is 1,024."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = MAX_DESCRIPTORS if hard == resource.RLIM_INFINITY else min(hard, MAX_DESCRIPTORS)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def most_connections() -> int:
    """How many clients fit below the limit of descriptors, beside the process's own and those about to be refused."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY:
        return MAX_DESCRIPTORS
    return max(soft // 4, soft - _OWN_DESCRIPTORS - 4 * ACCEPT_BURST)


def model_name(config: ServerConfig) -> str:
    """The name that clients ask for: ``served_model_name``, else the folder's name, else the hub id."""
    if config.served_model_name:
        return config.served_model_name
    path = Path(config.engine.model).expanduser()
    if not config.engine.model:
        return "branchwise"
    return path.resolve().name if path.is_dir() else config.engine.model


def listen(config: ServerConfig) -> socket.socket:
    """A listening socket. Bound before anything is loaded, so that a taken port is reported at once.

    Raises `LoadError`. Warns if other machines can reach it and no API key is set.
    """
    host, port = config.host, config.port
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except OSError as error:
        raise LoadError(f"--host {host}: {error.strerror}") from error
    sock = socket.socket(family, kind, protocol)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(address)
        sock.listen(BACKLOG)
        sock.setblocking(False)
    except OSError as error:
        sock.close()
        if error.errno == errno.EADDRINUSE:
            raise LoadError(f"--port {port}: already in use on {host}; choose another or 0 for any free one") from error
        raise LoadError(f"cannot listen on {host}:{port}: {error.strerror}") from error
    if config.api_key is None and not ipaddress.ip_address(sock.getsockname()[0]).is_loopback:
        logger.warning("--host %s: any machine that reaches this one may use the model; set --api-key", host)
    return sock
