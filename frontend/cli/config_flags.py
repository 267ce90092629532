"""Flags generated from the config classes: their names, types, defaults and help are the fields' own."""

from __future__ import annotations

import functools
import inspect
import re
import types
import typing
from collections.abc import Callable, Iterator, Sequence
from typing import Annotated, Any, Union

import msgspec
import typer

from ...runtime.config import EngineConfig, ServerConfig

MODEL, MEMORY, SCHEDULING, SERVER, LIMITS = "Model", "Memory", "Scheduling", "Server", "Limits"

# Set by an argument (model), or only by code: what is for measuring, and what is decided by the device.
_NO_FLAG = {"engine", "model", "overlap", "instance", "namespace_secret", "null_executor", "null_step_seconds"}
_PANELS = {
    MODEL: "load_format model_impl trust_remote_code dtype device max_model_len tensor_parallel_size "
    "sampling_defaults attention_backend cuda_graphs jump_forward seed tool_call_parser reasoning_parser",
    SCHEDULING: "max_num_seqs max_num_batched_tokens schedule_policy",
    SERVER: "max_queued_requests max_queued_per_key profile",
}
_PANEL = {field: panel for panel, fields in _PANELS.items() for field in fields.split()}
_SETTINGS: dict[str, dict[str, Any]] = {
    "host": {"metavar": "HOST"},
    "port": {"min": 0, "max": 65535},
    "api_key": {"metavar": "KEY", "envvar": "BRANCHWISE_API_KEY"},
    "api_key_file": {"metavar": "FILE"},
    "extra_api_keys": {"metavar": "KEY"},
    "allowed_hosts": {"metavar": "HOST"},
    "allow_origins": {"metavar": "ORIGIN"},
    "admin_api_key": {"metavar": "KEY", "envvar": "BRANCHWISE_ADMIN_API_KEY"},
    "dtype": {"metavar": "TYPE"},
    "kv_cache_dtype": {"metavar": "TYPE"},
    "quantization": {"metavar": "FORMAT"},
    "profile": {"metavar": "FOLDER"},
    "host_cache": {"metavar": "SIZE"},
    "host_cache_dtype": {"metavar": "TYPE"},
    "disk_cache": {"metavar": "FOLDER"},
    "disk_cache_size": {"metavar": "SIZE"},
    "kv_events": {"metavar": "ADDRESS"},
    "kv_events_replay": {"metavar": "ADDRESS"},
    "request_timeout": {"min": 0.1},
    "drain_delay": {"min": 0},
    "drain_seconds": {"min": 0},
    "hang_timeout": {"min": 0},
    "stats_log_seconds": {"min": 0},
}


def field_docs(kind: type) -> dict[str, str]:
    """The ``Args:`` of a class's docstring by field, on one line; {} under ``python -OO``."""
    _, _, lines = inspect.cleandoc(kind.__doc__ or "").partition("Args:\n")
    fields = re.findall(r"^    (\w+): (.*(?:\n        .*)*)", lines, re.MULTILINE)
    return {name: re.sub(r"\n *", " ", text) for name, text in fields}


def config_flags(*fields: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Decorates a command: its ``**settings`` become one flag for each of ``fields``; without ``fields``, for each that
    a server has."""

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        hints = typing.get_type_hints(command, include_extras=True)
        own = [
            parameter.replace(annotation=hints[parameter.name])
            for parameter in inspect.signature(command).parameters.values()
            if parameter.kind is not parameter.VAR_KEYWORD
        ]

        @functools.wraps(command)
        def run(**arguments: Any) -> None:
            command(**arguments)

        parameters = [*own, *_flags(fields)]
        run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
        return run

    return decorate


def _flags(fields: Sequence[str]) -> Iterator[inspect.Parameter]:
    for kind in (ServerConfig, EngineConfig):
        types_, docs = typing.get_type_hints(kind), field_docs(kind)
        for field in msgspec.structs.fields(kind):
            if field.name in fields or (not fields and field.name not in _NO_FLAG):
                yield _flag(kind, field, types_[field.name], docs.get(field.name, ""))


def _flag(kind: type, field: msgspec.structs.FieldInfo, hint: Any, doc: str) -> inspect.Parameter:
    limit = kind is ServerConfig and field.name.startswith("max_")
    default_panel = LIMITS if limit else SERVER if kind is ServerConfig else MEMORY
    settings: dict[str, Any] = {"min": 1} if limit else {}
    settings |= {"help": doc or None, "rich_help_panel": _PANEL.get(field.name, default_panel)}
    names = ["--" + field.name.replace("_", "-")]
    default = field.default
    if hint in (bool, bool | None):
        names = [f"{names[0]}/--no-{names[0][2:]}"] if default is not False else names
    else:
        settings["metavar"] = _metavar(hint, doc)
    if default is None or default == ():
        settings["show_default"] = False
    if default == ():  # a tuple of str: a flag that may be given more than once
        one = names[0] if field.name == "allow_origins" else names[0].removesuffix("s")  # CORS's usual name
        names, hint, default = [one], list[str] | None, None
    option = typer.Option(*names, **settings | _SETTINGS.get(field.name, {}))
    return inspect.Parameter(
        field.name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=Annotated[hint, option]
    )


def _metavar(hint: Any, doc: str) -> str:
    if typing.get_origin(hint) in (Union, types.UnionType):
        hint = next(one for one in typing.get_args(hint) if one is not type(None))
    if hint is float:
        return "SECONDS" if doc.startswith("Seconds") else "X"
    return "N" if hint is int else "NAME"
