"""Compares results of evaluate.py on the same items, one format with another.

python compare.py REFERENCE.json OTHER.json ...   # the rows of each, their paired differences, and what is shown
"""

from __future__ import annotations

import argparse
import json
import math
from dataclasses import dataclass
from pathlib import Path

LIMIT = 1.645  # standard errors: one-sided 95 %


@dataclass(frozen=True, slots=True)
class Pair:
    """Two formats on the same items: how many only the first, or only the second, had right."""

    asked: int
    lost: int
    won: int

    @classmethod
    def of(cls, first: str, second: str) -> Pair:
        """Of two `evaluate.Row.items`."""
        if len(first) != len(second):
            raise ValueError(f"{len(first)} and {len(second)} items: not the same")
        pairs = list(zip(first, second, strict=True))
        return cls(len(pairs), pairs.count(("1", "0")), pairs.count(("0", "1")))

    @property
    def points(self) -> float:
        """Second less first, in points of 100."""
        return 100 * (self.won - self.lost) / self.asked

    @property
    def error(self) -> float:
        """Standard error of `points`, after Agresti and Min (2005): half an item is added to each of the four counts,
        so that it is not 0 where nothing differs."""
        n, difference = self.asked + 2, self.won - self.lost
        return 100 * math.sqrt(self.won + self.lost + 1 - difference**2 / n) / n

    def verdict(self, bar: float) -> str:
        """Whether the second is at most ``bar`` points below the first: shown or refuted with 95 % confidence, or open."""
        if self.points - LIMIT * self.error > -bar:
            return "within"
        return "beyond" if self.points + LIMIT * self.error < -bar else "open"


def table(reference: Path, others: list[Path], bars: list[float]) -> str:
    """Rows of ``reference``; a column for each other file: difference ± standard error (lost, won) and the verdict."""
    first = _items(reference)
    found = [_items(path) for path in others]
    head = [f"{path.stem} (bar {bar:g})" for path, bar in zip(others, bars, strict=True)]
    lines = [f"| task | n | {' | '.join([reference.stem, *head])} |", "|---|---:|---:|" + "---|" * len(others)]
    for task, items in first.items():
        cells = []
        for other, bar in zip(found, bars, strict=True):
            if task not in other:
                cells.append("")
                continue
            pair = Pair.of(items, other[task])
            cells.append(f"{pair.points:+.2f} ± {pair.error:.2f} (−{pair.lost}, +{pair.won}) {pair.verdict(bar)}")
        share = 100 * items.count("1") / len(items)
        lines.append(f"| {task} | {len(items):,} | {share:.2f} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _items(path: Path) -> dict[str, str]:
    """Of a file, or of a folder whose files each hold a part of the items."""
    found: dict[str, str] = {}
    for file in sorted(path.glob("*.json")) if path.is_dir() else [path]:
        for row in json.loads(file.read_text(encoding="utf-8")):
            found[row["task"]] = found.get(row["task"], "") + row["items"]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("reference", type=Path)
    parser.add_argument("others", type=Path, nargs="+")
    parser.add_argument("--bar", type=float, default=1.0, help="points that a format may lose")
    parser.add_argument("--bars", default="", help="of single files: STEM=POINTS,...")
    args = parser.parse_args()
    single = {stem: float(bar) for stem, _, bar in (each.partition("=") for each in args.bars.split(",") if each)}
    print(table(args.reference, args.others, [single.get(path.stem, args.bar) for path in args.others]))


if __name__ == "__main__":
    main()
