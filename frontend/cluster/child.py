"""A server as a child process of a replica: ``python -m branchwise.frontend.cluster.child``.

Reads its `ServerConfig` as JSON from standard input, so that no key is on a command line; writes one line of JSON with
its URL when it is ready. Ends when its parent does.
"""

from __future__ import annotations

import json
import logging
import os
import sys
from typing import Any

import msgspec

from ...runtime.config import ServerConfig
from ...runtime.errors import LoadError
from ...runtime.parallel.lifeline import die_with_parent
from ...runtime.server.log_format import configure_logging
from ...runtime.server.server import run_server

logger = logging.getLogger(f"{__package__}.child")  # run as a script, this file is __main__


def main() -> int:
    """Serves until SIGTERM. Returns 2 if it cannot start; the reason is on standard error."""
    die_with_parent(os.getppid())
    config = msgspec.json.decode(sys.stdin.buffer.read(), type=ServerConfig)
    answers = sys.stdout
    sys.stdout = sys.stderr = configure_logging(config, "http")

    def ready(info: dict[str, Any]) -> None:
        print(json.dumps(info), file=answers, flush=True)

    try:
        return run_server(config, ready)
    except LoadError as error:
        logger.error("cannot start: %s", error)
        return 2


if __name__ == "__main__":
    sys.exit(main())
