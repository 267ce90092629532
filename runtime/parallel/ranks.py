"""The processes of the other ranks, as rank 0 sees them: started, watched, handed each step, and ended."""

from __future__ import annotations

import contextlib
import logging
import shutil
import subprocess
import sys
import tempfile
import threading
from collections import deque
from concurrent.futures import Future
from multiprocessing.connection import Connection, Pipe
from pathlib import Path

import msgspec

from ..config import EngineConfig
from ..errors import LoadError

logger = logging.getLogger(__name__)

_STDERR = 2
# Messages to a rank besides steps, whose encoding begins with another byte: to end; to prove that it and its device
# answer; to capture the step shape that follows; to make the copies that follow between memory tiers.
END, BEAT, CAPTURE, COPIES = b"", b"\0", b"\1", b"\2"
EXIT_SECONDS = 2.0  # how long the ranks may take to exit once they are told to


class RankLaunch(msgspec.Struct, frozen=True):
    """The first message to a rank: all that it needs to know to load its part of the model."""

    rank: int
    store: str  # the file by which the ranks find each other
    config: EngineConfig


class RankReport(msgspec.Struct, frozen=True):
    """What a rank has reached while starting: ``loaded`` its weights, ``ready`` for steps, or its ``disk`` cache open;
    why it failed; which copies it has made, in the encoding of `runtime/tiers`; or a record of its log, which rank 0
    writes to its own."""

    reached: str = ""
    error: str | None = None
    copies: bytes = b""
    log: tuple[int, str, str] | None = None  # level, logger's name, message with its traceback


class Ranks:
    """Ranks 1 to ``size - 1``, each a child process that runs ``module`` with the descriptor of its connection. They
    import torch at once, and load their parts of the model after `start`.

    A connection is a pair of sockets without a name, so no other process can reach it. It carries a `RankLaunch`, then
    each step; a rank ends when its connection does. Its queue is bounded: sending to a rank that has stopped reading
    blocks, and the heartbeat notices that.

    Args:
        failed: gets the reason when a rank ends before `close`, from a thread of its own. All other ranks are killed
            first. Rank 0's thread may be inside a collective with them, and on a GPU does not return from it.
    """

    def __init__(self, size: int, module: str, failed: Future[str]) -> None:
        self.size, self.failed = size, failed
        self._module = module
        self._folder = Path(tempfile.mkdtemp(prefix="branchwise-ranks-"))  # mode 0700
        self.store = self._folder / "store"
        self._closing = False
        self._failure: str | None = None
        self._changed = threading.Condition()
        self._reached: dict[str, int] = {"loaded": 0, "ready": 0, "disk": 0}
        self._copies: deque[tuple[int, bytes]] = deque()
        self._children: dict[int, subprocess.Popen[bytes]] = {}
        self._connections: list[Connection[bytes, bytes]] = []
        self._threads: list[threading.Thread] = []
        with contextlib.ExitStack() as undo:
            undo.callback(self.close)
            for rank in range(1, self.size):
                ours, theirs = Pipe()
                self._connections.append(ours)
                thread = threading.Thread(
                    target=self._live, args=(rank, ours, theirs), name=f"branchwise-rank-{rank}", daemon=True
                )
                thread.start()
                self._threads.append(thread)
            undo.pop_all()

    @property
    def pids(self) -> list[int]:
        return [child.pid for child in self._children.values()]

    def start(self, config: EngineConfig) -> None:
        """Tells every rank to load its part of the model. ``config.device`` is rank 0's, with its number."""
        for rank, connection in enumerate(self._connections, 1):
            launch = RankLaunch(rank, str(self.store), config)
            with contextlib.suppress(OSError):  # it has ended: `wait` raises
                connection.send_bytes(msgspec.json.encode(launch))

    def wait(self, stage: str) -> None:
        """Returns once all ranks have reached ``loaded``, ``ready`` or ``disk``. Raises `LoadError` if one cannot."""
        with self._changed:
            self._changed.wait_for(lambda: self._failure is not None or self._reached[stage] == self.size - 1)
        if self._failure is not None:
            raise LoadError(self._failure)
        if stage == "ready":
            shutil.rmtree(self._folder, ignore_errors=True)  # they have connected: a killed server leaves nothing

    def send(self, message: bytes) -> None:
        """To every rank. Raises RuntimeError if one has ended."""
        if self._failure is not None:
            raise RuntimeError(self._failure)
        for connection in self._connections:
            try:
                connection.send_bytes(message)
            except OSError as error:
                raise RuntimeError("a rank has ended") from error

    def copy_reports(self) -> list[tuple[int, bytes]]:
        """What ranks have reported of copies since the last call, each with its rank, in order."""
        return [self._copies.popleft() for _ in range(len(self._copies))]

    def fail(self, why: str) -> None:
        """Ends all ranks for that reason, of which the first one counts."""
        with self._changed:
            if self._closing or self._failure is not None:
                return
            self._failure = why
            for child in self._children.values():
                child.kill()
            self._changed.notify_all()
        self.failed.set_result(why)

    def close(self) -> None:
        """Ends the ranks, at once while they are starting. Idempotent."""
        with self._changed:
            self._closing = True
            if self._reached["ready"] < self.size - 1:
                for child in self._children.values():
                    child.kill()
        for connection in self._connections:
            with contextlib.suppress(OSError):
                connection.send_bytes(END)
        for thread in self._threads:
            thread.join(EXIT_SECONDS)
        for child in list(self._children.values()):
            child.kill()  # no effect on one that has been reaped
        for thread in self._threads:
            thread.join(EXIT_SECONDS)
        shutil.rmtree(self._folder, ignore_errors=True)

    def _live(self, rank: int, ours: Connection[bytes, bytes], theirs: Connection[bytes, bytes]) -> None:
        """Starts one rank, receives its reports and waits for its end, all on one thread: Linux kills a child when the
        thread that started it ends."""
        try:
            child = subprocess.Popen(
                [sys.executable, "-m", self._module, str(theirs.fileno())],
                stdin=subprocess.DEVNULL,
                stdout=_STDERR,
                pass_fds=[theirs.fileno()],
                start_new_session=True,  # Ctrl-C in a terminal must not reach it
            )
        except OSError as problem:
            self.fail(f"rank {rank} could not be started: {problem}")
            ours.close()
            return
        finally:
            theirs.close()
        with self._changed:
            self._children[rank] = child
            if self._closing or self._failure is not None:
                child.kill()
        error: str | None = None
        with contextlib.suppress(EOFError, OSError):
            while error is None:
                report = msgspec.json.decode(ours.recv_bytes(), type=RankReport)
                error = report.error
                if report.copies:
                    self._copies.append((rank, report.copies))
                elif report.log is not None:
                    level, name, message = report.log
                    logging.getLogger(name).log(level, "rank %d: %s", rank, message)
                elif error is None:
                    with self._changed:
                        self._reached[report.reached] += 1
                        self._changed.notify_all()
        code = child.wait()
        how = f"was killed by signal {-code}" if code < 0 else f"ended with code {code}"
        self.fail(f"rank {rank}: {error}" if error is not None else f"rank {rank} {how}")
        ours.close()
