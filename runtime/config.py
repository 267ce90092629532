"""What an engine and a server are started with. Validated once here, then frozen."""

from __future__ import annotations

from typing import Literal, get_args, get_type_hints

import msgspec

from .errors import LoadError
from .grammar.constraint import MAX_BYTES
from .sampling_params import MAX_LOGIT_BIAS, MAX_LOGPROBS, MAX_N, MAX_STOP_LENGTH, MAX_STOPS

Dtype = Literal["auto", "float32", "bfloat16", "float16"]
SchedulePolicy = Literal["hrrn", "fcfs", "lpm", "priority"]
EvictionPolicy = Literal["lru", "lfu", "fifo", "priority"]


class EngineConfig(msgspec.Struct, frozen=True, kw_only=True):
    """One engine: a model on a device, a KV pool, a tree, a scheduler."""

    model: str = ""  # a folder or a hub id; "" is the model that ships with the package
    load_format: Literal["auto", "dummy"] = "auto"  # dummy: random weights of the config's shape
    dtype: Dtype = "auto"  # auto: the checkpoint's on a GPU, float32 on a CPU
    device: str = "auto"  # auto | cpu | cuda | cuda:N
    seed: int = 0

    max_model_len: int | None = None  # None: the model's own
    max_num_seqs: int = 256  # rows of the page table: requests running at once
    max_num_batched_tokens: int | None = None  # a step's token budget; None: 2048 on a CPU, 8192 on a GPU
    page_size: int = 16
    kv_cache_dtype: Literal["auto"] = "auto"
    kv_cache_tokens: int | None = None  # None: by memory
    gpu_memory_utilization: float = 0.9  # of the GPU's memory; of free memory on a CPU, half of it at most
    tensor_parallel_size: int = 1
    attention_backend: Literal["auto", "torch", "flashinfer", "triton"] = "auto"  # auto: the fastest that runs here
    cuda_graphs: bool = True  # capture steps of up to about a thousand tokens; off: launch every kernel by itself

    schedule_policy: SchedulePolicy = "hrrn"
    eviction_policy: EvictionPolicy = "lru"
    disable_radix_cache: bool = False
    max_branches: int = 4096  # past it no more are made until some have ended
    branch_ttl: float = 600.0  # seconds a branch lives after its last use
    max_pinned_share: float = 0.25  # of the KV pool, that pins and cache breakpoints may keep from eviction
    pinned_share_per_key: float = 1.0  # of that, for one API key
    max_pin_ttl: float = 86_400.0  # seconds
    jump_forward: bool = True  # tokens a grammar leaves no choice about take no forward pass each
    overlap: bool | None = None  # plan step N+1 while N runs; None: on a GPU only
    profile: str | None = None  # a folder: recordings of steps may be started and stopped, and are written there
    check_when_idle: bool = False  # debug: walk the tree and the pages whenever the engine falls idle


class ServerConfig(msgspec.Struct, frozen=True, kw_only=True):
    """One server: an engine behind processes and HTTP."""

    engine: EngineConfig
    host: str = "127.0.0.1"
    port: int = 8000
    api_key: str | None = None
    extra_api_keys: tuple[str, ...] = ()  # of other tenants: each key has a cache of its own
    admin_api_key: str | None = None  # for what touches everybody's cache; None: api_key
    served_model_name: str | None = None
    max_queued_requests: int = 4096  # submitted and not finished; past it the answer is 503
    max_queued_per_key: int | None = None  # of those, one API key's; past it the answer is 429. None: all of them
    request_timeout: float | None = None  # seconds; None: a client that waits may wait as long as its answer takes
    max_body_bytes: int = 16 * 1024 * 1024
    max_prompts_per_request: int = 1024
    max_samples_per_request: int = 1024  # prompts × n
    max_n: int = MAX_N
    max_stop_strings: int = MAX_STOPS
    max_stop_length: int = MAX_STOP_LENGTH  # characters of one
    max_logit_bias: int = MAX_LOGIT_BIAS  # entries
    max_top_logprobs: int = MAX_LOGPROBS
    max_messages: int = 4096  # of one conversation
    max_tools: int = 128
    max_schema_bytes: int = MAX_BYTES  # of a JSON schema, a pattern or a grammar
    max_schema_depth: int = 64  # objects and lists inside one another
    max_json_depth: int = 64  # objects and lists inside one another
    max_json_values: int = 262_144  # names and values of a body, lists and objects twice, but for token ids
    max_header_bytes: int = 64 * 1024  # request line and headers
    tool_call_parser: str = "auto"  # how the model writes calls: a name of `runtime.tools`, auto or none
    reasoning_parser: str = "auto"  # and its thinking
    drain_seconds: float = 30.0  # SIGTERM: time in-flight requests get to finish
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    null_executor: bool = False  # measure the HTTP path without a model: tokens are a hash of the position
    null_step_seconds: float = 0.0  # and how long each of its steps takes


def _choices(field: str) -> tuple[str, ...]:
    """The values a field with a closed list of them takes."""
    return tuple(value for value in get_args(get_type_hints(EngineConfig)[field]) if isinstance(value, str))


def step_budget(config: EngineConfig, *, gpu: bool) -> int:
    """Query tokens one step may hold: the flag, or what suits the device."""
    return config.max_num_batched_tokens or max(config.max_num_seqs, 8192 if gpu else 2048)


def check(config: EngineConfig) -> EngineConfig:
    """Raises `LoadError` naming the flag and its limits; returns the config unchanged."""
    try:
        msgspec.convert(msgspec.to_builtins(config), EngineConfig)
    except msgspec.ValidationError as error:  # "Invalid enum value 'zz' - at `$.dtype`"
        problem, _, where = str(error).partition(" - at `$.")
        field = where.rstrip("`")
        choices = _choices(field)
        if choices:
            problem = f"must be one of {', '.join(choices)}, got {getattr(config, field)!r}"
        raise LoadError(f"--{field.replace('_', '-')}: {problem}") from error
    for name, low, high in (
        ("page_size", 1, 256),
        ("max_num_seqs", 1, 4096),
        ("max_branches", 0, 1_000_000),
        ("branch_ttl", 1.0, 604_800.0),
        ("max_pinned_share", 0.0, 0.9),
        ("pinned_share_per_key", 0.0, 1.0),
        ("max_pin_ttl", 1.0, 31_536_000.0),
        ("seed", 0, 2**31 - 1),
    ):
        value = getattr(config, name)
        if not low <= value <= high:
            raise LoadError(f"--{name.replace('_', '-')} must be between {low} and {high}, got {value}")
    for name in ("max_model_len", "max_num_batched_tokens", "kv_cache_tokens"):
        value = getattr(config, name)
        if value is not None and value < 1:
            raise LoadError(f"--{name.replace('_', '-')} must be at least 1, got {value}")
    if not 0.05 <= config.gpu_memory_utilization <= 0.98:
        raise LoadError(f"--gpu-memory-utilization must be between 0.05 and 0.98, got {config.gpu_memory_utilization}")
    if config.tensor_parallel_size != 1:
        raise LoadError(f"--tensor-parallel-size {config.tensor_parallel_size}: only 1 is supported in this version")
    return config
