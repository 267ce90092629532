"""``branchwise serve``: starts a server and reports its progress."""

from __future__ import annotations

import logging
import os
import time
from typing import TYPE_CHECKING, Any

from ...runtime.config import EngineConfig, ServerConfig
from ...runtime.server.log_format import FIELDS, configure_logging
from .config_flags import config_flags
from .console import EXIT_UNUSABLE, err, escape, expected_failures, out
from .options import Model, ModelFlag, one_of

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

logger = logging.getLogger(__name__)


@config_flags()
def serve(model: Model = "", model_flag: ModelFlag = "", **settings: Any) -> None:
    """Serve a model over HTTP.

    Answers OpenAI's **/v1/chat/completions**, **/v1/completions** and **/v1/responses**, Anthropic's
    **/v1/messages** and SGLang's **/generate**; **/cache/tree** shows the cached prefixes, **/metrics** is for
    Prometheus, **/openapi.json** lists every route. Ctrl-C finishes the requests in flight and exits; a second one
    exits at once. A model or setting that cannot be loaded exits 2.
    """
    with expected_failures():
        from ...runtime.config import check_server
        from ...runtime.errors import LoadError

        for field in ("api_key", "admin_api_key"):
            variable = f"BRANCHWISE_{field.upper()}"
            if settings[field] is None and os.environ.get(variable) == "":  # typer ignores it: no key would be required
                raise LoadError(f"{variable} is set and empty: set it to a key, or unset it")
        for field in ("extra_api_keys", "allowed_hosts", "allow_origins"):
            settings[field] = tuple(settings[field] or ())
        engine_fields = settings.keys() & set(EngineConfig.__struct_fields__)
        engine = EngineConfig(
            model=one_of(model, model_flag, "--model"), **{name: settings.pop(name) for name in engine_fields}
        )
        _run(check_server(ServerConfig(engine=engine, **settings)))


def _run(config: ServerConfig) -> None:
    from rich.logging import RichHandler

    from ...runtime.errors import LoadError

    out.quiet = config.log_format == "json"  # the lines for people; `_Startup.ready` logs the address instead
    if err.is_terminal and config.log_format == "text":
        handler = RichHandler(console=err, show_path=False, markup=False, log_time_format="%Y-%m-%d %H:%M:%S")
        logging.basicConfig(level=config.log_level.upper(), format="%(message)s", handlers=[handler])
    else:  # a record is a line
        configure_logging(config, "http")
    for client in ("httpx", "httpx2"):  # of the hub: it logs a line for each request
        logging.getLogger(client).setLevel(logging.WARNING)
    try:
        code = _serve(config)
    except LoadError as error:
        if config.log_format == "text":
            raise
        logger.error("cannot start: %s", error)
        code = EXIT_UNUSABLE
    raise SystemExit(code)


def _serve(config: ServerConfig) -> int:
    from ...runtime.server.log_stream import DroppingStream
    from ...runtime.server.server import run_server
    from . import checkup

    check_before_download(config.engine)
    # If the port is taken, the start fails at once with that error.
    err.file = DroppingStream(2)  # type: ignore[assignment]
    startup = _Startup(config, announce=checkup.port(config.host, config.port).state == "ok")
    with startup:
        return run_server(config, startup.ready, startup.progress)


def check_before_download(config: EngineConfig) -> None:
    """Fails before anything is printed if there is no such model, and before its weights are downloaded if it cannot
    be served here. Raises `LoadError`."""
    from ...runtime.errors import LoadError
    from ...runtime.models.folder import WEIGHT_FILES, model_folder
    from . import checkup

    folder = model_folder(config.model, weights=False)
    if config.load_format == "dummy" or any(folder.glob(WEIGHT_FILES)):
        return
    found = list(checkup.model(config))
    for finding in found:
        if finding.state == "broken":
            raise LoadError(finding.found)
    if checkup.is_hub_id(config.model):
        size = next((finding.found for finding in found if finding.what == "weights"), "size unknown")
        line = f"branchwise: downloading the weights of {config.model}, which need {size}"
        out.print(line, markup=False, soft_wrap=True)


class _Startup:
    """Shows the start: a bar while weights load, then the memory plan and a line that says the server is ready."""

    def __init__(self, config: ServerConfig, announce: bool) -> None:
        from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeElapsedColumn

        self._config = config
        self._announce = announce
        self._started = time.monotonic()
        self._bar: Progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            DownloadColumn(binary_units=True),
            TimeElapsedColumn(),
            console=err,
            transient=True,
            disable=not err.is_terminal,  # elsewhere it would print an empty line
        )
        self._task: TaskID | None = None

    def __enter__(self) -> _Startup:
        if self._announce:
            name = self._config.engine.model or "the model that ships with the package"
            out.print(f"branchwise: loading {name}", markup=False, soft_wrap=True)
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def progress(self, stage: str, done: int, total: int) -> None:
        if self._task is None:
            self._task = self._bar.add_task(stage, total=total)
        self._bar.update(self._task, description=stage, completed=done, total=total)

    def ready(self, info: dict[str, Any]) -> None:
        self._bar.stop()
        for line in info["memory_plan"]:
            out.print(f"  {line}", markup=False, soft_wrap=True)
        preferred = info["preferred_sampling_params"]
        if preferred:
            values = ", ".join(f"{name} {value}" for name, value in preferred.items())
            out.print(f"  model defaults for fields that a request omits: {values}", markup=False, soft_wrap=True)
        url = f"http://{_reachable(info['host'])}:{info['port']}"
        if self._config.log_format == "json":
            logger.info("ready at %s", url, extra={FIELDS: {"url": url, "model": info["model"]}})
        seconds = time.monotonic() - self._started
        key = "" if self._config.api_key is None else ' -H "Authorization: Bearer $BRANCHWISE_API_KEY"'
        if info["has_chat_template"]:
            path = "/v1/chat/completions"
            body = '{"messages": [{"role": "user", "content": "Tell me a story."}], "max_tokens": 100}'
        else:
            path, body = "/v1/completions", '{"prompt": "Once upon a time", "max_tokens": 100}'
        out.print(
            f"[bold green]ready[/] at [bold]{url}[/] after {seconds:.1f} s, serving {escape(info['model'])}. Try:"
        )
        command = f"  curl {url}{path}{key} -H 'Content-Type: application/json' -d '{body}'"
        out.print(command, markup=False, soft_wrap=True)
        out.print(f"  branchwise chat --url {url}", markup=False, soft_wrap=True)
        out.print(f"  branchwise tree {url}", markup=False, soft_wrap=True)
        if self._config.has_ui:
            out.print(f"  or open {url}/ui", markup=False, soft_wrap=True)


def _reachable(host: str) -> str:
    """An address at which this machine reaches ``host``, which may stand for all addresses."""
    shown = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"[{shown}]" if ":" in shown else shown
