"""Arguments and flags more than one command takes, said once. Names are those people know from other servers."""

from __future__ import annotations

import inspect
import re
from typing import Annotated, Any, Literal

import typer

from ...runtime.config import Dtype, EngineConfig, ServerConfig

LoadFormat = Literal["auto", "dummy"]
LogLevel = Literal["debug", "info", "warning", "error"]


def field_docs(kind: type) -> dict[str, str]:
    """What the ``Args:`` of a class's docstring say of each field, on one line; {} under ``python -OO``."""
    _, _, lines = inspect.cleandoc(kind.__doc__ or "").partition("Args:\n")
    fields = re.findall(r"^    (\w+): (.*(?:\n        .*)*)", lines, re.MULTILINE)
    return {name: re.sub(r"\n *", " ", text) for name, text in fields}


_CONFIG_DOCS = field_docs(ServerConfig) | field_docs(EngineConfig)


def flag(field: str, panel: str, *names: str, **settings: Any) -> Any:
    """The flag that sets a field of a config, with what the config's docstring says of it as its help."""
    return typer.Option(*names, help=_CONFIG_DOCS.get(field), rich_help_panel=panel, **settings)


Model = Annotated[str, typer.Argument(metavar="MODEL", help=_CONFIG_DOCS.get("model"), show_default=False)]
ModelFlag = Annotated[str, typer.Option("--model", "-m", help=_CONFIG_DOCS.get("model"), show_default=False)]
ServerUrl = Annotated[str, typer.Argument(metavar="URL", help="A running server, for example http://127.0.0.1:8000.")]
UrlFlag = Annotated[
    str | None,
    typer.Option(
        "--url",
        metavar="URL",
        help="Ask this running server instead of loading a model here.",
        show_default=False,
    ),
]
ApiKey = Annotated[
    str | None,
    typer.Option(
        "--api-key", envvar="BRANCHWISE_API_KEY", help="The server's key.", show_default=False, show_envvar=True
    ),
]

MODEL, MEMORY, SCHEDULING, SERVER, SAMPLING = "Model", "Memory", "Scheduling", "Server", "Sampling"
LIMITS = "Limits"

MaxModelLen = Annotated[int | None, flag("max_model_len", MODEL, metavar="N", show_default=False)]
DtypeFlag = Annotated[Dtype, flag("dtype", MODEL, metavar="TYPE")]
Device = Annotated[str, flag("device", MODEL, metavar="NAME")]
LoadFormatFlag = Annotated[LoadFormat, flag("load_format", MODEL, metavar="NAME")]

MaxTokens = Annotated[int, typer.Option(help="Longest answer, in tokens.", rich_help_panel=SAMPLING)]
Temperature = Annotated[
    float | None,
    typer.Option(
        help="0 takes the likeliest token every time. Default: as the model's generation_config.json wants it; where "
        "that wants nothing, 0.7 in a chat and 0 in generate.",
        rich_help_panel=SAMPLING,
        show_default=False,
    ),
]
TopP = Annotated[
    float | None,
    typer.Option(
        help="Draw from the likeliest tokens whose probabilities sum to this. Default: the model's own, else 1.",
        rich_help_panel=SAMPLING,
        show_default=False,
    ),
]
TopK = Annotated[
    int | None,
    typer.Option(
        help="Draw from this many likeliest tokens; 0: from all. Default: the model's own, else 0.",
        rich_help_panel=SAMPLING,
        show_default=False,
    ),
]
Seed = Annotated[
    int | None,
    typer.Option("--seed", help="The same seed gives the same text.", rich_help_panel=SAMPLING, show_default=False),
]
Stop = Annotated[
    list[str] | None,
    typer.Option(
        "--stop",
        help="End the answer before this text. May be given more than once.",
        rich_help_panel=SAMPLING,
        show_default=False,
    ),
]
