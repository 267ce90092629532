"""Measures steps of a model on this machine and fits `branchwise simulate --step-times` to them.

    python tests/benchmarks/fit_step_times.py [MODEL] [--longest 4096] [--batch 32]

Prompts of several lengths, and decodes of several batches and contexts, each step timed from launch to result. The fit
is to the median of each shape, so that a step that another program delays does not count.
"""

from __future__ import annotations

import argparse
import time
from typing import Any

import numpy as np

from branchwise.runtime.config import EngineConfig
from branchwise.runtime.engine.loading import load_engine
from branchwise.runtime.messages import Generate
from branchwise.runtime.sampling_params import SamplingParams
from branchwise.runtime.simulation.step_times import fit
from branchwise.runtime.step import StepResult

DECODES = 8  # steps of each shape


class Done:
    """A step that has run already."""

    def __init__(self, result: StepResult) -> None:
        self._result = result

    def result(self) -> StepResult:
        return self._result


def medians(samples: list[tuple[int, int, float]]) -> list[tuple[int, int, float]]:
    """One sample of each shape: prompt tokens and KV tokens in steps of a tenth, the median of the seconds."""
    shapes: dict[tuple[int, int], list[tuple[int, int, float]]] = {}
    for prompt, kv, seconds in samples:
        shape = tuple(int(10 * np.log1p(count)) for count in (prompt, kv))
        shapes.setdefault((shape[0], shape[1]), []).append((prompt, kv, seconds))
    found = (np.median(np.array(each), axis=0) for each in shapes.values())
    return [(round(prompt), round(kv), float(seconds)) for prompt, kv, seconds in found]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?", default="")
    parser.add_argument("--longest", type=int, default=4096, help="tokens of the longest prompt")
    parser.add_argument("--batch", type=int, default=32, help="most requests that decode together")
    asked = parser.parse_args()
    config = EngineConfig(model=asked.model, overlap=False, disable_radix_cache=True)
    core = load_engine(config).core
    samples: list[tuple[int, int, float]] = []
    launch = core.executor.launch

    def timed(plan: Any) -> Any:
        began = time.perf_counter()
        result = launch(plan).result()
        kv = int(plan.kv_lens[: plan.num_decodes].sum())
        samples.append((plan.num_tokens - plan.num_decodes, kv, time.perf_counter() - began))
        return Done(result)

    core.executor.launch = timed  # type: ignore[method-assign]
    rng, number = np.random.default_rng(0), 0
    longest = min(asked.longest, core.scheduler.limits.max_model_len - DECODES - 1)
    for length in (16, longest // 8, longest // 2, longest):
        for batch in (1, asked.batch // 4, asked.batch):
            if length * batch > core.scheduler.limits.pool_tokens // 2:
                continue
            for _ in range(2):
                for _ in range(max(1, batch)):
                    number += 1
                    prompt = rng.integers(0, core.scheduler.limits.vocab_size, length).astype("<i4")
                    params = SamplingParams(max_tokens=DECODES, ignore_eos=True, seed=0)
                    core.add(Generate([number], params, tokens=prompt.tobytes()))
                while core.has_work:
                    core.step()
    core.close()
    shapes = medians(samples[len(samples) // 10 :])  # the first steps warm up
    found = fit(shapes)
    errors = abs(np.array([found.seconds(prompt, kv) / seconds - 1 for prompt, kv, seconds in shapes]))
    print(
        f"{len(samples)} steps of {len(shapes)} shapes; median error {np.median(errors):.0%}, nine tenths "
        f"within {np.quantile(errors, 0.9):.0%}"
    )
    print(f"--step-times {found.base:.3g},{found.per_prompt_token:.3g},{found.per_kv_token:.3g}")


if __name__ == "__main__":
    main()
