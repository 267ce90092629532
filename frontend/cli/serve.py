"""``branchwise serve``: starts a server and says what it does while it starts."""

from __future__ import annotations

import logging
import os
import time
from typing import TYPE_CHECKING, Annotated, Any, Literal

from ...runtime.config import EngineConfig, EvictionPolicy, SamplingDefaults, SchedulePolicy, ServerConfig
from .console import err, escape, expected_failures, out
from .options import (
    LIMITS,
    MEMORY,
    MODEL,
    SCHEDULING,
    SERVER,
    Device,
    DtypeFlag,
    LoadFormatFlag,
    LogLevel,
    MaxModelLen,
    Model,
    flag,
)

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

_ENGINE = EngineConfig()  # the defaults are the config's
_SERVER = ServerConfig(engine=_ENGINE)


def serve(
    model: Model = _ENGINE.model,
    host: Annotated[str, flag("host", SERVER, metavar="HOST")] = _SERVER.host,
    port: Annotated[int, flag("port", SERVER, min=0, max=65535, metavar="N")] = _SERVER.port,
    api_key: Annotated[
        str | None, flag("api_key", SERVER, metavar="KEY", envvar="BRANCHWISE_API_KEY", show_default=False)
    ] = _SERVER.api_key,
    api_key_file: Annotated[
        str | None, flag("api_key_file", SERVER, metavar="FILE", show_default=False)
    ] = _SERVER.api_key_file,
    extra_api_keys: Annotated[
        list[str] | None, flag("extra_api_keys", SERVER, "--extra-api-key", metavar="KEY", show_default=False)
    ] = None,
    admin_api_key: Annotated[
        str | None, flag("admin_api_key", SERVER, metavar="KEY", envvar="BRANCHWISE_ADMIN_API_KEY", show_default=False)
    ] = _SERVER.admin_api_key,
    served_model_name: Annotated[
        str | None, flag("served_model_name", SERVER, metavar="NAME", show_default=False)
    ] = _SERVER.served_model_name,
    max_queued_requests: Annotated[
        int, flag("max_queued_requests", SERVER, min=1, metavar="N")
    ] = _SERVER.max_queued_requests,
    max_queued_per_key: Annotated[
        int | None, flag("max_queued_per_key", SERVER, min=1, metavar="N", show_default=False)
    ] = _SERVER.max_queued_per_key,
    request_timeout: Annotated[
        float | None, flag("request_timeout", SERVER, min=0.1, metavar="SECONDS", show_default=False)
    ] = _SERVER.request_timeout,
    max_prompts_per_request: Annotated[
        int, flag("max_prompts_per_request", LIMITS, min=1, metavar="N")
    ] = _SERVER.max_prompts_per_request,
    max_samples_per_request: Annotated[
        int, flag("max_samples_per_request", LIMITS, min=1, metavar="N")
    ] = _SERVER.max_samples_per_request,
    max_messages: Annotated[int, flag("max_messages", LIMITS, min=1, metavar="N")] = _SERVER.max_messages,
    max_tools: Annotated[int, flag("max_tools", LIMITS, min=1, metavar="N")] = _SERVER.max_tools,
    max_json_depth: Annotated[int, flag("max_json_depth", LIMITS, min=1, metavar="N")] = _SERVER.max_json_depth,
    max_json_values: Annotated[int, flag("max_json_values", LIMITS, min=1, metavar="N")] = _SERVER.max_json_values,
    max_body_bytes: Annotated[int, flag("max_body_bytes", LIMITS, min=1, metavar="N")] = _SERVER.max_body_bytes,
    max_header_bytes: Annotated[int, flag("max_header_bytes", LIMITS, min=1, metavar="N")] = _SERVER.max_header_bytes,
    tool_call_parser: Annotated[str, flag("tool_call_parser", MODEL, metavar="NAME")] = _SERVER.tool_call_parser,
    reasoning_parser: Annotated[str, flag("reasoning_parser", MODEL, metavar="NAME")] = _SERVER.reasoning_parser,
    drain_seconds: Annotated[float, flag("drain_seconds", SERVER, min=0, metavar="SECONDS")] = _SERVER.drain_seconds,
    log_level: Annotated[LogLevel, flag("log_level", SERVER, metavar="NAME")] = _SERVER.log_level,
    stats_log_seconds: Annotated[
        float, flag("stats_log_seconds", SERVER, min=0, metavar="SECONDS")
    ] = _SERVER.stats_log_seconds,
    load_format: LoadFormatFlag = _ENGINE.load_format,
    dtype: DtypeFlag = _ENGINE.dtype,
    device: Device = _ENGINE.device,
    max_model_len: MaxModelLen = _ENGINE.max_model_len,
    tensor_parallel_size: Annotated[
        int, flag("tensor_parallel_size", MODEL, metavar="N")
    ] = _ENGINE.tensor_parallel_size,
    sampling_defaults: Annotated[
        SamplingDefaults, flag("sampling_defaults", MODEL, metavar="NAME")
    ] = _ENGINE.sampling_defaults,
    attention_backend: Annotated[
        Literal["auto", "torch", "flashinfer", "triton"], flag("attention_backend", MODEL, metavar="NAME")
    ] = _ENGINE.attention_backend,
    cuda_graphs: Annotated[bool, flag("cuda_graphs", MODEL, "--cuda-graphs/--no-cuda-graphs")] = _ENGINE.cuda_graphs,
    jump_forward: Annotated[
        bool, flag("jump_forward", MODEL, "--jump-forward/--no-jump-forward")
    ] = _ENGINE.jump_forward,
    profile: Annotated[str | None, flag("profile", SERVER, metavar="FOLDER", show_default=False)] = _ENGINE.profile,
    seed: Annotated[int, flag("seed", MODEL, metavar="N")] = _ENGINE.seed,
    gpu_memory_utilization: Annotated[
        float, flag("gpu_memory_utilization", MEMORY, metavar="X")
    ] = _ENGINE.gpu_memory_utilization,
    kv_cache_tokens: Annotated[
        int | None, flag("kv_cache_tokens", MEMORY, metavar="N", show_default=False)
    ] = _ENGINE.kv_cache_tokens,
    kv_cache_dtype: Annotated[Literal["auto"], flag("kv_cache_dtype", MEMORY, metavar="TYPE")] = _ENGINE.kv_cache_dtype,
    page_size: Annotated[int, flag("page_size", MEMORY, metavar="N")] = _ENGINE.page_size,
    eviction_policy: Annotated[
        EvictionPolicy, flag("eviction_policy", MEMORY, metavar="NAME")
    ] = _ENGINE.eviction_policy,
    max_pinned_share: Annotated[float, flag("max_pinned_share", MEMORY, metavar="X")] = _ENGINE.max_pinned_share,
    pinned_share_per_key: Annotated[
        float, flag("pinned_share_per_key", MEMORY, metavar="X")
    ] = _ENGINE.pinned_share_per_key,
    max_pin_ttl: Annotated[float, flag("max_pin_ttl", MEMORY, metavar="SECONDS")] = _ENGINE.max_pin_ttl,
    disable_radix_cache: Annotated[
        bool, flag("disable_radix_cache", MEMORY, "--disable-radix-cache")
    ] = _ENGINE.disable_radix_cache,
    max_branches: Annotated[int, flag("max_branches", MEMORY, metavar="N")] = _ENGINE.max_branches,
    branch_ttl: Annotated[float, flag("branch_ttl", MEMORY, metavar="SECONDS")] = _ENGINE.branch_ttl,
    check_when_idle: Annotated[bool, flag("check_when_idle", MEMORY, "--check-when-idle")] = _ENGINE.check_when_idle,
    max_num_seqs: Annotated[int, flag("max_num_seqs", SCHEDULING, metavar="N")] = _ENGINE.max_num_seqs,
    max_num_batched_tokens: Annotated[
        int | None, flag("max_num_batched_tokens", SCHEDULING, metavar="N", show_default=False)
    ] = _ENGINE.max_num_batched_tokens,
    schedule_policy: Annotated[
        SchedulePolicy, flag("schedule_policy", SCHEDULING, metavar="NAME")
    ] = _ENGINE.schedule_policy,
) -> None:
    """Serve a model over HTTP.

    Answers OpenAI's **/v1/chat/completions**, **/v1/completions** and **/v1/responses**, Anthropic's
    **/v1/messages** and SGLang's **/generate**; **/cache/tree** shows what is remembered, **/metrics** is for
    Prometheus, **/openapi.json** lists every route. Ctrl-C finishes what is in flight and leaves; a second one
    leaves at once. A model or setting that cannot be loaded exits 2.
    """
    flags = dict(locals()) | {"extra_api_keys": tuple(extra_api_keys or ())}
    with expected_failures():
        from ...runtime.config import check_server
        from ...runtime.errors import LoadError

        for key, variable in ((api_key, "BRANCHWISE_API_KEY"), (admin_api_key, "BRANCHWISE_ADMIN_API_KEY")):
            if key is None and os.environ.get(variable) == "":  # typer ignores it, and the server would be open to all
                raise LoadError(f"{variable} is set and empty: set it to a key, or unset it")
        engine = EngineConfig(**{name: flags[name] for name in EngineConfig.__struct_fields__ if name in flags})
        config = ServerConfig(
            engine=engine, **{name: flags[name] for name in ServerConfig.__struct_fields__ if name in flags}
        )
        _run(check_server(config))


