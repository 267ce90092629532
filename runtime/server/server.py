"""One server: HTTP in this process, the engine in its children, and an orderly end whichever of them ends first."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import gc
import ipaddress
import logging
import resource
import signal
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import zmq

from ..config import ServerConfig, check
from ..errors import EngineDead, LoadError, Overloaded
from ..messages import ControlReply, Deltas, Failed, Limits, Progress, Ready, Shutdown, Stats
from ..models.folder import model_folder
from .processes.channels import Inbox, Outbox, ToHttp
from .processes.launch import ROLES, Role, RunDirectory
from .processes.supervisor import Supervisor
from .throughput_log import ThroughputLog

if TYPE_CHECKING:
    import uvicorn

    from .http.state import AppState

logger = logging.getLogger(__name__)

OnReady = Callable[[dict[str, Any]], None]
OnProgress = Callable[[str, int, int], None]

EXIT_OK, EXIT_FAILED = 0, 1
LAST_ANSWERS_SECONDS = 1.0  # time the answers to waiting clients get to leave after a child died
LAST_WORDS_SECONDS = 0.5  # time the reason of a child that could not start may take to arrive
CHILDREN_LEAVE_SECONDS = 5.0
BACKLOG = 512
MAX_DESCRIPTORS = 65_536


def run_server(config: ServerConfig, on_ready: OnReady | None = None, on_progress: OnProgress | None = None) -> int:
    """Serves until SIGTERM or SIGINT (0, after draining) or until a child dies (1). Call it from the main thread.

    ``on_ready`` gets ``url, host, port, model, seconds, pids`` and what the scheduler says: ``vocab_size,
    max_model_len, pool_tokens, num_pages, page_size, preferred_sampling_params, memory_plan`` (lines).
    ``on_progress(stage, done, total)`` is called while weights load. Raises `LoadError` if the server cannot start. A
    second signal ends it at once.
    """
    started = time.monotonic()
    check(config.engine)
    if config.extra_api_keys and config.api_key is None:
        raise LoadError("--extra-api-key needs --api-key, whose cache is the server's own")
    _check_parsers(config)
    _allow_descriptors()
    name = _model_name(config)
    folder = model_folder(config.engine.model)
    config = msgspec.structs.replace(config, engine=msgspec.structs.replace(config.engine, model=str(folder)))
    with _listen(config.host, config.port) as sock:
        if config.api_key is None and not ipaddress.ip_address(sock.getsockname()[0]).is_loopback:
            logger.warning(
                "--host %s: whoever reaches this machine may use the model; --api-key sets a key", config.host
            )
        run_dir = RunDirectory(config)
        try:
            return asyncio.run(_Server(config, name, sock, run_dir.path, started, on_ready, on_progress).run())
        finally:
            run_dir.remove()


class _Server:
    def __init__(
        self,
        config: ServerConfig,
        name: str,
        sock: socket.socket,
        run_dir: Path,
        started: float,
        on_ready: OnReady | None,
        on_progress: OnProgress | None,
    ) -> None:
        self._config = config
        self._name = name
        self._sock = sock
        self._run_dir = run_dir
        self._started = started
        self._on_ready = on_ready
        self._on_progress = on_progress
        self._ready: dict[str, dict[str, Any]] = {}
        self._failure: str | None = None  # why a child could not set itself up

    async def run(self) -> int:
        loop = asyncio.get_running_loop()
        self._stopping = False
        self._signalled = asyncio.Event()
        self._killed = asyncio.Event()  # by a second signal
        self._all_ready = asyncio.Event()
        self._failed = asyncio.Event()
        self._child_ended: asyncio.Future[tuple[Role, int]] = loop.create_future()
        with self._signals(loop), self._channels():

            def on_exit(role: Role, code: int) -> None:
                loop.call_soon_threadsafe(self._on_child_exit, role, code)

            self._supervisor = Supervisor(self._run_dir, on_exit)
            try:
                self._supervisor.start()
                # Their imports run while ours do.
                self._make_site()
                loop.add_reader(self._inbox.fd, self._receive)
                return await self._serve()
            finally:
                loop.remove_reader(self._inbox.fd)
                self._supervisor.kill()

    # -- set-up --------------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def _signals(self, loop: asyncio.AbstractEventLoop) -> Iterator[None]:
        def stop() -> None:
            (self._killed if self._signalled.is_set() else self._signalled).set()

        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, stop)
        try:
            yield
        finally:
            for number in (signal.SIGINT, signal.SIGTERM):
                loop.remove_signal_handler(number)

    @contextlib.contextmanager
    def _channels(self) -> Iterator[None]:
        context: zmq.Context[Any] = zmq.Context()
        self._inbox: Inbox[ToHttp] = Inbox(context, self._run_dir, "http")
        self._to_tokenizer = Outbox(context, self._run_dir, "tokenizer")
        self._to_scheduler = Outbox(context, self._run_dir, "scheduler")
        try:
            yield
        finally:
            # The children are gone: nothing is left to deliver.
            self._to_tokenizer.close(0)
            self._to_scheduler.close(0)
            self._inbox.close()
            context.destroy(0)

    def _make_site(self) -> None:
        from .http.engine_client import EngineClient
        from .http.plumbing.auth import Namespaces
        from .http.plumbing.loop_lag import LoopLag
        from .http.plumbing.metrics import Metrics
        from .http.state import AppState

        metrics = Metrics()
        self._throughput = ThroughputLog(self._config.stats_log_seconds, logger.info)
        self._lag = LoopLag(metrics.observe_loop_lag)
        self._client = EngineClient(
            self._to_tokenizer.send,
            self._to_scheduler.send,
            self._config.max_queued_requests,
            metrics,
            self._config.request_timeout,
            self._config.max_queued_per_key,
        )
        self._site: AppState = AppState(
            self._config, self._client, metrics, Namespaces(self._config.api_key), self._name
        )

    def _make_http(self) -> uvicorn.Server:
        import uvicorn

        from .http.app import make_app
        from .http.plumbing.protocol import bounded

        class Server(uvicorn.Server):
            """Signals are the supervisor's business."""

            @contextlib.contextmanager
            def capture_signals(self) -> Iterator[None]:
                yield

        return Server(
            uvicorn.Config(
                make_app(self._site),
                http=bounded(self._config.max_header_bytes),
                ws="none",
                lifespan="off",
                log_config=None,
                log_level="warning" if self._config.log_level != "debug" else "debug",
                access_log=self._config.log_level == "debug",
                server_header=False,
                proxy_headers=False,  # nothing here asks who the client is
                timeout_keep_alive=75,
                backlog=BACKLOG,
            )
        )

    # -- messages ------------------------------------------------------------------------------------------------------

    def _receive(self) -> None:
        for message in self._inbox.receive():
            match message:
                case Deltas():
                    self._client.deliver(message.items)
                case Stats():
                    self._site.metrics.update(message)
                    self._throughput.update(message)
                case ControlReply():
                    self._client.answer(message)
                case Progress():
                    if self._on_progress is not None:
                        self._on_progress(message.stage, message.done, message.total)
                case Ready():
                    self._ready[message.role] = message.info
                    if len(self._ready) == len(ROLES):
                        self._all_ready.set()
                case Failed():
                    self._failure = self._failure or message.error
                    self._failed.set()

    def _on_child_exit(self, role: Role, code: int) -> None:
        if not self._stopping and not self._child_ended.done():
            self._child_ended.set_result((role, code))

    # -- life ----------------------------------------------------------------------------------------------------------

    async def _serve(self) -> int:
        http = self._make_http()
        self._lag.start()
        serving = asyncio.create_task(http.serve(sockets=[self._sock]))
        signalled = asyncio.create_task(self._signalled.wait())
        try:
            ready = asyncio.create_task(self._become_ready())
            await _first(ready, signalled, self._child_ended, serving)
            if ready.done():
                await ready
                await _first(signalled, self._child_ended, serving)
            else:
                ready.cancel()
            if self._child_ended.done():
                return await self._die(http, serving)
            if serving.done():
                await serving
                raise EngineDead("the HTTP server stopped by itself")
            return await self._drain(http, serving)
        finally:
            self._stopping = True
            self._lag.stop()
            signalled.cancel()
            http.force_exit = http.should_exit = True
            serving.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await serving

    async def _become_ready(self) -> None:
        from ..tokenizer.tokenizer import Tokenizer

        self._site.tokenizer = await asyncio.to_thread(Tokenizer.load, self._config.engine.model)
        await self._all_ready.wait()
        info = self._ready["scheduler"]
        self._site.preferred = info["preferred_sampling_params"]
        # What start-up left behind lives as long as the process: the collector need not walk it between events.
        gc.collect()
        gc.freeze()
        self._client.ready(Limits(info["vocab_size"], info["max_model_len"], info["pool_tokens"]))
        if self._on_ready is not None:
            host, port = self._sock.getsockname()[:2]
            shown = f"[{host}]" if ":" in host else host
            self._on_ready(
                {
                    **info,
                    "url": f"http://{shown}:{port}",
                    "host": host,
                    "port": port,
                    "model": self._name,
                    "has_chat_template": self._site.tokenizer.chat_template is not None,
                    "seconds": time.monotonic() - self._started,
                    "pids": self._supervisor.pids,
                }
            )

    async def _die(self, http: uvicorn.Server, serving: asyncio.Task[None]) -> int:
        """A child has ended: every waiting client hears of it, then the server goes down."""
        role, code = self._child_ended.result()
        if len(self._ready) < len(ROLES):
            with contextlib.suppress(TimeoutError):  # its last words may be a moment behind its end
                await asyncio.wait_for(self._failed.wait(), LAST_WORDS_SECONDS)
            raise LoadError(self._failure or f"the {role} process ended with code {code} while starting")
        how = f"was killed by signal {-code}" if code < 0 else f"ended with code {code}"
        logger.error("the %s process %s; going down", role, how)
        self._client.died(EngineDead(f"the {role} process has stopped; the server is going down"))
        http.should_exit = True
        await asyncio.wait([serving], timeout=LAST_ANSWERS_SECONDS)
        return EXIT_FAILED

    async def _drain(self, http: uvicorn.Server, serving: asyncio.Task[None]) -> int:
        """Takes nothing new, lets what is in flight finish, and ends the children in the order of the pipeline."""
        if self._client.state != "ready":
            return EXIT_OK  # nothing can be in flight
        self._client.state = "draining"
        if self._client.in_flight:
            logger.info(
                "stopping: %d request%s in flight may take up to %g s to finish; a second signal ends what is left",
                self._client.in_flight,
                "" if self._client.in_flight == 1 else "s",
                self._config.drain_seconds,
            )
        http.should_exit = True
        killed = asyncio.create_task(self._killed.wait())
        try:
            # The engine holds nothing after a client has its answer, so the HTTP side alone decides when we are done.
            await _first(serving, killed, self._child_ended, seconds=self._config.drain_seconds)
            if not serving.done() and not killed.done() and not self._child_ended.done():
                logger.warning("%d requests did not finish in time", self._client.in_flight)
                self._client.fail_all(Overloaded("the server is shutting down"))
                await _first(serving, killed, self._child_ended, seconds=LAST_ANSWERS_SECONDS)
            if self._child_ended.done():
                return await self._die(http, serving)
            if killed.done():
                self._client.fail_all(EngineDead("the server was stopped"))
                await asyncio.wait([serving], timeout=LAST_ANSWERS_SECONDS)
                return EXIT_FAILED
            self._stopping = True
            self._to_tokenizer.send([Shutdown()])
            if not await asyncio.to_thread(self._supervisor.wait, CHILDREN_LEAVE_SECONDS):
                logger.warning("the children did not leave in time and were killed")
            return EXIT_OK
        finally:
            killed.cancel()


