"""The chart of docs/performance.md and the README, drawn from the table of measured seconds in that page.

python tests/benchmarks/chart.py     writes docs/images/branchbench.svg
"""

from __future__ import annotations

import re
from html import escape
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "performance.md"
CHART = ROOT / "docs" / "images" / "branchbench.svg"
SERVERS = ("Branchwise", "vLLM", "SGLang")  # of each peer the version that was faster on the workload
LEFT, WIDTH, BAR, GAP, TOP = 130, 560, 12, 14, 52  # pixels
_STYLE = (
    "text{font:12px system-ui,sans-serif;fill:#1c2330}.quiet{fill:#667085}.s0{fill:#2a7de1}.s1{fill:#b6bdc9}"
    ".s2{fill:#8a93a3}line{stroke:#d5dae3}@media(prefers-color-scheme:dark){text{fill:#e6eaf0}.quiet{fill:#8d97a8}"
    ".s1{fill:#5b6576}.s2{fill:#3f4857}line{stroke:#2b3340}}"
)


def measured(page: str) -> dict[str, list[float]]:
    """Seconds of each workload: ours, the faster vLLM's, the faster SGLang's."""
    table = re.search(r"<!-- figures: BranchBench on a GPU -->\n(.*?)<!-- /figures -->", page, re.DOTALL)
    if table is None:
        raise ValueError(f"{PAGE} has no table of BranchBench on a GPU")
    header, _, *lines = [[cell.strip() for cell in line.strip("| ").split("|")] for line in table[1].splitlines()]
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
