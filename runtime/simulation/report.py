"""A simulation's results as a table in Markdown and a plot in SVG."""

from __future__ import annotations

from collections.abc import Sequence

from .fleet import FleetResult

_HEADER = (
    "| replicas | routing | routers | event lag | hit rate | of one shared cache | busiest / mean | in 5 min "
    "| TTFT mean | p50 | p99 | requests/s |\n|---|---|---|---|---|---|---|---|---|---|---|---|"
)
_WIDTH, _BAR, _LEFT, _TOP = 760, 22, 250, 60
_COLOURS = {"round-robin": "#b0b7c3", "sticky": "#8fa8c8", "overlap": "#d9a05b", "branchwise": "#2f7d5d"}


def share_of(rate: float, shared: float) -> str:
    """A hit rate as a percentage of that of one shared cache; – where even that one reuses nothing."""
    return f"{rate / shared:.1%}" if shared else "–"


def table(results: Sequence[FleetResult], shared: dict[int, float]) -> str:
    """Markdown. ``shared``: by replicas, the hit rate of one cache of their total size."""
    lines = [_HEADER]
    for each in results:
        s = each.settings
        cells = (
            str(s.replicas),
            s.policy,
            str(s.routers),
            f"{1000 * s.event_lag:.0f} ms",
            f"{each.hit_rate:.1%}",
            share_of(each.hit_rate, shared[s.replicas]),
            f"{each.balance:.2f}",
            f"{each.window_balance:.2f}",
            f"{1000 * each.first_token.mean():.0f} ms",
            f"{1000 * each.quantile(0.5):.0f}",
            f"{1000 * each.quantile(0.99):.0f}",
            f"{each.requests / each.seconds:.1f}",
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def plot(results: Sequence[FleetResult], shared: dict[int, float], offline: dict[int, float]) -> str:
    """SVG: the hit rate of each run as a bar; for each number of replicas, what one shared cache of the same size
    reaches as a line, and the offline bound as a dashed one."""
    groups: dict[int, list[FleetResult]] = {}
    for each in results:
        groups.setdefault(each.settings.replicas, []).append(each)
    most = max([*offline.values(), *(each.hit_rate for each in results)]) or 1.0
    scale = (_WIDTH - _LEFT - 80) / most
    parts: list[str] = []
    y = _TOP
    for replicas, group in groups.items():
        top = y
        for each in group:
            s = each.settings
            name = f"{s.replicas} × {s.policy}"
            if s.routers > 1 or s.event_lag:
                name += f", {s.routers} routers, {1000 * s.event_lag:.0f} ms"
            width = each.hit_rate * scale
            parts += (
                f'<text x="{_LEFT - 8}" y="{y + 15}" text-anchor="end">{name}</text>',
                f'<rect x="{_LEFT}" y="{y + 3}" width="{width:.1f}" height="{_BAR - 6}" fill="{_COLOURS[s.policy]}"/>',
                f'<text x="{_LEFT + width + 4:.1f}" y="{y + 15}">{each.hit_rate:.1%}</text>',
            )
            y += _BAR
        for rate, dashes in ((shared[replicas], ""), (offline[replicas], ' stroke-dasharray="4 3"')):
            x = _LEFT + rate * scale
            parts.append(f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{top}" y2="{y}" stroke="#333"{dashes}/>')
        y += _BAR // 2
    title = "Prompt tokens found in the cache. Line: one shared cache of the same total size; dashed: offline bound."
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{_WIDTH}" height="{y + 10}" font-family="sans-serif" '
        f'font-size="12"><rect width="100%" height="100%" fill="#fff"/>'
        f'<text x="12" y="28" font-size="13">{title}</text>' + "".join(parts) + "</svg>\n"
    )
