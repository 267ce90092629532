"""``branchwise top``: what a running server does, as it changes: load, requests, tree."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import closing
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .console import escape, expected_failures, out
from .options import LOCAL_SERVER, ApiKey, ServerUrl, ServerUrlFlag, one_of
from .tree import draw

if TYPE_CHECKING:
    from rich.console import RenderableType

    from ..client import Client

SECONDS = 1.0  # between two samples: of --once, and of a server that sends no events
IDLE_SECONDS = 2.5  # without a new snapshot nothing has changed: rates are zero
MAX_NODES = 60
MAX_REQUESTS = 20
_RATES = ("generated_tokens", "cached_tokens", "computed_tokens")

Snapshot = dict[str, Any]


def top(
    url: ServerUrl = None,
    url_flag: ServerUrlFlag = None,
    api_key: ApiKey = None,
    once: Annotated[bool, typer.Option("--once", help="Print the state once, after a second, and leave.")] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the state once as JSON: figures, rates, requests, tree.")
    ] = False,
) -> None:
    """Watch a running server: tokens a second, KV memory, requests with their progress, and the cached prefixes.

    Ctrl-C leaves. A tenant's key shows that tenant's requests and prefixes, without sums over all.
    """
    with expected_failures():
        from ..client import Client

        server = Client(one_of(url, url_flag, "--url") or LOCAL_SERVER, api_key, timeout=30.0)
        view = View(server.url)
        if once or as_json or not out.is_terminal:
            view.add(_sample(server))
            time.sleep(SECONDS)
            view.add(_sample(server))
            if as_json:
                typer.echo(json.dumps({**view.snapshot, "rates": view.rates()}, indent=1))
            else:
                out.print(view.render())
            return
        from rich.live import Live

        with Live(get_renderable=view.render, console=out, screen=True, refresh_per_second=2):
            for snapshot in _snapshots(server):
                view.add(snapshot)


def _sample(server: Client) -> Snapshot:
    with closing(_snapshots(server)) as snapshots:  # type: ignore[type-var]
        return next(snapshots)


def _snapshots(server: Client) -> Iterator[Snapshot]:
    """The snapshots of ``/ui/events``; from a server without the page, sums and tree once a second."""
    from ..errors import BackendError

    try:
        yield from server.events(f"/ui/events?max_nodes={MAX_NODES}", None)
        raise BackendError(f"{server.url} ended the stream of events")
    except BackendError as error:
        if error.status != 404:
            raise
    while True:
        info = server.get("/get_server_info")
        figures = None if "stats" not in info else {**info["stats"], "hit_rate": info["cache_hit_rate_60s"]}
        tree = server.get(f"/cache/tree?max_nodes={MAX_NODES}")
        yield {"model": info["model"], "figures": figures, "tree": tree, "requests": None}
        time.sleep(SECONDS)


class View:
    """The newest snapshot, and the rates since the one before."""

    def __init__(self, url: str) -> None:
        self._url = url
        self.snapshot: Snapshot = {}
        self._before: Snapshot = {}
        self._came = self._came_before = 0.0  # monotonic seconds

    def add(self, snapshot: Snapshot) -> None:
        self._before, self.snapshot = self.snapshot, snapshot
        self._came_before, self._came = self._came, time.monotonic()

    def rates(self) -> dict[str, float]:
        """Tokens a second: generated, and of prompts from the cache and computed."""
        new, old = self.snapshot.get("figures"), self._before.get("figures")
        idle = time.monotonic() - self._came > IDLE_SECONDS
        if not new or not old or idle:
            return dict.fromkeys(_RATES, 0.0)
        seconds = max(0.05, self._came - self._came_before)
        return {name: max(0.0, new[name] - old[name]) / seconds for name in _RATES}

    def render(self) -> RenderableType:
        from rich.console import Group

        if not self.snapshot:
            return f"waiting for {self._url}"
        parts: list[RenderableType] = [f"[bold]branchwise[/] {escape(self.snapshot['model'])} at {self._url}"]
        parts += self._load()
        if self.snapshot["requests"] is not None:
            parts.append(_requests(self.snapshot["requests"], self.snapshot["requests_omitted"]))
        return Group(*parts, draw(self.snapshot["tree"]))

    def _load(self) -> Iterator[str]:
        figures = self.snapshot.get("figures")
        if not figures:
            return
        rates, page_size = self.rates(), self.snapshot["tree"]["totals"]["page_size"]
        total = max(1, figures["pages_total"])
        used = total - figures["pages_free"] - figures["pages_cached"]
        yield (
            f"{figures['running']:,} running, {figures['waiting']:,} waiting; "
            f"[bold]{rates['generated_tokens']:,.0f}[/] tokens/s generated; prompts "
            f"{rates['cached_tokens']:,.0f} tokens/s cached, {rates['computed_tokens']:,.0f} computed; "
            f"{figures['hit_rate']:.1%} hits in the last minute"
        )
        yield (
            f"KV {used / total:.1%} in use, {figures['pages_cached'] / total:.1%} cached, "
            f"{figures['pages_free'] / total:.1%} free of {total * page_size:,} tokens; "
            f"{figures['evicted_pages']:,} pages evicted, {figures['retractions']:,} retractions"
        )


def _requests(requests: list[dict[str, Any]], omitted: int) -> RenderableType:
    from rich.table import Table

    more = max(0, len(requests) - MAX_REQUESTS) + omitted
    table = Table(box=None, expand=False, caption=f"{more:,} more" if more else None, caption_justify="left")
    for name in ("request", "state", "prompt", "reused", "progress", "reuse ended"):
        table.add_column(name, justify="right" if name in ("prompt", "reused") else "left")
    for each in requests[:MAX_REQUESTS]:
        table.add_row(
            str(each["id"]),
            each["state"],
            f"{each['prompt_tokens']:,}",
            f"{each['hit_tokens']:,}",
            progress(each["computed"], each["limit"]),
            each["reason"],
        )
    return table if requests else "[dim]no requests at the moment[/]"


def progress(done: int, limit: int, width: int = 20) -> str:
    """A bar, and the counts."""
    filled = round(width * min(1.0, done / max(1, limit)))
    return f"{'█' * filled}{'░' * (width - filled)} {done:,} of {limit:,}"