def _run(config: ServerConfig) -> None:
    from rich.logging import RichHandler

    from ...runtime.models.folder import model_folder
    from ...runtime.server.server import run_server
    from . import checkup

    handler = RichHandler(console=err, show_path=False, markup=False, log_time_format="%Y-%m-%d %H:%M:%S")
    logging.basicConfig(level=config.log_level.upper(), format="%(message)s", handlers=[handler])
    model_folder(config.engine.model)  # a path that holds no model is said before "loading"
    # and so is a taken port: then the start fails at once and says why itself
    startup = _Startup(config, announce=checkup.port(config.host, config.port).state == "ok")
    with startup:
        code = run_server(config, startup.ready, startup.progress)
    raise SystemExit(code)


class _Startup:
    """Shows how a start goes: a bar while weights load, then the memory plan and one line that says it is ready."""

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
            disable=not err.is_terminal,  # where nobody watches, all it leaves is an empty line
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
        wanted = info["preferred_sampling_params"]
        if wanted:
            values = ", ".join(f"{name} {value}" for name, value in wanted.items())
            out.print(f"  the model's own where a request is silent: {values}", markup=False, soft_wrap=True)
        url = f"http://{_reachable(info['host'])}:{info['port']}"
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


def _reachable(host: str) -> str:
    """An address this machine can use for ``host``: an address to listen on may be all of them."""
    shown = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"[{shown}]" if ":" in shown else shown
