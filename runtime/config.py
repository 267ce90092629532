"""Settings of an engine and of a server."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, get_args, get_type_hints

import msgspec

from .errors import LoadError, why

Dtype = Literal["auto", "float32", "bfloat16", "float16"]
SchedulePolicy = Literal["hrrn", "fcfs", "lpm", "priority"]
EvictionPolicy = Literal["lru", "lfu", "fifo", "priority"]
Preemption = Literal["auto", "recompute", "swap"]
SamplingDefaults = Literal["model", "neutral", "openai"]  # openai: SGLang's word for neutral
DISK_WRITE_SECONDS = 30.0  # that writing the rest of the disk cache may take when the engine is closed


class EngineConfig(msgspec.Struct, frozen=True, kw_only=True):
    """One engine: a model on a device, a KV pool, a tree, a scheduler.

    Args:
        model: A folder, a Hugging Face hub id, or nothing for the model that ships with the package.
        load_format: auto, or dummy: random weights of the config's shapes, for benchmarks.
        model_impl: Who computes the model: native, our decoder; transformers, its layers with our attention (needs
            transformers 5); auto, native where it has the architecture.
        trust_remote_code: Run Python files that come with a model, with all rights of the server. For models that
            transformers computes.
        dtype: Type of weights and KV: auto, float32, bfloat16 or float16. auto: the checkpoint's; on a CPU bfloat16 if
            the checkpoint has it and the processor multiplies it natively, else float32.
        quantization: Format of linear layers' weights: auto, the checkpoint's own; fp8, quantized while loading; int8,
            for CPUs.
        device: auto, cpu, cuda or cuda:N.
        seed: For requests without a seed, and for dummy weights; 0 or more.
        max_model_len: Longest prompt and answer together, in tokens; 1 or more. Default: the model's own.
        max_num_seqs: Requests running at once. From 1 to 4096.
        max_num_batched_tokens: Tokens of one step: prompt chunks and decodes; 1 or more. Default: 2048 on a CPU, 8192
            on a GPU. Beside decodes, prompts with up to 512 tokens to compute fill a step to 1024.
        page_size: Tokens of one KV page. From 1 to 256. Reuse is exact to the token at any size.
        kv_cache_dtype: Storage of cached keys and values: auto, the weights' own; fp8, half the bytes of bfloat16; int4
            or nvfp4, about a quarter; k16v8, keys as auto and values as fp8.
        kv_cache_tokens: Tokens the KV cache holds; 1 or more. Default: by memory.
        gpu_memory_utilization: Share of the GPU's memory to use, captured steps aside; on a CPU, of half the free
            memory. From 0.05 to 0.98.
        tensor_parallel_size: GPUs (on a CPU: processes) to split the model over; a divisor of its attention heads. From
            1 to 64.
        attention_backend: Attention kernels: on a GPU tree, which reads each shared prefix once, flashinfer or triton,
            which read it once for each request; torch; or auto, the fastest that runs here.
        sampling_defaults: Sampling parameters that a request omits: model, those of its generation_config.json, or
            neutral (SGLang's name: openai), temperature and top_p 1 and no other filter.
        deterministic: The same tokens and logprobs, to the bit, whatever else is in the batch and in the cache: fixed
            shapes and orders of sums. Slower.
        cuda_graphs: Capture steps of up to about a thousand tokens, so that each is one launch.
        schedule_policy: Which request is admitted first: hrrn weighs waiting time against uncached work, lpm takes the
            longest cached prefix, fcfs the oldest, priority the one with the highest priority.
        eviction_policy: What to evict first when the cache is full: lru, lfu, fifo or priority.
        host_cache: Memory of the host that keeps what the device evicts: a size such as 64GiB; 0 for none, which is the
            default.
        host_cache_dtype: How the host and the disk store keys and values: auto, byte for byte; fp8, rounded, in about
            half the bytes of bfloat16. With fp8 an answer can depend on which memory its prefix comes from.
        disk_cache: Folder that keeps the cache across restarts. One server at a time can use it. Default: none.
        disk_cache_size: Bytes of the folder that cached pages may take: a size such as 200GiB.
        disk_cache_salted: Also write prefixes of requests with a cache salt, which by default never leave memory.
        preemption: What becomes of a running request's keys and values when memory is short: swap copies them to the
            host and back, recompute computes them again, auto does what is faster.
        disable_radix_cache: Reuse nothing across requests, to compare.
        max_branches: Branches kept at once; one more is refused with a 429. From 0 to 1000000.
        max_branches_per_key: Branches of one API key; one more is refused with a 429. From 0 to 1000000. Default: an
            equal share of max_branches for each key of the server.
        branch_ttl: Seconds a branch lives after its last use. From 1 to 604800.
        max_pinned_share: Share of the KV cache that pins and cache breakpoints may keep from eviction. From 0 to 0.9.
        pinned_share_per_key: Share of that for one API key. From 0 to 1. Default: an equal share for each key of the
            server.
        max_pin_ttl: Seconds a pin or breakpoint may last at most. From 1 to 31536000.
        jump_forward: Append tokens that a grammar forces without a forward pass for each.
        overlap: Plan step N+1 while step N runs. Default: on a GPU only.
        instance: Name of this engine among replicas: its ids of branches and pins then tell which one made them.
        profile: Folder for the Chrome traces of POST /start_profile and /stop_profile. Default: none; both are refused.
        check_when_idle: Verify tree and pages whenever the engine becomes idle, for debugging.
    """

    model: str = ""
    load_format: Literal["auto", "dummy"] = "auto"
    model_impl: Literal["auto", "native", "transformers"] = "auto"
    trust_remote_code: bool = False
    dtype: Dtype = "auto"
    quantization: Literal["auto", "fp8", "int8"] = "auto"
    device: str = "auto"
    seed: int = 0

    max_model_len: int | None = None
    max_num_seqs: int = 256
    max_num_batched_tokens: int | None = None
    page_size: int = 16
    kv_cache_dtype: Literal["auto", "fp8", "int4", "nvfp4", "k16v8"] = "auto"
    kv_cache_tokens: int | None = None
    gpu_memory_utilization: float = 0.92
    tensor_parallel_size: int = 1
    attention_backend: Literal["auto", "tree", "flashinfer", "triton", "torch"] = "auto"
    sampling_defaults: SamplingDefaults = "model"
    deterministic: bool = False
    cuda_graphs: bool = True

    schedule_policy: SchedulePolicy = "hrrn"
    eviction_policy: EvictionPolicy = "lru"
    host_cache: str = "0"
    host_cache_dtype: Literal["auto", "fp8"] = "auto"
    disk_cache: str | None = None
    disk_cache_size: str = "64GiB"
    disk_cache_salted: bool = False
    preemption: Preemption = "auto"
    disable_radix_cache: bool = False
    max_branches: int = 4096
    max_branches_per_key: int | None = None
    branch_ttl: float = 600.0
    max_pinned_share: float = 0.25
    pinned_share_per_key: float | None = None
    max_pin_ttl: float = 86_400.0
    jump_forward: bool = True
    overlap: bool | None = None
    instance: str = ""
    profile: str | None = None
    check_when_idle: bool = False


class ServerConfig(msgspec.Struct, frozen=True, kw_only=True):
    """One server: an engine behind processes and HTTP.

    Args:
        engine: The engine's settings.
        host: Address to listen on.
        port: Port to listen on. 0: any free one.
        api_key: Key that every route requires but /health and the files of /ui. Default: none is required.
        api_key_file: File that holds api_key, such as a mounted secret. Default: none.
        extra_api_keys: Further keys, each with its own part of the cache.
        admin_api_key: Key for routes that affect all keys: flush, evict, tree, all stats. Default: api_key.
        allowed_hosts: Names of this server, beside localhost, that requests without a key may have in their Host and
            Origin headers.
        allow_origins: Web sites whose pages may call this server (CORS), such as http://localhost:3000. *: all; needs
            api_key.
        served_model_name: Name clients use. Default: the model's.
        max_queued_requests: Most unfinished requests; one more is refused with a 503.
        max_queued_per_key: Most unfinished requests of one API key; one more is refused with a 429. Default: an equal
            share of max_queued_requests for each key of the server.
        request_timeout: Seconds after which a request is ended with an error (504). Default: none.
        max_body_bytes: Bytes of a request's body.
        max_total_body_bytes: Bytes of the bodies of all unfinished requests, not counting the first 64 KiB of each; one
            more is refused with a 503.
        max_prompts_per_request: Prompts of one request.
        max_samples_per_request: Prompts × n of one request.
        max_messages: Messages of one conversation.
        max_tools: Tools of one request.
        max_json_depth: Nesting depth of a body's objects and lists.
        max_json_values: Names and values of a body, not counting token ids; lists and objects count twice.
        max_header_bytes: Bytes of a request's line and headers.
        tool_call_parser: How the model writes tool calls: hermes, llama3_json, mistral, qwen3_coder, pythonic, none, or
            auto: as its chat template says.
        reasoning_parser: How the model writes its thinking: think, mistral, none, or auto: as its chat template says.
        drain_delay: Seconds after SIGTERM or Ctrl-C in which requests are still taken while /health already says 503,
            for load balancers to go elsewhere.
        drain_seconds: Seconds that requests in flight may take to finish after that.
        hang_timeout: Seconds for which a process of the engine, or a step on its device, may hang before every client
            gets an error and the server ends. /health says 503 after 10 s. Loading does not count. 0: no limit.
        restart: Times within an hour that a dead or hanging engine is replaced, after 1, 2, 4, … seconds; its requests
            fail, and its branches, pins and cache are lost. 0: the server ends. From 0 to 100.
        log_level: debug, info, warning or error.
        log_format: text, or json: an object a line.
        log_requests: Log a line for each request: id, owner, tokens, times and how it ended; never its text.
        stats_log_seconds: Seconds between lines about the load, while there is work. 0: no such lines.
        ui: Serve the page at /ui: the tree as it changes, figures, and conversations that branch. Default: on a
            loopback host.
        kv_events: Address on which to publish which blocks of tokens enter and leave the cache, in vLLM's and SGLang's
            format: tcp://127.0.0.1:5557; port * is any free one. Whoever can connect sees all keys' prompts. Default:
            none.
        kv_events_replay: Address at which subscribers can get batches of events again that they have missed.
        namespace_secret: Key of the digests that name the parts of the cache that API keys and salts have. Replicas
            behind one router must have the same one. Default: a random one, or the disk cache's.
        null_executor: Serve without a model, to measure everything else: tokens are a hash of their position.
        null_step_seconds: Seconds that each step of the null executor takes.
    """

    engine: EngineConfig
    host: str = "127.0.0.1"
    port: int = 8000
    api_key: str | None = None
    api_key_file: str | None = None
    extra_api_keys: tuple[str, ...] = ()
    admin_api_key: str | None = None
    allowed_hosts: tuple[str, ...] = ()
    allow_origins: tuple[str, ...] = ()
    served_model_name: str | None = None
    max_queued_requests: int = 4096
    max_queued_per_key: int | None = None
    request_timeout: float | None = None
    max_body_bytes: int = 16 * 1024 * 1024
    max_total_body_bytes: int = 512 * 1024 * 1024
    max_prompts_per_request: int = 1024
    max_samples_per_request: int = 1024
    max_messages: int = 16_384
    max_tools: int = 1024
    max_json_depth: int = 64
    max_json_values: int = 262_144
    max_header_bytes: int = 64 * 1024
    tool_call_parser: str = "auto"
    reasoning_parser: str = "auto"
    drain_delay: float = 0.0
    drain_seconds: float = 30.0
    hang_timeout: float = 300.0
    restart: int = 0
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    log_format: Literal["text", "json"] = "text"
    log_requests: bool = False
    stats_log_seconds: float = 10.0
    ui: bool | None = None
    kv_events: str | None = None
    kv_events_replay: str | None = None
    namespace_secret: str | None = None
    null_executor: bool = False
    null_step_seconds: float = 0.0

    @property
    def has_ui(self) -> bool:
        """Whether the page at ``/ui`` is served."""
        return self.host in ("127.0.0.1", "::1", "localhost") if self.ui is None else self.ui


def step_budget(config: EngineConfig, *, gpu: bool) -> int:
    """Query tokens that one step may have: the setting, or the device's default."""
    return config.max_num_batched_tokens or max(config.max_num_seqs, 8192 if gpu else 2048)


def engine_config(model: str, settings: Mapping[str, Any]) -> EngineConfig:
    """The checked config of an `Engine`. Raises `LoadError`; TypeError for an unknown keyword, naming the closest."""
    for name in settings:
        if name not in EngineConfig.__struct_fields__:
            close = difflib.get_close_matches(name, EngineConfig.__struct_fields__, 1)
            hint = f"did you mean {close[0]!r}?" if close else "see EngineConfig for all of them"
            raise TypeError(f"the engine has no setting {name!r}: {hint}")
    return check(EngineConfig(model=model, **settings))


def check(config: EngineConfig) -> EngineConfig:
    """Raises `LoadError` naming the flag and its limits; returns the config unchanged."""
    _check_types(config)
    for name, low, high in (
        ("page_size", 1, 256),
        ("max_num_seqs", 1, 4096),
        ("gpu_memory_utilization", 0.05, 0.98),
        ("tensor_parallel_size", 1, 64),
        ("max_branches", 0, 1_000_000),
        ("max_branches_per_key", 0, 1_000_000),
        ("branch_ttl", 1.0, 604_800.0),
        ("max_pinned_share", 0.0, 0.9),
        ("pinned_share_per_key", 0.0, 1.0),
        ("max_pin_ttl", 1.0, 31_536_000.0),
        ("seed", 0, 2**31 - 1),
    ):
        value = getattr(config, name)
        if value is not None and not low <= value <= high:
            raise LoadError(f"--{name.replace('_', '-')} must be between {low} and {high}, got {value}")
    for name in ("max_model_len", "max_num_batched_tokens", "kv_cache_tokens"):
        value = getattr(config, name)
        if value is not None and value < 1:
            raise LoadError(f"--{name.replace('_', '-')} must be at least 1, got {value}")
    _check_tiers(config)
    if config.deterministic and config.model_impl == "transformers":
        raise LoadError(
            "--deterministic cannot be combined with --model-impl transformers: its sums depend on the batch"
        )
    if config.deterministic and config.tensor_parallel_size > 1:
        raise LoadError("--deterministic cannot be combined with --tensor-parallel-size: sums over ranks vary in order")
    if config.deterministic and config.attention_backend != "auto":
        raise LoadError("--deterministic chooses the attention kernels: leave --attention-backend out")
    return config


def _check_tiers(config: EngineConfig) -> None:
    parse_bytes(config.disk_cache_size, "--disk-cache-size")
    asked = parse_bytes(config.host_cache, "--host-cache") > 0 or config.disk_cache is not None
    if asked and config.disable_radix_cache:
        raise LoadError("--disable-radix-cache leaves nothing for --host-cache or --disk-cache to keep")
    if config.host_cache_dtype == "fp8":
        for flag, chosen in (
            (f"--kv-cache-dtype {config.kv_cache_dtype}", config.kv_cache_dtype != "auto"),
            ("--preemption swap", config.preemption == "swap"),
            ("--deterministic", config.deterministic),
        ):
            if chosen:
                raise LoadError(f"--host-cache-dtype fp8 rounds keys and values, which {flag} does not allow")


def parse_bytes(text: str, flag: str = "") -> int:
    """Bytes of a size such as ``64GiB``, ``1.5 GB`` or ``0``. Raises `LoadError` naming the flag."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]i?B?|B?)", text.strip(), re.IGNORECASE)
    if found is None:
        raise LoadError(f"{flag} {text!r} is not a size: write it like 64GiB")
    unit = found[2].upper()
    power = "BKMGT".index(unit[0]) if unit else 0
    return int(float(found[1]) * (1000 if unit.endswith("B") and "I" not in unit and power else 1024) ** power)


def check_server(config: ServerConfig) -> ServerConfig:
    """Checks the engine's settings and the API keys.

    Returns the config with ``api_key`` read from ``api_key_file``, and with the limits of one key that were left out.

    Raises `LoadError` naming the flag. An empty key is an error rather than no key: the server would be open to all.
    """
    check(config.engine)
    _check_types(config)
    if config.kv_events_replay is not None and config.kv_events is None:
        raise LoadError("--kv-events-replay needs --kv-events: there is nothing to replay")
    if config.kv_events is not None and config.engine.disable_radix_cache:
        raise LoadError("--kv-events: nothing is cached with --disable-radix-cache")
    if not 0 <= config.restart <= 100:
        raise LoadError(f"--restart must be between 0 and 100, got {config.restart}")
    key_flag = "--api-key"
    if config.api_key_file is not None:
        key_flag = "--api-key-file"
        if config.api_key is not None:
            raise LoadError("--api-key and --api-key-file: give one of them")
        config = msgspec.structs.replace(config, api_key=_read_key(config.api_key_file), api_key_file=None)
    for flag, keys in (
        (key_flag, (config.api_key,)),
        ("--extra-api-key", config.extra_api_keys),
        ("--admin-api-key", (config.admin_api_key,)),
    ):
        for key in keys:
            if key is not None and (not key or not key.isprintable() or any(map(str.isspace, key))):
                raise LoadError(f"{flag}: a key must not be empty or hold spaces or control characters")
    tenants = [*config.extra_api_keys, config.api_key]
    if len(set(tenants)) < len(tenants) or config.admin_api_key in config.extra_api_keys:
        raise LoadError("--extra-api-key: a key must differ from every other key, as it has its own part of the cache")
    if config.extra_api_keys and config.api_key is None:
        raise LoadError("--extra-api-key needs --api-key, whose cache is the server's own")
    _check_origins(config)
    return _with_shares(config)


def _check_origins(config: ServerConfig) -> None:
    for origin in config.allow_origins:
        if origin == "*":
            if config.api_key is None:
                raise LoadError("--allow-origins '*' lets every web site use this server: it needs --api-key")
        elif re.fullmatch(r"[a-z][a-z0-9+.-]*://[^/\s]+", origin) is None:
            raise LoadError(f"--allow-origins {origin!r} is not an origin: write it like https://app.example:8443")


def _with_shares(config: ServerConfig) -> ServerConfig:
    """Gives each key an equal share of what is limited in total, so that no key can use up what others need."""
    engine, keys = config.engine, 1 + len(config.extra_api_keys)
    if keys == 1:
        return config
    if engine.max_branches_per_key is None:
        engine = msgspec.structs.replace(engine, max_branches_per_key=-(-engine.max_branches // keys))
    if engine.pinned_share_per_key is None:
        engine = msgspec.structs.replace(engine, pinned_share_per_key=1 / keys)
    queued = config.max_queued_per_key
    if queued is None:
        queued = -(-config.max_queued_requests // keys)
    return msgspec.structs.replace(config, engine=engine, max_queued_per_key=queued)


def _check_types(config: EngineConfig | ServerConfig) -> None:
    try:
        msgspec.convert(msgspec.to_builtins(config), type(config))
    except msgspec.ValidationError as error:  # "Invalid enum value 'zz' - at `$.dtype`"
        problem, _, where = str(error).partition(" - at `$.")
        field = where.rstrip("`")
        choices = [value for value in get_args(get_type_hints(type(config))[field]) if isinstance(value, str)]
        if choices:
            problem = f"must be one of {', '.join(choices)}, got {getattr(config, field)!r}"
        raise LoadError(f"--{field.replace('_', '-')}: {problem}") from error


def _read_key(path: str) -> str:
    try:
        return Path(path).expanduser().read_text(encoding="utf-8").rstrip("\r\n")
    except (OSError, UnicodeDecodeError) as error:
        raise LoadError(f"--api-key-file {path} cannot be read: {why(error, Path(path).expanduser())}") from error
