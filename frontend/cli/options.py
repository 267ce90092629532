"""Arguments and flags more than one command takes, said once. Names are those people know from other servers."""

from __future__ import annotations

from typing import Annotated, Literal

import typer

from ...runtime.config import Dtype

LoadFormat = Literal["auto", "dummy"]
LogLevel = Literal["debug", "info", "warning", "error"]

Model = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="A folder, a Hugging Face hub id, or nothing for the model that ships with the package.",
        show_default=False,
    ),
]
ModelFlag = Annotated[
    str,
    typer.Option(
        "--model",
        "-m",
        help="A folder, a hub id, or nothing for the model that ships with the package.",
        show_default=False,
    ),
]
ServerUrl = Annotated[str, typer.Argument(metavar="URL", help="A running server, for example http://127.0.0.1:8000.")]
UrlFlag = Annotated[
    str | None,
    typer.Option(
        "--url", metavar="URL", help="Ask this running server instead of loading a model here.", show_default=False
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

MaxModelLen = Annotated[
    int | None,
    typer.Option(
        metavar="N",
        help="Longest prompt and answer together, in tokens. Default: the model's own.",
        rich_help_panel=MODEL,
        show_default=False,
    ),
]
DtypeFlag = Annotated[
    Dtype,
    typer.Option(
        metavar="TYPE",
        help="Type of weights and KV: auto, float32, bfloat16 or float16. auto: the checkpoint's on a GPU, float32 on "
        "a CPU.",
        rich_help_panel=MODEL,
    ),
]
Device = Annotated[str, typer.Option(metavar="NAME", help="auto, cpu, cuda or cuda:N.", rich_help_panel=MODEL)]
LoadFormatFlag = Annotated[
    LoadFormat,
    typer.Option(
        metavar="NAME",
        help="auto, or dummy: random weights of the config's shape, for measuring.",
        rich_help_panel=MODEL,
    ),
]

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