async def _first(*what: asyncio.Future[Any], seconds: float | None = None) -> None:
    """Waits until one of them is done, at most ``seconds``."""
    await asyncio.wait(what, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)


def _check_parsers(config: ServerConfig) -> None:
    """Raises `LoadError` for a format of calls or thinking that nobody knows."""
    from ..chat.tools import reasoning_format, tool_format

    for flag, name, find in (
        ("--tool-call-parser", config.tool_call_parser, tool_format),
        ("--reasoning-parser", config.reasoning_parser, reasoning_format),
    ):
        try:
            if name not in ("auto", "none"):
                find(name)
        except ValueError as error:
            raise LoadError(f"{flag}: {error}, auto and none") from error


def _allow_descriptors() -> None:
    """Every client holds a file descriptor, and the usual soft limit of 1,024 is soon reached."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = MAX_DESCRIPTORS if hard == resource.RLIM_INFINITY else min(hard, MAX_DESCRIPTORS)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def _model_name(config: ServerConfig) -> str:
    """The name clients ask for: as given, else the folder's own, else the hub id."""
    if config.served_model_name:
        return config.served_model_name
    path = Path(config.engine.model).expanduser()
    if not config.engine.model:
        return "branchwise"
    return path.resolve().name if path.is_dir() else config.engine.model


def _listen(host: str, port: int) -> socket.socket:
    """A listening socket; bound before anything is loaded, so that a taken port is known at once."""
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
    return sock
