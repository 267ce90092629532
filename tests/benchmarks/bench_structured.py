"""Structured output: what a constraint costs, what jump-forward spares, and what a hostile one does to its neighbours.

    python tests/benchmarks/bench_structured.py [--only jump,masks,hostile] [--rounds 3]

jump      the same JSON from the shipped model, with and without ``jump_forward`` by turns, greedy, one request at a
          time: tokens, forward passes, seconds. *short keys* are those the model was trained on, *long keys* are not.
masks     64 requests at once, constrained and free by turns: milliseconds a step.
hostile   a stream's gaps between tokens through a server of the null executor (steps of 5 ms, overlapped as on a GPU),
          alone and beside constraints written to be slow: p50, p99 and the longest.
"""

from __future__ import annotations

import argparse
import itertools
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import httpx
from bench_http import server

from branchwise import Engine, SamplingParams
from branchwise.runtime.models.folder import SHIPPED

QUESTION = [{"role": "user", "content": "Bruno lives in Milford. Bruno is 31 years old. Write it as JSON."}]
LONG = ("full_name_of_the_person", "age_of_the_person_in_years", "city_in_which_the_person_lives")
SHORT = ("name", "age", "city")
HOSTILE = [
    {"regex": "((a{1,100}){1,100}){1,100}"},
    {"regex": "(.{1,50}x){50}"},
    {"regex": ".*a.{20}b"},
    {"ebnf": 'start: s\ns: s s | s s s | "a" | s "b" s'},
    {"json_schema": {"enum": [f"value-{i:05d}-{i * 7919 % 10007}" for i in range(5000)]}},
]


def person(names: tuple[str, str, str]) -> dict[str, Any]:
    name, age, city = names
    return {
        "type": "object",
        "properties": {
            name: {"type": "string", "maxLength": 12},
            age: {"type": "integer", "minimum": 0, "maximum": 120},
            city: {"type": "string", "maxLength": 12},
        },
        "required": [name, age, city],
        "additionalProperties": False,
    }


@contextmanager
def engine(**settings: Any) -> Iterator[Engine]:
    with Engine(device="cpu", kv_cache_tokens=32_768, max_num_seqs=64, **settings) as made:
        yield made


def jump(rounds: int) -> None:
    print("| JSON of three fields, 20 requests in turn | tokens | forward passes | seconds, best of", rounds, "|")
    print("| --- | ---: | ---: | ---: |")
    with engine(jump_forward=False) as plain, engine() as jumping:
        prompt = plain.tokenizer.apply_chat_template(QUESTION)
        for label, names in (("short keys", SHORT), ("long keys", LONG)):
            params = SamplingParams(json_schema=person(names), temperature=0, max_tokens=120)
            found: dict[str, list[tuple[int, int, float]]] = {"plain": [], "jump-forward": []}
            for _ in range(rounds):
                for kind, one in (("plain", plain), ("jump-forward", jumping)):
                    one.generate(prompt, params)
                    before, began = one.stats().steps, time.perf_counter()
                    outputs = [one.generate(prompt, params) for _ in range(20)]
                    seconds = time.perf_counter() - began
                    tokens = sum(len(output.token_ids) for output in outputs)
                    found[kind].append((tokens, one.stats().steps - before, seconds))
            for kind, rows in found.items():
                tokens, steps, _ = rows[0]
                print(f"| {label}, {kind} | {tokens} | {steps} | {min(row[2] for row in rows):.3f} |")


def masks(rounds: int) -> None:
    print("\n| 64 requests at once, 100 tokens each | ms a step, best of", rounds, "|")
    print("| --- | ---: |")
    schema = {"type": "array", "items": {"type": "string"}, "minItems": 200}
    kinds = {
        "free": SamplingParams(max_tokens=100, ignore_eos=True, temperature=0),
        "a JSON array of strings": SamplingParams(max_tokens=100, ignore_eos=True, temperature=0, json_schema=schema),
        "[a-z ]{400}": SamplingParams(max_tokens=100, ignore_eos=True, temperature=0, regex="[a-z ]{400}"),
    }
    with engine() as one:
        prompt = one.tokenizer.apply_chat_template(QUESTION)
        best = dict.fromkeys(kinds, 1e9)
        for _ in range(rounds):
            for label, params in kinds.items():
                one.generate(prompt, params)
                before, began = one.stats().steps, time.perf_counter()
                one.generate([prompt] * 64, params)
                best[label] = min(best[label], (time.perf_counter() - began) / (one.stats().steps - before))
        for label, seconds in best.items():
            print(f"| {label} | {seconds * 1e3:.2f} |")


def gaps(url: str, tokens: int) -> list[float]:
    body = {"prompt": "Once", "max_tokens": tokens, "ignore_eos": True, "stream": True}
    with httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=60) as reply:
        arrivals = [time.monotonic() for line in reply.iter_lines() if line.startswith("data: {")]
    return sorted(later - earlier for earlier, later in itertools.pairwise(arrivals))


def hostile(rounds: int) -> None:
    print("\n| a stream's gaps, ms, steps of 5 ms | p50 | p99 | longest | of", "|")
    print("| --- | ---: | ---: | ---: | ---: |")
    with server(SHIPPED, 0.005, None, overlap=True) as running:
        url = f"http://127.0.0.1:{running.port}"

        def row(label: str, found: list[float]) -> None:
            p50, p99 = (found[len(found) * share // 100] for share in (50, 99))
            print(f"| {label} | {p50 * 1e3:.1f} | {p99 * 1e3:.1f} | {found[-1] * 1e3:.1f} | {len(found)} |")

        def attack(fields: dict[str, Any]) -> None:
            params = {"max_new_tokens": 150, "ignore_eos": True, "n": 8, **fields}
            httpx.post(f"{url}/generate", json={"text": "a", "sampling_params": params}, timeout=120)

        alone: list[float] = []
        beside: list[float] = []
        harmless: list[float] = []
        for _ in range(rounds):
            alone += gaps(url, 400)
            for collected, kinds in ((harmless, [{}] * len(HOSTILE)), (beside, HOSTILE)):
                others = [threading.Thread(target=attack, args=(fields,)) for fields in kinds]
                for other in others:
                    other.start()
                collected += gaps(url, 400)
                for other in others:
                    other.join()
        row("alone", sorted(alone))
        row("beside 40 free requests", sorted(harmless))
        row("beside 40 hostile ones", sorted(beside))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="jump,masks,hostile")
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    print(f"load average {os.getloadavg()[0]:.1f}\n")
    parts = {"jump": jump, "masks": masks, "hostile": hostile}
    for name in arguments.only.split(","):
        parts[name](arguments.rounds)


if __name__ == "__main__":
    main()
