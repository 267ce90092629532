"""The three child processes of one server: starts them, receives their messages, shuts them down and cleans up."""

from __future__ import annotations

import asyncio
import logging
import signal
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import zmq

from ..config import DISK_WRITE_SECONDS, ServerConfig
from ..errors import LoadError
from ..messages import Failed, Ready, Shutdown
from .processes.channels import Inbox, Outbox, ToHttp
from .processes.launch import EXIT_FAILED, ROLES, Role, RunDirectory
from .processes.supervisor import Supervisor

logger = logging.getLogger(__name__)

FAILURE_SECONDS = 0.5  # how long the reason of a process that has failed may take to arrive after its exit
EXIT_SECONDS = 5.0  # for the processes to exit after `Shutdown`, beside writing a disk cache


def exit_seconds(config: ServerConfig) -> float:
    """How long the processes may take to exit after `Shutdown`."""
    return EXIT_SECONDS + (DISK_WRITE_SECONDS if config.engine.disk_cache else 0.0)


class EngineProcesses:
    """Tokenizer, scheduler and detokenizer of one engine, and the channels to them.

    ``receive`` takes every message for HTTP, on the event loop, but for `Ready` and `Failed`, which are handled here.
    Made, started and closed on one running loop.
    """

    def __init__(self, config: ServerConfig, receive: Callable[[ToHttp], None]) -> None:
        self._receive, self._ranks = receive, config.engine.tensor_parallel_size
        self._exit_seconds = exit_seconds(config)
        self._run_dir = RunDirectory(config)
        with ExitStack() as undo:
            undo.callback(self._run_dir.remove)
            self._context: zmq.Context[Any] = zmq.Context()
            undo.callback(self._context.destroy, 0)
            self._inbox: Inbox[ToHttp] = Inbox(self._context, self._run_dir.path, "http")
            self._to_tokenizer = Outbox(self._context, self._run_dir.path, "tokenizer")
            self._to_scheduler = Outbox(self._context, self._run_dir.path, "scheduler")
            undo.pop_all()
        self.to_tokenizer, self.to_scheduler = self._to_tokenizer.send, self._to_scheduler.send
        self._loop = asyncio.get_running_loop()
        self._supervisor = Supervisor(
            self._run_dir.path,
            lambda role, code: self._loop.call_soon_threadsafe(self._on_exit, role, code),
            torch=not config.null_executor,
        )
        self._ready: dict[str, dict[str, Any]] = {}
        self._all_ready = asyncio.Event()
        self._failure: asyncio.Future[str] = self._loop.create_future()
        self._leaving = False
        self.ended: asyncio.Future[tuple[Role, str]] = self._loop.create_future()

    @property
    def pids(self) -> dict[Role, int]:
        return self._supervisor.pids

    def start_scheduler(self) -> None:
        """Starts the scheduler, which takes longest. ``ended`` is then set to the first role that ends or hangs
        unexpectedly, and how."""
        self._loop.add_reader(self._inbox.fd, self._drain_inbox)
        self._supervisor.start("scheduler")

    def start_others(self) -> None:
        """Starts the tokenizer and the detokenizer. Do what else takes the processor first: on two cores they would
        slow the scheduler down."""
        self._supervisor.start("detokenizer", "tokenizer")

    async def ready(self) -> dict[str, Any]:
        """Waits until every process is ready; returns the scheduler's information about the model.

        Raises `LoadError` with the reason if one ends instead.
        """
        ready = asyncio.create_task(self._all_ready.wait())
        try:
            await asyncio.wait((ready, self.ended), return_when=asyncio.FIRST_COMPLETED)
        finally:
            ready.cancel()
        if self._all_ready.is_set():
            return self._ready["scheduler"]
        raise LoadError(await self._reason() or f"{self._end_seen()} while starting")

    async def describe_end(self) -> str:
        """The process that ended or hangs unexpectedly and how, or the reason that it gave."""
        return await self._reason() or self._end_seen()

    def _end_seen(self) -> str:
        role, how = self.ended.result()
        return f"the {role} process {how}"

    async def _reason(self) -> str | None:
        """The reason that a process sent before it ended with `EXIT_FAILED`. It may arrive after the exit."""
        if self.ended.result()[1] == _how(EXIT_FAILED):
            await asyncio.wait((self._failure,), timeout=FAILURE_SECONDS)
        return self._failure.result() if self._failure.done() else None

    def give_up(self, role: Role, seconds: float) -> None:
        """Treats a process that has not answered for so long as ended. `close` kills it."""
        rank = "or another rank of the model " if self._ranks > 1 and role == "scheduler" else ""
        self._end(role, f"{rank}has not answered for {seconds:.0f} s (--hang-timeout)")

    async def leave(self) -> None:
        """Lets the processes exit, in the order of the pipeline. `close` kills those that do not."""
        self._leaving = True
        self.to_tokenizer([Shutdown()])
        if not await asyncio.to_thread(self._supervisor.wait, self._exit_seconds):
            logger.warning("the engine's processes did not exit in time and were killed")

    async def kill(self) -> None:
        """Kills and reaps the processes, which may take seconds."""
        self._leaving = True
        await asyncio.to_thread(self._supervisor.kill)

    def close(self) -> None:
        """Kills and reaps what is left, and removes the run directory. Idempotent."""
        if self._context.closed:
            return
        self._leaving = True
        self._loop.remove_reader(self._inbox.fd)
        self._supervisor.kill()
        for outbox in (self._to_tokenizer, self._to_scheduler):
            outbox.close(0)  # the receivers are gone
        self._inbox.close()
        self._context.destroy(0)
        self._run_dir.remove()

    def _drain_inbox(self) -> None:
        for message in self._inbox.receive():
            match message:
                case Ready():
                    self._ready[message.role] = message.info
                    if len(self._ready) == len(ROLES):
                        self._all_ready.set()
                case Failed():
                    if not self._failure.done():
                        self._failure.set_result(message.error)
                case _:
                    self._receive(message)

    def _on_exit(self, role: Role, code: int) -> None:
        self._end(role, _how(code))

    def _end(self, role: Role, how: str) -> None:
        if not self._leaving and not self.ended.done():
            self.ended.set_result((role, how))


def _how(code: int) -> str:
    if code == -signal.SIGBUS:
        return f"was killed by signal {-code}: a file it had mapped, such as the model's weights, was truncated"
    return f"was killed by signal {-code}" if code < 0 else f"ended with code {code}"
