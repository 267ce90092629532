"""One server: HTTP on an event loop, the engine in child processes, and an orderly shutdown when either ends."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import gc
import logging
import signal
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import msgspec

from ..config import ServerConfig, check_server
from ..errors import EngineDead, LoadError, Overloaded
from ..messages import ControlReply, Deltas, Heartbeat, Limits, Progress, Stats
from ..models.folder import model_folder
from .engine_processes import EngineProcesses
from .heartbeat import HeartbeatMonitor
from .memory import return_freed_memory
from .processes.channels import ToHttp
from .restarts import Restarts
from .startup import (
    check_parsers,
    listen,
    model_name,
    raise_descriptor_limit,
)
from .throughput_log import ThroughputLog

if TYPE_CHECKING:
    from .http.state import AppState
    from .http_server import HttpServer

logger = logging.getLogger(__name__)

OnReady = Callable[[dict[str, Any]], None]
OnProgress = Callable[[str, int, int], None]

EXIT_OK, EXIT_FAILED = 0, 1
DRAIN_POLL_SECONDS = 0.05
LAST_ANSWERS_SECONDS = 1.0  # how long the last answers to clients may take to be sent


def run_server(config: ServerConfig, on_ready: OnReady | None = None, on_progress: OnProgress | None = None) -> int:
    """Serves until SIGTERM or SIGINT; call it from the main thread. A second signal ends it at once.

    ``on_ready`` gets `Server.info`. Returns the exit code: 0 after requests in flight have finished, 1 if the engine
    failed or a second signal came. Raises `LoadError` if the server cannot start.
    """
    raise_descriptor_limit()
    return_freed_memory()
    server = Server(config, on_progress)
    server.resolve_model()  # here: Ctrl-C ends a download only in the main thread

    async def serve() -> int:
        loop = asyncio.get_running_loop()
        signals = (signal.SIGINT, signal.SIGTERM)
        for number in signals:
            loop.add_signal_handler(number, server.request_stop)
        try:
            try:
                gc.disable()  # imports make objects that stay, and collections find nothing
                info = await server.start()
                gc.freeze()  # objects made so far last as long as the process
            finally:
                gc.enable()
            if on_ready is not None:
                on_ready(info)
            await server.wait()
            return EXIT_OK
        except ServerStopped:
            return EXIT_OK
        except EngineDead:
            return EXIT_FAILED
        finally:
            for number in signals:
                loop.remove_signal_handler(number)

    return asyncio.run(serve())


class ServerStopped(EngineDead):
    """`Server.stop` was called before the server was ready."""


class Server:
    """A server that uses neither signals nor the main thread, so that it can run inside another process.

    On an event loop: ``await start()``, then ``await wait()`` or ``await stop()``. Elsewhere, in a ``with`` block,
    which runs it on a thread of its own:

        with Server(ServerConfig(engine=EngineConfig(model="path/to/model"), port=0)) as server:
            print(server.url)

    One object serves once. ``on_progress(stage, done, total)`` is called while weights load. Raises `LoadError` if a
    setting is wrong.

    The loop's thread must outlive the server: Linux kills the engine's processes when the thread that began them ends.
    """

    def __init__(self, config: ServerConfig, on_progress: OnProgress | None = None) -> None:
        self._config = config = check_server(config)
        check_parsers(config)
        self._name = model_name(config)
        self._on_progress = on_progress
        self._stop = asyncio.Event()
        self._stop_now = asyncio.Event()
        self._life: asyncio.Task[None] | None = None
        self._info: dict[str, Any] | None = None

    def resolve_model(self) -> None:
        """Finds the model's folder, and downloads a model of the hub first. `start` does so otherwise."""
        folder = str(model_folder(self._config.engine.model))
        engine = msgspec.structs.replace(self._config.engine, model=folder)
        self._config = msgspec.structs.replace(self._config, engine=engine)

    @property
    def info(self) -> dict[str, Any]:
        """``url, host, port, model, has_chat_template, seconds`` (of starting)``, pids, memory_plan`` (lines), and
        `EngineCore.info`."""
        if self._info is None:
            raise RuntimeError("the server is not ready: await start() first")
        return self._info

    @property
    def url(self) -> str:
        return str(self.info["url"])

    # -- on an event loop ----------------------------------------------------------------------------------------------

    async def start(self) -> dict[str, Any]:
        """Returns `info` once the server answers. Raises `LoadError` if it cannot, `ServerStopped` if `stop` was first.

        Cancelling it ends the server.
        """
        if self._life is not None:
            raise RuntimeError("this server has been started: make another Server")
        ready: asyncio.Future[dict[str, Any]] = asyncio.get_running_loop().create_future()
        self._life = asyncio.create_task(self._run(ready))
        try:
            await _first(ready, self._life)
        except asyncio.CancelledError:
            self._life.cancel()
            await asyncio.wait((self._life,))
            raise
        if not ready.done():
            await self._life
            raise ServerStopped("the server was stopped before it was ready")
        self._info = ready.result()
        return self._info

    async def wait(self) -> None:
        """Returns after `stop`, once requests in flight have finished and every process has exited.

        Raises `EngineDead` if one of the processes died, or if the server was stopped a second time, at once.
        """
        if self._life is None:
            raise RuntimeError("the server has not been started")
        await asyncio.shield(self._life)

    def request_stop(self) -> None:
        """Stops taking requests and lets those in flight finish, up to ``drain_seconds``; called again, ends them.

        Returns at once. Call it on the server's event loop.
        """
        (self._stop_now if self._stop.is_set() else self._stop).set()

    async def stop(self) -> None:
        """`request_stop`, then `wait`."""
        self.request_stop()
        await self.wait()

    # -- on a thread of its own ----------------------------------------------------------------------------------------

    def __enter__(self) -> Self:
        ready: concurrent.futures.Future[None] = concurrent.futures.Future()
        self._loop = asyncio.new_event_loop()

        async def serve() -> None:
            try:
                await self.start()
            except BaseException as error:
                ready.set_exception(error)
                return
            ready.set_result(None)
            with contextlib.suppress(EngineDead):  # it has been logged, and every client has its error
                await self.wait()

        def run() -> None:
            with asyncio.Runner(loop_factory=lambda: self._loop) as runner:
                runner.run(serve())

        self._thread = threading.Thread(target=run, name="branchwise-server", daemon=True)
        self._thread.start()
        try:
            ready.result()
        except BaseException:
            self._stop_thread()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._stop_thread()

    def _stop_thread(self) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed: the server has ended
            self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join()

    # -- lifecycle -----------------------------------------------------------------------------------------------------

    async def _run(self, ready: asyncio.Future[dict[str, Any]]) -> None:
        started = time.monotonic()
        await asyncio.to_thread(self.resolve_model)
        with listen(self._config) as sock:
            self._processes = EngineProcesses(self._config, self._receive)
            try:
                self._processes.start_scheduler()
                self._make_state()
                await self._serve(sock, started, ready)
            finally:
                self._processes.close()

    async def _serve(self, sock: socket.socket, started: float, ready: asyncio.Future[dict[str, Any]]) -> None:
        from .http_server import HttpServer

        http = HttpServer(self._config, self._state)
        self._processes.start_others()
        self._lag.start()
        serving = asyncio.create_task(http.serve(sockets=[sock]))
        becoming_ready = asyncio.create_task(self._become_ready(sock, started))
        stop = asyncio.create_task(self._stop.wait())
        try:
            await _first(becoming_ready, stop, serving)
            if becoming_ready.done():
                ready.set_result(await becoming_ready)
            restarts = Restarts(self._config.restart)
            while True:
                await _first(stop, self._processes.ended, serving)
                delay = restarts.next_delay() if ready.done() and not (stop.done() or serving.done()) else None
                if delay is None:
                    break
                await self._restart(delay, sock, stop, serving)
            if self._processes.ended.done():
                await self._die(http, serving)
            elif serving.done():
                await serving
                raise EngineDead("the HTTP server stopped by itself")
            elif ready.done():  # else nothing can be in flight
                await self._drain(http, serving)
        finally:
            self._lag.stop()
            self._heartbeat.stop()
            becoming_ready.cancel()
            stop.cancel()
            http.force_exit = http.should_exit = True
            await http.end_unread()
            serving.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await serving

    def _make_state(self) -> None:
        from ..tiers.folder import folder_secret
        from .http.engine_client import EngineClient
        from .http.plumbing.auth import Namespaces
        from .http.plumbing.loop_lag import LoopLag
        from .http.plumbing.metrics import Metrics
        from .http.state import AppState

        config, metrics = self._config, Metrics()
        self._throughput = ThroughputLog(config.stats_log_seconds, logger.info)
        self._lag = LoopLag(metrics.observe_loop_lag)
        self._client = EngineClient(
            lambda messages: self._processes.to_tokenizer(messages),
            lambda messages: self._processes.to_scheduler(messages),
            config.max_queued_requests,
            metrics,
            config.request_timeout,
            config.max_queued_per_key,
        )
        self._heartbeat = HeartbeatMonitor(
            lambda messages: self._processes.to_tokenizer(messages),
            config.hang_timeout,
            lambda role, seconds: self._processes.give_up(role, seconds),
        )
        metrics.gauge(
            "heartbeat_age_seconds",
            "Time for which the engine's processes have not answered a heartbeat; 0: they answer",
            lambda: self._heartbeat.age,
        )
        metrics.gauge(
            "step_age_seconds",
            "Time since the engine's last step, or since the oldest unfinished request came; 0: no requests",
            lambda: metrics.step_age(self._client.oldest_arrival),
        )
        folder = config.engine.disk_cache
        secret = None if folder is None else folder_secret(Path(folder).expanduser())
        if config.namespace_secret is not None:
            secret = config.namespace_secret.encode()
        self._state: AppState = AppState(
            config, self._client, metrics, Namespaces(config.api_key, secret), self._name, self._heartbeat
        )

    def _receive(self, message: ToHttp) -> None:
        match message:
            case Deltas():
                self._client.deliver(message.items)
            case Stats():
                self._state.metrics.update(message)
                self._throughput.update(message)
            case ControlReply():
                self._client.answer(message)
            case Heartbeat():
                self._heartbeat.receive(message)
            case Progress():
                if self._on_progress is not None:
                    self._on_progress(message.stage, message.done, message.total)

    async def _become_ready(self, sock: socket.socket, started: float) -> dict[str, Any]:
        from ..tokenizer.tokenizer import Tokenizer

        self._state.tokenizer = await asyncio.to_thread(Tokenizer.load, self._config.engine.model)
        info = await self._processes.ready()
        self._state.preferred = info["preferred_sampling_params"] or {}
        self._client.ready(Limits(info["vocab_size"], info["max_model_len"], info["pool_tokens"]))
        self._heartbeat.start()
        host, port = sock.getsockname()[:2]
        shown = f"[{host}]" if ":" in host else host
        return {
            **info,
            "url": f"http://{shown}:{port}",
            "host": host,
            "port": port,
            "model": self._name,
            "has_chat_template": self._state.tokenizer.chat_template is not None,
            "seconds": time.monotonic() - started,
            "pids": self._processes.pids,
        }

    async def _die(self, http: HttpServer, serving: asyncio.Task[None]) -> None:
        """Tells every waiting client that a process has ended or hangs, then ends the server. Raises `EngineDead`."""
        end = await self._processes.describe_end()
        logger.error("%s; going down", end)
        error = EngineDead(f"{end}; the server is going down")
        self._client.died(error)
        http.should_exit = True
        await asyncio.wait([serving], timeout=LAST_ANSWERS_SECONDS)
        raise error

    async def _restart(
        self, delay: float, sock: socket.socket, stop: asyncio.Task[bool], serving: asyncio.Task[None]
    ) -> None:
        """Tells every waiting client that a process has ended or hangs, and replaces the engine's processes.

        If the new ones cannot start, ``ended`` is set again. Raises `ServerStopped`.
        """
        end = await self._processes.describe_end()
        logger.error("%s; restarting the engine in %g s (--restart)", end, delay)
        self._heartbeat.stop()
        self._client.lost(EngineDead(f"{end}; the engine is restarting"))
        await self._processes.kill()
        self._processes.close()
        await _first(stop, serving, seconds=delay)
        if not (stop.done() or serving.done()):
            self._processes = EngineProcesses(self._config, self._receive)
            self._processes.start_scheduler()
            self._processes.start_others()
            becoming_ready = asyncio.create_task(self._become_ready(sock, time.monotonic()))
            await _first(becoming_ready, stop, serving)
            if becoming_ready.done():
                try:
                    self._info = becoming_ready.result()
                    logger.warning("the engine has restarted")
                except LoadError as error:
                    logger.error("the engine did not restart: %s", error)
                return
            becoming_ready.cancel()
        raise ServerStopped("the server was stopped while its engine restarted")

    async def _drain(self, http: HttpServer, serving: asyncio.Task[None]) -> None:
        """Announces the end for ``drain_delay``, refuses new requests while those in flight finish, then ends the
        processes in the order of the pipeline."""
        client, seconds, ended = self._client, self._config.drain_seconds, self._processes.ended
        stop_now = asyncio.create_task(self._stop_now.wait())
        http.close_after_answers()
        try:
            if self._config.drain_delay:
                client.state = "leaving"
                logger.info("stopping: requests are taken for another %g s (--drain-delay)", self._config.drain_delay)
                await _first(serving, stop_now, ended, seconds=self._config.drain_delay)
            client.state = "draining"
            if client.in_flight:
                logger.info(
                    "stopping: %d request%s in flight may take up to %g s to finish; a second signal ends what is left",
                    client.in_flight,
                    "" if client.in_flight == 1 else "s",
                    seconds,
                )
            deadline = time.monotonic() + seconds
            # The port stays open meanwhile: new requests get a 503 instead of a refused connection.
            while client.in_flight and time.monotonic() < deadline:
                await _first(serving, stop_now, ended, seconds=DRAIN_POLL_SECONDS)
                if serving.done() or stop_now.done() or ended.done():
                    break
            http.should_exit = True
            # A request has left the engine before its answer reaches the client, so the end of HTTP is the end of all.
            await _first(serving, stop_now, ended, seconds=max(0.0, deadline - time.monotonic()))
            if not (serving.done() or stop_now.done() or ended.done()):
                logger.warning("%d requests did not finish in time", client.in_flight)
                client.fail_all(Overloaded("the server is shutting down"))
                await _first(serving, stop_now, ended, seconds=LAST_ANSWERS_SECONDS)
            if ended.done():
                await self._die(http, serving)
            if stop_now.done():
                error = EngineDead("the server was stopped")
                client.fail_all(error)
                await asyncio.wait([serving], timeout=LAST_ANSWERS_SECONDS)
                raise error
            self._heartbeat.stop()
            await self._processes.leave()
        finally:
            stop_now.cancel()


async def _first(*what: asyncio.Future[Any], seconds: float | None = None) -> None:
    """Waits until one of them is done, at most ``seconds``."""
    await asyncio.wait(what, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
