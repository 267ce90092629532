"""``branchwise doctor``: is this machine fit to serve, does a model fit on it, and what mends what is missing."""

from __future__ import annotations

from typing import Annotated

import typer

from .console import EXIT_FAILED, expected_failures, out
from .options import Device, DtypeFlag, MaxModelLen, Model


def doctor(
    model: Model = "",
    host: Annotated[str, typer.Option(help="Address to try to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port to try to listen on.")] = 8000,
    max_model_len: MaxModelLen = None,
    dtype: DtypeFlag = "auto",
    device: Device = "auto",
) -> None:
    """Check this machine: libraries, device, port, and the memory arithmetic of a model.

    Each finding that is not well names the command that mends it. Exits 1 if something essential is broken.
    """
    with expected_failures():
        from ...runtime.config import EngineConfig, check
        from . import checkup

        config = check(EngineConfig(model=model, dtype=dtype, device=device, max_model_len=max_model_len))
        findings = [
            *checkup.libraries(),
            *checkup.devices(),
            checkup.port(host, port),
            checkup.private_folder(),
            *checkup.model(config),
        ]
        marks = {"ok": "[green]ok[/]", "note": "[yellow]note[/]", "broken": "[bold red]broken[/]"}
        for finding in findings:
            out.print(f"{marks[finding.state]:>6}  [bold]{finding.what}[/]: ", end="")
            out.print(finding.found, markup=False, soft_wrap=True)
            if finding.mend:
                out.print(f"          mend it: {finding.mend}", style="cyan", markup=False, soft_wrap=True)
        broken = sum(finding.state == "broken" for finding in findings)
        if broken:
            out.print(f"\n{broken} broken: serving will not work until mended.", style="bold red")
            raise SystemExit(EXIT_FAILED)
        out.print("\nThis machine is ready to serve.", style="green")
