"""``branchwise bench``: BranchBench against any OpenAI-compatible server, with progress bars, a table and JSON."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .console import EXIT_FAILED, check_writable, err, expected_failures, out
from .options import LOCAL_SERVER, ApiKey, ServerUrl, ServerUrlFlag, one_of

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID


def bench(
    url: ServerUrl = None,
    url_flag: ServerUrlFlag = None,
    model: Annotated[
        str | None, typer.Option(help="Name to ask for. Default: the first the server lists.", show_default=False)
    ] = None,
    workloads: Annotated[
        str,
        typer.Option(
            help="Comma-separated: no_sharing, fewshot, agents, tree_of_thought, chat, best_of_n, long_document."
        ),
    ] = "all",
    scale: Annotated[
        float, typer.Option(min=0.001, max=100.0, help="Multiplies every workload's request count.")
    ] = 1.0,
    seed: Annotated[int, typer.Option(help="The same seed, scale and vocabulary give the same prompts.")] = 0,
    vocab: Annotated[
        int | None,
        typer.Option(
            min=16,
            help="Prompt token ids are below this. Default: the server's vocabulary, else 100000.",
            show_default=False,
        ),
    ] = None,
    stream: Annotated[bool, typer.Option("--stream", help="Stream, and measure TTFT and inter-token latency.")] = False,
    api_key: ApiKey = None,
    out_file: Annotated[
        Path | None, typer.Option("--out", metavar="FILE", help="Write the figures as JSON here.", show_default=False)
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the figures as JSON instead of a table.")] = False,
) -> None:
    """Measure a server with seven workloads, six of which branch.

    Speaks the OpenAI **/v1/completions** protocol with token-id prompts, so that the same run drives any server:
    few-shot questions, tool-calling agents, tree search, chat, best-of-n, many questions on long documents, and
    unrelated prompts. Shows how much of each prompt the server reused, and how much it could have.

    Workloads with requests longer than the server accepts are left out. Exits 1 if any request failed.
    """
    with expected_failures():
        from ...runtime.errors import BranchwiseError
        from ..bench.workloads import VOCAB_HIGH, WORKLOADS
        from ..client import Client, first_model

        if out_file is not None:
            check_writable(out_file)
        names = list(WORKLOADS) if workloads == "all" else [name.strip() for name in workloads.split(",")]
        for name in names:
            if name not in WORKLOADS:
                raise BranchwiseError(f"no workload is called {name!r}; there are: {', '.join(WORKLOADS)}")
        server = Client(one_of(url, url_flag, "--url") or LOCAL_SERVER, api_key, timeout=30.0)
        name = model or first_model(server)
        vocab_size, limit = _limits(server)
        fitting = [workload for workload in names if limit is None or WORKLOADS[workload].longest <= limit]
        for left_out in (workload for workload in names if workload not in fitting):
            needs = f"needs {WORKLOADS[left_out].longest:,} tokens a request, the server takes {limit:,}"
            err.print(f"{left_out}: left out, it {needs}", style="yellow", soft_wrap=True)
        if not fitting:
            raise BranchwiseError("no workload is left; serve with a larger --max-model-len or another model")

        import asyncio

        from ..bench import report
        from ..bench.runner import BenchConfig, run

        settings = BenchConfig(
            url=server.url,
            model=name,
            workloads=fitting,
            scale=scale,
            seed=seed,
            vocab=vocab or vocab_size or VOCAB_HIGH,
            stream=stream,
            api_key=api_key,
        )
        with _Bars() as bars:
            results = asyncio.run(run(settings, bars))
        if out_file is not None:
            out_file.write_text(json.dumps(results, indent=1) + "\n")
        if as_json:
            typer.echo(json.dumps(results, indent=1))
        else:
            out.print(report.table(results))
        earlier = report.warm(results)
        if earlier:
            again = "their times are those of a warm cache; use another --seed, or restart the server"
            err.print(f"cached before this run: {', '.join(earlier)}: {again}", style="yellow", soft_wrap=True)
        if bars.failed:
            raise SystemExit(EXIT_FAILED)


def _limits(server: Any) -> tuple[int | None, int | None]:
    """The vocabulary size and longest request of a Branchwise server; (None, None) of any other."""
    from ..errors import BackendError

    try:
        engine = server.get("/get_server_info")["engine"]
        return int(engine["vocab_size"]), min(int(engine["max_model_len"]), int(engine["pool_tokens"]))
    except (BackendError, KeyError, TypeError, ValueError):
        return None, None


class _Bars:
    """A progress bar for each workload, on stderr, so that ``--json`` can be piped."""

    def __init__(self) -> None:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

        self._progress: Progress = Progress(
            TextColumn("{task.description:16}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), console=err
        )
        self._task: TaskID | None = None
        self.failed = 0

    def __enter__(self) -> _Bars:
        self._progress.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self._progress.stop()
        else:  # an error is one line: remove the bars
            self._progress.live.transient = True
            self._progress.live.stop()

    def started(self, name: str, requests: int) -> None:
        self._task = self._progress.add_task(name, total=requests)

    def request_done(self) -> None:
        if self._task is not None:
            self._progress.advance(self._task)

    def finished(self, name: str, result: dict[str, Any], errors: list[str]) -> None:
        if self._task is not None:
            self._progress.stop_task(self._task)
        self.failed += result["failed"]
        for error in errors:
            self._progress.console.print(f"{name}: {error}", style="red", markup=False)
