"""Arguments and flags that more than one command takes, by the names that users know from other servers."""

from __future__ import annotations

import re
from typing import Annotated, Any

import typer

from ...runtime.config import EngineConfig
from ...runtime.errors import LoadError
from .config_flags import field_docs

LOCAL_SERVER = "http://127.0.0.1:8000"
ENGINE_FLAGS = (
    "max_model_len",
    "dtype",
    "device",
    "tensor_parallel_size",
    "model_impl",
    "trust_remote_code",
)  # of the commands that load a model
_MODEL_HELP = field_docs(EngineConfig).get("model")
_ADDRESS = re.compile(r"(\w+://.*|[\w.-]+:\d+(/.*)?)", re.ASCII)

Model = Annotated[str, typer.Argument(metavar="MODEL", help=_MODEL_HELP, show_default=False)]
ModelFlag = Annotated[str, typer.Option("--model", "-m", metavar="MODEL", help=_MODEL_HELP, show_default=False)]
ServerUrl = Annotated[
    str | None,
    typer.Argument(metavar="URL", help=f"A running server. Default: {LOCAL_SERVER}.", show_default=False),
]
UrlFlag = Annotated[
    str | None, typer.Option("--url", metavar="URL", help="A running server, instead of a model.", show_default=False)
]
ServerUrlFlag = Annotated[
    str | None, typer.Option("--url", metavar="URL", help="The server, as a flag.", show_default=False)
]
ApiKey = Annotated[
    str | None,
    typer.Option(
        "--api-key", envvar="BRANCHWISE_API_KEY", help="The server's key.", show_default=False, show_envvar=True
    ),
]


def _sampling(help: str) -> Any:
    return typer.Option(help=help, rich_help_panel="Sampling", show_default=False)


MaxTokens = Annotated[int, typer.Option(help="Longest answer, in tokens.", rich_help_panel="Sampling")]
Temperature = Annotated[
    float | None,
    _sampling(
        "0 takes the likeliest token every time. Default: that of the model's generation_config.json, otherwise "
        "0.7 in chat and 0 in generate."
    ),
]
TopP = Annotated[
    float | None,
    _sampling("Sample from the likeliest tokens whose probabilities sum to this. Default: the model's own, else 1."),
]
TopK = Annotated[
    int | None,
    _sampling("Sample from this many likeliest tokens; 0: from all. Default: the model's own, else 0."),
]
Seed = Annotated[int | None, _sampling("The same seed gives the same text.")]
Stop = Annotated[list[str] | None, _sampling("End the answer before this text. May be given more than once.")]


def one_of(argument: str | None, flag: str | None, name: str) -> str:
    """The value of the argument or of flag ``name``; "" if neither is given. Raises `LoadError` if they differ."""
    if argument and flag and argument != flag:
        raise LoadError(f"{argument} and {name} {flag}: give one of the two")
    return argument or flag or ""


def is_address(text: str) -> bool:
    """Whether ``text`` is a server's address rather than a model."""
    return _ADDRESS.fullmatch(text) is not None
