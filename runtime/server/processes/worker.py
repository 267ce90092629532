"""Entry point of every child: ``python -m branchwise.runtime.server.processes.worker ROLE PARENT [torch]``.

``PARENT`` is the process id of the server. A line of standard input names the run directory; with ``torch``, torch is
imported meanwhile.

Exit codes: 0 after `Shutdown` or if no line comes, 1 after a bug, `EXIT_FAILED` if it could not start or the engine has
ended.
"""

from __future__ import annotations

import gc
import logging
import os
import sys
from pathlib import Path
from typing import Any, Protocol

import zmq

from ...config import ServerConfig
from ...errors import BranchwiseError, EngineDead
from ...executor.torch_environment import prepare_torch
from ...messages import Failed
from ...models.read_ahead import read_ahead
from ...parallel.early_torch import create_cuda_context, import_torch_early
from ...parallel.lifeline import die_with_parent, ignore_stop_signals
from ..log_format import configure_logging
from ..memory import return_freed_memory
from .channels import Outbox
from .launch import EXIT_FAILED, hold_lock, read_launch

logger = logging.getLogger(f"{__package__}.worker")  # run as a script, this file is __main__


class Worker(Protocol):
    """The work of one child process."""

    def run(self) -> None:
        """Serves until `Shutdown`."""
        ...


def make_worker(role: str, config: ServerConfig, context: zmq.Context[Any], run_dir: Path, http: Outbox) -> Worker:
    """Makes the worker of a role, which sends `Ready`. Imports are local: only the scheduler imports torch."""
    if role != "scheduler":
        return_freed_memory()
    if role == "tokenizer":
        from .tokenizer_worker import TokenizerWorker

        return TokenizerWorker(config, context, run_dir, http)
    if role == "detokenizer":
        from .detokenizer_worker import DetokenizerWorker

        return DetokenizerWorker(config, context, run_dir, http)
    if role == "scheduler":
        from .scheduler_worker import SchedulerWorker

        return SchedulerWorker(config, context, run_dir, http)
    raise ValueError(f"no such role: {role}")


def main(role: str, parent: int, *, torch: bool) -> int:
    """Serves one role until `Shutdown` or until the parent ends. Returns the exit code."""
    gc.disable()  # until it is made: imports and loading make objects that stay, and collections find nothing
    ignore_stop_signals()
    cleans_up = role == "detokenizer"  # after a killed server: it never blocks for long
    if not cleans_up:
        die_with_parent(parent)
    if torch:
        _import_scheduler()
    run_dir = Path(os.fsdecode(sys.stdin.buffer.readline().rstrip(b"\n")))
    if not run_dir.name:  # the parent has ended
        return 0
    config = read_launch(run_dir)
    if cleans_up:
        die_with_parent(parent, run_dir)
    lock = hold_lock(run_dir, role)
    sys.stdout = sys.stderr = configure_logging(config, role)
    context: zmq.Context[Any] = zmq.Context()
    http = Outbox(context, run_dir, "http")
    if torch:
        if config.engine.load_format != "dummy":
            read_ahead(Path(config.engine.model))
        create_cuda_context(config.engine.device)  # while torch is imported
    try:
        try:
            worker = make_worker(role, config, context, run_dir, http)
        except BranchwiseError as error:
            http.send([Failed(role, str(error))])
            return EXIT_FAILED
        except Exception as error:
            logger.exception("could not start")
            http.send([Failed(role, f"{type(error).__name__}: {error}")])
            return EXIT_FAILED
        gc.freeze()  # objects made so far last as long as the process
        gc.enable()
        try:
            worker.run()
        except EngineDead as error:
            http.send([Failed(role, str(error))])
            return EXIT_FAILED
        except Exception:
            logger.exception("stopped by a bug")
            return 1
        return 0
    finally:
        http.close()
        context.destroy()
        lock.close()


def _import_scheduler() -> None:
    """Imports the scheduler's modules, and then torch in a thread, during which this thread imports nothing."""
    from . import scheduler_worker  # noqa: F401

    prepare_torch()
    import_torch_early()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], int(sys.argv[2]), torch="torch" in sys.argv[3:]))
