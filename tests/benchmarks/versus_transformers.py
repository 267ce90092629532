"""The same branching programs through `transformers` ``generate``: what a person without a server would run.

One process, no HTTP, the same architecture and shape, float32, the same torch threads, greedy, every answer exactly as
long as asked. Two ways:

- sequential: one ``generate`` a request;
- batched: whatever the program asks at the same moment is one ``generate`` a group of equal lengths (no padding). The
  most that a caller of ``generate`` gets without writing a scheduler.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from branchwise.frontend.bench.workloads import WORKLOADS, RandomTokens, Tokens

MAX_BATCH = 32  # sequences of one generate call


class Transformers:
    """A random model of the folder's shape; `generate` has the signature the workloads call."""

    def __init__(self, folder: Path, batched: bool) -> None:
        torch.manual_seed(0)
        config = AutoConfig.from_pretrained(folder)
        self._model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
        self._batched = batched
        self._waiting: list[tuple[Tokens, int, asyncio.Future[Tokens]]] = []
        self._turn: asyncio.Task[None] | None = None
        self.requests = self.output_tokens = 0

    async def generate(
        self, prompt: Tokens, max_tokens: int, *, seed: int | None = None, temperature: float = 0.0
    ) -> Tokens:
        self.requests += 1
        self.output_tokens += max_tokens
        if not self._batched:
            return self._run([prompt], max_tokens)[0]
        answer: asyncio.Future[Tokens] = asyncio.get_running_loop().create_future()
        self._waiting.append((prompt, max_tokens, answer))
        if self._turn is None:
            self._turn = asyncio.create_task(self._answer_all())
        return await answer

    async def _answer_all(self) -> None:
        for _ in range(3):  # let every program that can go on ask first
            await asyncio.sleep(0)
        waiting, self._waiting, self._turn = self._waiting, [], None
        groups: dict[tuple[int, int], list[tuple[Tokens, asyncio.Future[Tokens]]]] = defaultdict(list)
        for prompt, max_tokens, answer in waiting:
            groups[len(prompt), max_tokens].append((prompt, answer))
        for (_, max_tokens), members in groups.items():
            for start in range(0, len(members), MAX_BATCH):
                part = members[start : start + MAX_BATCH]
                for (_, answer), output in zip(part, self._run([p for p, _ in part], max_tokens), strict=True):
                    answer.set_result(output)

    @torch.inference_mode()
    def _run(self, prompts: list[Tokens], max_tokens: int) -> list[Tokens]:
        ids = torch.tensor(prompts)
        out = self._model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=max_tokens,
            min_new_tokens=max_tokens,
            do_sample=False,
            pad_token_id=0,
        )
        return out[:, ids.shape[1] :].tolist()


def measure(folder: Path, workload: str, *, batched: bool, scale: float, seed: int, vocab: int) -> dict[str, Any]:
    """Runs one workload after a short warm-up; seconds, requests and output tokens."""
    model = Transformers(folder, batched)
    asyncio.run(model.generate(RandomTokens(10_000 + seed, vocab).tokens(300), 16))
    model.requests = model.output_tokens = 0
    start = time.perf_counter()
    asyncio.run(_program(model, workload, scale, seed, vocab))
    seconds = time.perf_counter() - start
    return {"makespan": round(seconds, 3), "requests": model.requests, "output_tokens": model.output_tokens}


async def _program(model: Transformers, workload: str, scale: float, seed: int, vocab: int) -> None:
    await WORKLOADS[workload].run(model.generate, RandomTokens(f"{workload}/{seed}", vocab), scale)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="as tiny_model.py writes it")
    parser.add_argument("--workloads", default="fewshot,agents,no_sharing")
    parser.add_argument("--scale", type=float, default=0.05)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--vocab", type=int, default=8000)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    results: dict[str, dict[str, Any]] = {}
    for name in args.workloads.split(","):
        results[name] = {}
        for way in ("sequential", "batched"):
            result = measure(
                args.folder, name, batched=way == "batched", scale=args.scale, seed=args.seed, vocab=args.vocab
            )
            results[name][way] = result
            print(f"{name:12} {way:10} {result['makespan']:8.2f} s  {torch.get_num_threads()} threads", flush=True)
    if args.out is not None:
        args.out.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
