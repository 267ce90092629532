"""The charts of docs/performance.md and the README, drawn from the tables of measurements in that page.

python tests/benchmarks/chart.py     writes docs/images/branchbench.svg and tree-attention.svg
"""

from __future__ import annotations

import math
import re
from html import escape
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "performance.md"
CHART = ROOT / "docs" / "images" / "branchbench.svg"
SWEEP = ROOT / "docs" / "images" / "tree-attention.svg"
CELL, SIDE = (54, 24), 100  # pixels: of a cell of the sweep, and left of it
SERVERS = ("Branchwise", "vLLM", "SGLang")  # of each peer the version that was faster on the workload
LEFT, WIDTH, BAR, GAP, TOP = 130, 560, 12, 14, 52  # pixels
_STYLE = (
    "text{font:12px system-ui,sans-serif;fill:#1c2330}.quiet{fill:#667085}.s0{fill:#2a7de1}.s1{fill:#b6bdc9}"
    ".s2{fill:#8a93a3}line{stroke:#d5dae3}@media(prefers-color-scheme:dark){text{fill:#e6eaf0}.quiet{fill:#8d97a8}"
    ".s1{fill:#5b6576}.s2{fill:#3f4857}line{stroke:#2b3340}}"
)


def _table(page: str, name: str) -> list[list[str]]:
    """Cells of the header and of each row."""
    table = re.search(rf"<!-- figures: {name} -->\n(.*?)<!-- /figures -->", page, re.DOTALL)
    if table is None:
        raise ValueError(f"{PAGE} has no table of {name}")
    header, _, *lines = [[cell.strip() for cell in line.strip("| ").split("|")] for line in table[1].splitlines()]
    return [header, *lines]


def swept(page: str) -> dict[tuple[str, str, str], float]:
    """FlashInfer's time by tree attention's, of (requests, prefix, tail)."""
    header, *lines = _table(page, "tree attention, one layer")
    return {
        (requests, prefix, tail): float(cell.split("(")[1].rstrip(")"))
        for requests, prefix, *cells in lines
        for tail, cell in zip(header[2:], cells, strict=True)
    }


def draw_sweep(ratios: dict[tuple[str, str, str], float]) -> str:
    """An SVG: prefixes down, requests and tails across; blue where the tree is faster, orange where it is slower."""
    requests, prefixes, tails = (list(dict.fromkeys(key[i] for key in ratios)) for i in range(3))
    width, height = CELL
    right, bottom = SIDE + len(requests) * (len(tails) * width + GAP), TOP + len(prefixes) * height
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {right} {bottom + 24}" role="img" '
        f'aria-label="Tree attention against FlashInfer, one layer"><style>{_STYLE}</style>',
        f'<text x="{SIDE}" y="14">FlashInfer\'s time ÷ tree attention\'s, one layer on one H200</text>',
    ]
    for row, prefix in enumerate(prefixes):
        y = TOP + row * height + 16
        parts.append(f'<text class="quiet" x="{SIDE - 8}" y="{y}" text-anchor="end">prefix {prefix}</text>')
    for group, batch in enumerate(requests):
        left = SIDE + group * (len(tails) * width + GAP)
        middle = left + len(tails) * width / 2
        parts.append(f'<text x="{middle}" y="30" text-anchor="middle">{batch} requests</text>')
        for column, tail in enumerate(tails):
            x = left + column * width
            parts.append(f'<text class="quiet" x="{x + width / 2}" y="45" text-anchor="middle">+ {tail}</text>')
            for row, prefix in enumerate(prefixes):
                ratio, y = ratios[batch, prefix, tail], TOP + row * height
                color = "#2a7de1" if ratio >= 1 else "#e1872a"
                strength = 0.08 + 0.72 * min(1.0, abs(math.log2(ratio)) / 3)
                parts.append(
                    f'<rect x="{x}" y="{y}" width="{width - 2}" height="{height - 2}" fill="{color}" '
                    f'fill-opacity="{strength:.2f}"/><text x="{x + width / 2 - 1}" y="{y + 16}" '
                    f'text-anchor="middle">{ratio:.2f}</text>'
                )
    legend = "prefix: shared by up to 32 requests; +: own tokens"
    parts.append(f'<text class="quiet" x="{SIDE}" y="{bottom + 16}">{legend}</text>')
    return "".join(parts) + "</svg>\n"


def measured(page: str) -> dict[str, list[float]]:
    """Seconds of each workload: ours, the faster vLLM's, the faster SGLang's."""
    header, *lines = _table(page, "BranchBench on a GPU")
    found = {}
    for name, *cells in lines:
        if "_" not in name and name not in ("fewshot", "agents", "chat"):
            continue  # the mean, and the time to start
        seconds = dict(zip(header[1:], cells, strict=True))
        found[name] = [
            min(float(value) for column, value in seconds.items() if column.startswith(server)) for server in SERVERS
        ]
    return found


def draw(seconds: dict[str, list[float]]) -> str:
    """An SVG: bars as multiples of our time, with the seconds beside them."""
    longest = max(value / values[0] for values in seconds.values() for value in values)
    scale = WIDTH / (longest * 1.12)
    height = TOP + len(seconds) * (len(SERVERS) * BAR + GAP) + 8
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {LEFT + WIDTH + 60} {height}" role="img" '
        f'aria-label="Time of each workload as a multiple of Branchwise\'s"><style>{_STYLE}</style>',
        f'<text x="{LEFT}" y="18">Time of each workload, as a multiple of Branchwise\'s; shorter is better</text>',
    ]
    for i, server in enumerate(SERVERS):
        parts.append(f'<rect class="s{i}" x="{LEFT + 110 * i}" y="28" width="10" height="10"/>')
        parts.append(f'<text class="quiet" x="{LEFT + 110 * i + 15}" y="37">{server}</text>')
    x = LEFT + scale
    parts.append(f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{TOP - 4}" y2="{height - 8}"/>')
    for row, (name, values) in enumerate(seconds.items()):
        y = TOP + row * (len(SERVERS) * BAR + GAP)
        middle = y + len(SERVERS) * BAR / 2 + 4
        parts.append(f'<text x="{LEFT - 8}" y="{middle:.1f}" text-anchor="end">{escape(name)}</text>')
        for i, value in enumerate(values):
            width, top = value / values[0] * scale, y + i * BAR
            parts.append(f'<rect class="s{i}" x="{LEFT}" y="{top}" width="{width:.1f}" height="{BAR - 2}"/>')
            ratio = "" if i == 0 else f", {value / values[0]:.2f}×"
            parts.append(f'<text class="quiet" x="{LEFT + width + 5:.1f}" y="{top + 9}">{value:.2f} s{ratio}</text>')
    return "".join(parts) + "</svg>\n"


if __name__ == "__main__":
    CHART.write_text(draw(measured(PAGE.read_text())))
    SWEEP.write_text(draw_sweep(swept(PAGE.read_text())))
