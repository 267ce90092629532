"""What storage formats of keys, values and weights lose on the shipped model's held-out tasks, in samples large enough.

    python tests/benchmarks/bench_quality.py --formats float32,fp8,int4 --out OUT [--n 2000] [--puzzles 4000]
    python examples/embedded_model/compare.py OUT/float32 OUT/fp8 OUT/int4
    python tests/benchmarks/bench_quality.py --formats float32,fp8,int4 --divergence 700

The tasks are those of ``examples/embedded_model/evaluate.py``, computed by `dense_llama`. What the package's
kernels add to a format's error is measured by evaluate.py itself.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "examples" / "embedded_model"))

import evaluate
from dense_llama import VARIANTS, DenseEngine

from corpus import puzzle, tools
from corpus.draw import Draw

CHUNK = 200  # puzzles measured in every format before the next ones


class Subject(evaluate.Subject):
    """Renders and tokenizes each prompt once for all formats."""

    _prompts: ClassVar[dict[str, list[int]]] = {}

    def prompt(self, messages: Sequence[dict[str, Any]], tool_list: list[dict[str, Any]] | None = None) -> list[int]:
        key = json.dumps([messages, tool_list])
        if key not in self._prompts:
            self._prompts[key] = super().prompt(messages, tool_list)
        return self._prompts[key]


def measure_all(
    subjects: dict[str, Subject], n: int, puzzles: int, patterns: Sequence[str], part: int, parts: int
) -> Iterator[dict[str, evaluate.Row]]:
    """The same items in every format, and only then the next: a run that is stopped leaves items that are paired."""
    tasks = [task for task in evaluate.tasks(next(iter(subjects.values())), n) if evaluate.matches(task[0], patterns)]
    for name, draw_items, right, _ in tasks[part::parts]:
        items = draw_items()
        yield {each: evaluate.measure(subject, name, items, right) for each, subject in subjects.items()}
    methods = [method for method in evaluate.METHODS if evaluate.matches(method, patterns)]
    instances = evaluate.draw_puzzles(puzzles) if methods else []
    for start in range(part * CHUNK, len(instances), parts * CHUNK):
        for method in methods:
            chunk = instances[start : start + CHUNK]
            yield {each: evaluate.solve(subject, method, chunk) for each, subject in subjects.items()}


def divergence(subjects: dict[str, Subject], n: int) -> Iterator[str]:
    """Kullback-Leibler divergence of the next token from the first format's, times 10^4: for each held-out item the
    mean over its reference answer. A few items have most of it: the median says more than the mean."""
    (first, subject), *_ = subjects.items()
    called = evaluate.collect(tools.make, "tools_call", n, 1021)
    draw, drawn = Draw(7, held_out=True), evaluate.draw_puzzles(4 * n)
    tasks = {
        "tool calls": [(subject.prompt(each.prompt_messages, each.tools), each.reference) for each in called],
        "puzzles": [(subject.ask(puzzle.solve_prompt(*each)), draw.pick(puzzle.winning(*each))[0]) for each in drawn],
    }
    for task, items in tasks.items():
        found: dict[str, list[float]] = {name: [] for name in subjects}
        items.sort(key=lambda item: len(item[0]))
        for start in range(0, len(items), 8):
            prompts, texts = zip(*items[start : start + 8], strict=True)
            answers = [subject.engine.tokenizer.encode(text, add_special_tokens=False).tolist() for text in texts]
            rows = {name: each.engine.logprobs(prompts, answers) for name, each in subjects.items()}
            for name, each in rows.items():
                for p, q in zip(rows[first], each, strict=True):
                    lost = F.kl_div(q.double(), p.double(), log_target=True, reduction="batchmean")
                    found[name].append(1e4 * lost.item())
        for name, each in list(found.items())[1:]:
            mean, error = statistics.mean(each), statistics.stdev(each) / math.sqrt(len(each))
            yield f"{task}, {name} from {first}: {mean:.2f} ± {error:.2f}, median {statistics.median(each):.3f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--formats", default=",".join(VARIANTS))
    parser.add_argument("--n", type=int, default=2000)
    parser.add_argument("--puzzles", type=int, default=4000)
    parser.add_argument("--rows", nargs="+", default=["*"], help="patterns of the rows to measure")
    parser.add_argument("--out", type=Path, help="a folder, with one for each format")
    parser.add_argument("--divergence", type=int, metavar="N", help="only the next token's, after N tool calls")
    parser.add_argument("--part", default="0/1", help="i/n: a share of the items, for one of n processes")
    parser.add_argument("--seconds", type=float, default=1e9, help="begin nothing after so many")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--batch-tokens", type=int, help="tokens in the cache at once")
    args = parser.parse_args()
    if not (args.divergence or args.out):
        parser.error("--out or --divergence is required")
    begun = time.time()
    torch.backends.cuda.matmul.allow_tf32 = True
    batch_tokens = args.batch_tokens or (500_000 if args.device.startswith("cuda") else 60_000)
    formats = args.formats.split(",")
    subjects = {name: Subject(DenseEngine(VARIANTS[name], args.device, batch_tokens)) for name in formats}
    if args.divergence:
        for line in divergence(subjects, args.divergence):
            print(f"{time.time() - begun:.0f} s: {line}", flush=True)
        return
    done: dict[str, list[dict[str, Any]]] = {name: [] for name in formats}
    part, parts = map(int, args.part.split("/"))
    for rows in measure_all(subjects, args.n, args.puzzles, args.rows, part, parts):
        for name, row in rows.items():
            done[name].append(asdict(row))
            (args.out / name).mkdir(parents=True, exist_ok=True)
            (args.out / name / f"{part}.json").write_text(json.dumps(done[name]))
        counts = ", ".join(f"{name} {row.right}" for name, row in rows.items())
        task = next(iter(rows.values()))
        print(f"{time.time() - begun:.0f} s: {task.task}: of {task.asked} {counts}", flush=True)
        if time.time() - begun > args.seconds:
            break


if __name__ == "__main__":
    main()
