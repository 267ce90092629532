"""``branchwise doctor``: whether this machine can serve and a model fits on it, and what to do if not."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from .config_flags import config_flags
from .console import EXIT_FAILED, expected_failures, out
from .options import ENGINE_FLAGS, Model, ModelFlag, one_of

_PLAN_FLAGS = ("kv_cache_dtype", "quantization", "gpu_memory_utilization", "max_num_seqs", "max_num_batched_tokens")


@config_flags(*ENGINE_FLAGS, *_PLAN_FLAGS)
def doctor(
    model: Model = "",
    model_flag: ModelFlag = "",
    host: Annotated[str, typer.Option(help="Address to try to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port to try to listen on.")] = 8000,
    device_memory: Annotated[
        str,
        typer.Option(metavar="SIZE", help="Compute a model's capacity on GPUs with this much memory, such as 80GiB."),
    ] = "",
    request_tokens: Annotated[
        int, typer.Option(min=0, help="Tokens of one request, for that computation. 0: the longest context.")
    ] = 0,
    shared_tokens: Annotated[
        int, typer.Option(min=0, help="Tokens of those that all requests share, and that are stored once.")
    ] = 0,
    **settings: Any,
) -> None:
    """Check this machine: libraries, device, port, and the memory arithmetic of a model.

    With --device-memory, compute instead how many requests fit on GPUs of that size, none of which need be here. Each
    problem names the command that fixes it. Exits 1 if something essential is broken.
    """
    with expected_failures():
        from ...runtime.config import engine_config
        from . import capacity, checkup

        config = engine_config(one_of(model, model_flag, "--model"), settings)
        if device_memory:
            for line in capacity.lines(config, device_memory, request_tokens, shared_tokens):
                out.print(line, markup=False, soft_wrap=True)
            return
        findings = [
            *checkup.libraries(),
            *checkup.bytecode(),
            *checkup.devices(),
            checkup.port(host, port),
            checkup.sockets(),
            *checkup.model(config),
        ]
        colours = {"ok": "green", "note": "yellow", "broken": "bold red"}
        for finding in findings:
            out.print(f"[{colours[finding.state]}]{finding.state:>6}[/]  [bold]{finding.what}[/]: ", end="")
            out.print(finding.found, markup=False, soft_wrap=True)
            if finding.fix:
                out.print(f"        fix it: {finding.fix}", style="cyan", markup=False, soft_wrap=True)
        broken = sum(finding.state == "broken" for finding in findings)
        if broken:
            until = "it is" if broken == 1 else "they are"
            out.print(f"\n{broken} broken: serving will not work until {until} fixed.", style="bold red")
            raise SystemExit(EXIT_FAILED)
        out.print("\nThis machine is ready to serve.", style="green")
