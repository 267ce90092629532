"""The process of a rank other than 0: ``python -m branchwise.runtime.executor.rank_worker DESCRIPTOR``.

It runs its part of every step that it is handed, in order, until the connection ends. Exit codes: 0 then, 1 after a
bug, 2 if it could not start (a `RankReport` then says why).
"""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import threading
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path

import msgspec
import torch

from ...kernels.attention.base import StepShape
from ..errors import BranchwiseError
from ..parallel.connect import connect
from ..parallel.group import TensorGroup
from ..parallel.lifeline import die_with_parent, ignore_stop_signals
from ..parallel.place import Place
from ..parallel.ranks import BEAT, CAPTURE, COPIES, RankLaunch, RankReport
from ..step_codec import decode_plan
from ..tiers.rank import POLL_SECONDS, RankTiers
from .executor import ModelExecutor

logger = logging.getLogger(f"{__package__}.rank_worker")  # run as a script, this file is __main__


class _ToRankZero(logging.Handler):
    """Sends records to rank 0, which writes them to its own log, in its format."""

    def __init__(self, report: Callable[[RankReport], None]) -> None:
        super().__init__()
        self._report = report
        self.setFormatter(logging.Formatter("%(message)s"))

    def emit(self, record: logging.LogRecord) -> None:
        with contextlib.suppress(OSError):  # rank 0 has ended
            self._report(RankReport(log=(record.levelno, record.name, self.format(record))))


def main(descriptor: int) -> int:
    """Serves as one rank until rank 0 ends it. Returns the exit code."""
    ignore_stop_signals()
    die_with_parent(os.getppid())
    connection: Connection[bytes, bytes] = Connection(descriptor)
    try:
        launch = msgspec.json.decode(connection.recv_bytes(), type=RankLaunch)
    except EOFError:
        return 0
    sending = threading.Lock()

    def report(what: RankReport) -> None:
        with sending:
            connection.send_bytes(msgspec.json.encode(what))

    logging.basicConfig(level=logging.ERROR, handlers=[_ToRankZero(report)])

    def meet(device: torch.device) -> TensorGroup:
        report(RankReport("loaded"))
        return connect(Path(launch.store), launch.rank, launch.config.tensor_parallel_size, device)

    try:
        place = Place(launch.rank, launch.config.tensor_parallel_size, meet)
        executor = ModelExecutor.load(launch.config, place=place)
    except BranchwiseError as error:
        report(RankReport(error=str(error)))
        return 2
    except Exception as error:
        logger.exception("could not start")
        report(RankReport(error=f"{type(error).__name__}: {error}"))
        return 2
    report(RankReport("ready"))
    tiers = None if executor.host is None else RankTiers(launch.rank, executor.host)

    def next_message() -> bytes:
        """The next message, once it is there. Meanwhile reports copies that have ended."""
        while tiers is not None and tiers.busy:
            if (copies := tiers.report()) is not None:
                report(RankReport(copies=copies))
            elif connection.poll(POLL_SECONDS):
                break
        return connection.recv_bytes()

    try:
        while message := next_message():
            if message == BEAT:
                executor.beat()
            elif message.startswith(COPIES) and tiers is not None:
                if tiers.receive(message[len(COPIES) :]):
                    report(RankReport("disk"))
            elif message.startswith(CAPTURE):
                executor.capture(msgspec.json.decode(message[len(CAPTURE) :], type=StepShape))
            else:
                executor.launch(decode_plan(message))
    except EOFError:
        pass
    except BranchwiseError as error:
        report(RankReport(error=str(error)))
        return 2
    except Exception:
        logger.exception("stopped by a bug")
        return 1
    if tiers is not None:
        tiers.close()
    return 0


if __name__ == "__main__":
    code = main(int(sys.argv[1]))
    sys.stderr.flush()
    os._exit(code)  # without the destructors of collectives, which would wait for ranks that have ended
