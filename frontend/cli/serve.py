"""``branchwise serve``: starts a server and says what it does while it starts."""

from __future__ import annotations

import logging
import time
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from ...runtime.config import EngineConfig, EvictionPolicy, SchedulePolicy, ServerConfig
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
)

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

_ENGINE = EngineConfig()  # the defaults are the config's
_SERVER = ServerConfig(engine=_ENGINE)


def serve(
    model: Model = _ENGINE.model,
    host: Annotated[
        str, typer.Option(metavar="HOST", help="Address to listen on.", rich_help_panel=SERVER)
    ] = _SERVER.host,
    port: Annotated[
        int,
        typer.Option(min=0, max=65535, metavar="N", help="Port to listen on; 0: any free one.", rich_help_panel=SERVER),
    ] = _SERVER.port,
    api_key: Annotated[
        str | None,
        typer.Option(
            metavar="KEY",
            envvar="BRANCHWISE_API_KEY",
            help="Key every route but /health asks for.",
            rich_help_panel=SERVER,
            show_default=False,
        ),
    ] = _SERVER.api_key,
    extra_api_keys: Annotated[
        list[str] | None,
        typer.Option(
            "--extra-api-key",
            metavar="KEY",
            help="A further key, with a cache of its own. Repeatable.",
            rich_help_panel=SERVER,
            show_default=False,
        ),
    ] = None,
    admin_api_key: Annotated[
        str | None,
        typer.Option(
            metavar="KEY",
            envvar="BRANCHWISE_ADMIN_API_KEY",
            help="Key for what touches everybody's cache: flush, evict, tree, all stats. Default: --api-key.",
            rich_help_panel=SERVER,
            show_default=False,
        ),
    ] = _SERVER.admin_api_key,
    served_model_name: Annotated[
        str | None,
        typer.Option(
            metavar="NAME", help="Name clients use. Default: MODEL.", rich_help_panel=SERVER, show_default=False
        ),
    ] = _SERVER.served_model_name,
    max_queued_requests: Annotated[
        int, typer.Option(min=1, metavar="N", help="Unfinished requests beyond this get a 503.", rich_help_panel=SERVER)
    ] = _SERVER.max_queued_requests,
    max_queued_per_key: Annotated[
        int | None,
        typer.Option(
            min=1,
            metavar="N",
            help="Of those, one API key's; beyond this it gets a 429. Default: all of them.",
            rich_help_panel=SERVER,
            show_default=False,
        ),
    ] = _SERVER.max_queued_per_key,
    request_timeout: Annotated[
        float | None,
        typer.Option(
            min=0.1,
            metavar="SECONDS",
            help="A request that takes longer is ended with an error (504). Default: none.",
            rich_help_panel=SERVER,
            show_default=False,
        ),
    ] = _SERVER.request_timeout,
    max_prompts_per_request: Annotated[
        int, typer.Option(min=1, metavar="N", help="Prompts of one request.", rich_help_panel=LIMITS)
    ] = _SERVER.max_prompts_per_request,
    max_samples_per_request: Annotated[
        int, typer.Option(min=1, metavar="N", help="Prompts × n of one request.", rich_help_panel=LIMITS)
    ] = _SERVER.max_samples_per_request,
    max_n: Annotated[
        int, typer.Option(min=1, max=_SERVER.max_n, metavar="N", help="Samples of one prompt.", rich_help_panel=LIMITS)
    ] = _SERVER.max_n,
    max_stop_strings: Annotated[
        int,
        typer.Option(
            min=1,
            max=_SERVER.max_stop_strings,
            metavar="N",
            help="Stop strings of one request.",
            rich_help_panel=LIMITS,
        ),
    ] = _SERVER.max_stop_strings,
    max_stop_length: Annotated[
        int,
        typer.Option(
            min=1, max=_SERVER.max_stop_length, metavar="N", help="Characters of a stop string.", rich_help_panel=LIMITS
        ),
    ] = _SERVER.max_stop_length,
    max_logit_bias: Annotated[
        int,
        typer.Option(
            min=1, max=_SERVER.max_logit_bias, metavar="N", help="Entries of logit_bias.", rich_help_panel=LIMITS
        ),
    ] = _SERVER.max_logit_bias,
    max_top_logprobs: Annotated[
        int,
        typer.Option(
            min=1,
            max=_SERVER.max_top_logprobs,
            metavar="N",
            help="Alternatives beside a token's logprob.",
            rich_help_panel=LIMITS,
        ),
    ] = _SERVER.max_top_logprobs,
    max_messages: Annotated[
        int, typer.Option(min=1, metavar="N", help="Messages of one conversation.", rich_help_panel=LIMITS)
    ] = _SERVER.max_messages,
    max_tools: Annotated[
        int, typer.Option(min=1, metavar="N", help="Tools of one request.", rich_help_panel=LIMITS)
    ] = _SERVER.max_tools,
    max_schema_bytes: Annotated[
        int,
        typer.Option(
            min=1,
            max=_SERVER.max_schema_bytes,
            metavar="N",
            help="Bytes of a JSON schema, a pattern or a grammar. A tool's parameters: 65536 at most.",
            rich_help_panel=LIMITS,
        ),
    ] = _SERVER.max_schema_bytes,
    max_schema_depth: Annotated[
        int,
        typer.Option(
            min=1,
            max=_SERVER.max_schema_depth,
            metavar="N",
            help="Levels of a schema's objects and lists.",
            rich_help_panel=LIMITS,
        ),
    ] = _SERVER.max_schema_depth,
    max_json_depth: Annotated[
        int,
        typer.Option(min=1, metavar="N", help="Levels of a body's objects and lists.", rich_help_panel=LIMITS),
    ] = _SERVER.max_json_depth,
    max_json_values: Annotated[
        int,
        typer.Option(
            min=1,
            metavar="N",
            help="Names and values of a body, lists and objects twice, but for token ids.",
            rich_help_panel=LIMITS,
        ),
    ] = _SERVER.max_json_values,
    max_body_bytes: Annotated[
        int, typer.Option(min=1, metavar="N", help="Bytes of a request's body.", rich_help_panel=LIMITS)
    ] = _SERVER.max_body_bytes,
    max_header_bytes: Annotated[
        int, typer.Option(min=1, metavar="N", help="Bytes of a request's line and headers.", rich_help_panel=LIMITS)
    ] = _SERVER.max_header_bytes,
    tool_call_parser: Annotated[
        str,
        typer.Option(
            metavar="NAME",
            help="How the model writes tool calls: hermes, llama3_json, mistral, qwen3_coder, pythonic, none, or auto: "
            "as its chat template says.",
            rich_help_panel=MODEL,
        ),
    ] = _SERVER.tool_call_parser,
    reasoning_parser: Annotated[
        str,
        typer.Option(
            metavar="NAME",
            help="How the model writes its thinking: think, mistral, none, or auto: as its chat template says.",
            rich_help_panel=MODEL,
        ),
    ] = _SERVER.reasoning_parser,
    drain_seconds: Annotated[
        float,
        typer.Option(
            min=0,
            metavar="SECONDS",
            help="Time requests in flight get after SIGTERM or Ctrl-C.",
            rich_help_panel=SERVER,
        ),
    ] = _SERVER.drain_seconds,
    log_level: Annotated[
        LogLevel, typer.Option(metavar="NAME", help="debug, info, warning or error.", rich_help_panel=SERVER)
    ] = _SERVER.log_level,
    load_format: LoadFormatFlag = _ENGINE.load_format,
    dtype: DtypeFlag = _ENGINE.dtype,
    device: Device = _ENGINE.device,
    max_model_len: MaxModelLen = _ENGINE.max_model_len,
    tensor_parallel_size: Annotated[
        int, typer.Option(metavar="N", help="GPUs to split the model over; only 1 so far.", rich_help_panel=MODEL)
    ] = _ENGINE.tensor_parallel_size,
    attention_backend: Annotated[
        Literal["auto", "torch", "flashinfer", "triton"],
        typer.Option(
            metavar="NAME",
            help="Attention kernels: flashinfer or triton (on a GPU), torch, or auto: the fastest that runs here.",
            rich_help_panel=MODEL,
        ),
    ] = _ENGINE.attention_backend,
    cuda_graphs: Annotated[
        bool,
        typer.Option(
            "--cuda-graphs/--no-cuda-graphs",
            help="Capture steps of up to about a thousand tokens, so that each is one launch.",
            rich_help_panel=MODEL,
        ),
    ] = _ENGINE.cuda_graphs,
    jump_forward: Annotated[
        bool,
        typer.Option(
            "--jump-forward/--no-jump-forward",
            help="Tokens that a request's grammar leaves no choice about take no forward pass each.",
            rich_help_panel=MODEL,
        ),
    ] = _ENGINE.jump_forward,
    profile: Annotated[
        str | None,
        typer.Option(
            metavar="FOLDER",
            help="Let POST /start_profile and /stop_profile write Chrome traces of the engine's steps here.",
            rich_help_panel=SERVER,
            show_default=False,
        ),
    ] = _ENGINE.profile,
    seed: Annotated[
        int,
        typer.Option(
            metavar="N", help="For requests that bring no seed, and for dummy weights.", rich_help_panel=MODEL
        ),
    ] = _ENGINE.seed,
    gpu_memory_utilization: Annotated[
        float,
        typer.Option(
            metavar="X",
            help="Share of the GPU's memory to use; on a CPU, of half the free memory.",
            rich_help_panel=MEMORY,
        ),
    ] = _ENGINE.gpu_memory_utilization,
    kv_cache_tokens: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            help="Tokens the KV cache holds. Default: by memory.",
            rich_help_panel=MEMORY,
            show_default=False,
        ),
    ] = _ENGINE.kv_cache_tokens,
    kv_cache_dtype: Annotated[
        Literal["auto"],
        typer.Option(
            metavar="TYPE", help="Type of cached keys and values: auto, the weights' own.", rich_help_panel=MEMORY
        ),
    ] = _ENGINE.kv_cache_dtype,
    page_size: Annotated[
        int,
        typer.Option(
            metavar="N", help="Tokens of one KV page. Reuse is exact to the token at any size.", rich_help_panel=MEMORY
        ),
    ] = _ENGINE.page_size,
    eviction_policy: Annotated[
        EvictionPolicy,
        typer.Option(
            metavar="NAME",
            help="What to forget first when memory is short: lru, lfu, fifo or priority.",
            rich_help_panel=MEMORY,
        ),
    ] = _ENGINE.eviction_policy,
    max_pinned_share: Annotated[
        float,
        typer.Option(
            metavar="X",
            help="Share of the KV cache that pins and cache breakpoints may keep from eviction.",
            rich_help_panel=MEMORY,
        ),
    ] = _ENGINE.max_pinned_share,
    pinned_share_per_key: Annotated[
        float, typer.Option(metavar="X", help="Share of that for one API key.", rich_help_panel=MEMORY)
    ] = _ENGINE.pinned_share_per_key,
    max_pin_ttl: Annotated[
        float,
        typer.Option(metavar="SECONDS", help="The longest a pin or breakpoint may last.", rich_help_panel=MEMORY),
    ] = _ENGINE.max_pin_ttl,
    disable_radix_cache: Annotated[
        bool, typer.Option("--disable-radix-cache", help="Remember nothing.", rich_help_panel=MEMORY)
    ] = _ENGINE.disable_radix_cache,
    max_branches: Annotated[
        int,
        typer.Option(
            metavar="N",
            help="Branches kept for clients (POST /branches); past it they get a 429. 0: none.",
            rich_help_panel=MEMORY,
        ),
    ] = _ENGINE.max_branches,
    branch_ttl: Annotated[
        float,
        typer.Option(metavar="SECONDS", help="Time a branch lives after its last use.", rich_help_panel=MEMORY),
    ] = _ENGINE.branch_ttl,
    check_when_idle: Annotated[
        bool,
        typer.Option("--check-when-idle", help="Debugging: verify tree and pages when idle.", rich_help_panel=MEMORY),
    ] = _ENGINE.check_when_idle,
    max_num_seqs: Annotated[
        int, typer.Option(metavar="N", help="Requests running at once.", rich_help_panel=SCHEDULING)
    ] = _ENGINE.max_num_seqs,
    max_num_batched_tokens: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            help="Tokens of one step: prompt chunks and decodes. Default: 2048 on a CPU, 8192 on a GPU.",
            rich_help_panel=SCHEDULING,
            show_default=False,
        ),
    ] = _ENGINE.max_num_batched_tokens,
    schedule_policy: Annotated[
        SchedulePolicy,
        typer.Option(
            metavar="NAME",
            help="Who goes first: hrrn weighs waiting time against uncached work, lpm takes the longest cached "
            "prefix, fcfs the oldest, priority what requests ask for.",
            rich_help_panel=SCHEDULING,
        ),
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
        from ...runtime.config import check

        engine = check(EngineConfig(**{name: flags[name] for name in EngineConfig.__struct_fields__ if name in flags}))
        config = ServerConfig(
            engine=engine, **{name: flags[name] for name in ServerConfig.__struct_fields__ if name in flags}
        )
        _run(config)


def _run(config: ServerConfig) -> None:
    from rich.logging import RichHandler

    from ...runtime.model_folder import model_folder
    from ...runtime.server import run_server
    from . import checkup

    handler = RichHandler(console=err, show_path=False, markup=False)
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
