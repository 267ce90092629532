"""A driver that turns a few lines into a `StepPlan`, and transformers' greedy continuation to compare with."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from branchwise.runtime.config import EngineConfig
from branchwise.runtime.executor.executor import ModelExecutor
from branchwise.runtime.sampling_params import SamplingParams
from branchwise.runtime.step import RowStart, StepPlan, StepResult

GREEDY = SamplingParams(temperature=0.0)


class Driver:
    """Runs hand-written steps on one executor. The caller chooses the pages."""

    def __init__(self, executor: ModelExecutor) -> None:
        self.executor = executor
        self.steps = 0

    def launch(
        self,
        chunks: Sequence[tuple[int, Sequence[int], int, bool]],  # (row, query tokens, position of the first, samples)
        num_decodes: int = 0,
        table: Sequence[tuple[int, int, int]] = (),  # (row, column, page)
        copies: Sequence[tuple[int, int]] = (),
        starts: Sequence[RowStart] = (),
        prompt_logprobs: Sequence[tuple[int, int, int]] = (),
        samples: Sequence[int] | None = None,  # query tokens; None: the last ones of the chunks that sample
        **rest: Any,
    ) -> Any:
        self.steps += 1
        q_lens = np.array([len(tokens) for _, tokens, _, _ in chunks], np.int32)
        last = (np.cumsum(q_lens) - 1)[[bool(chunk[3]) for chunk in chunks]]
        writes = np.array(list(table), np.int32).reshape(-1, 3)
        plan = StepPlan(
            step=self.steps,
            rows=np.array([row for row, _, _, _ in chunks], np.int32),
            q_lens=q_lens,
            kv_lens=np.array([start + len(tokens) for _, tokens, start, _ in chunks], np.int32),
            token_ids=np.concatenate([np.asarray(tokens, np.int32) for _, tokens, _, _ in chunks]),
            num_decodes=num_decodes,
            samples=np.asarray(last if samples is None else samples, np.int32),
            table_rows=writes[:, 0],
            table_cols=writes[:, 1],
            table_pages=writes[:, 2],
            copies=np.array(list(copies), np.int32).reshape(-1, 2),
            starts=list(starts),
            prompt_logprobs=list(prompt_logprobs),
            **rest,
        )
        return self.executor.launch(plan)

    def step(self, *args: Any, **kwargs: Any) -> StepResult:
        result: StepResult = self.launch(*args, **kwargs).result()
        return result


def start(row: int, tokens: Sequence[int], params: SamplingParams = GREEDY, prompt_len: int | None = None) -> RowStart:
    ids = np.asarray(tokens, np.int32)
    return RowStart(row, params, seed=row, tokens=ids, prompt_len=len(ids) if prompt_len is None else prompt_len)


def columns(row: int, pages: Sequence[int], first: int = 0) -> list[tuple[int, int, int]]:
    return [(row, first + i, page) for i, page in enumerate(pages)]


@pytest.fixture(scope="session")
def make() -> SimpleNamespace:
    """Shorthands for plans: ``make.start``, ``make.columns``, ``make.greedy``."""
    return SimpleNamespace(start=start, columns=columns, greedy=GREEDY)


@pytest.fixture
def driver(checkpoint: Callable[[str], Path]) -> Callable[..., Driver]:
    """``driver(family, **config)`` drives a new executor with 32 pages of 8 tokens and 6 rows."""

    def build(family: str = "llama-gqa", **config: Any) -> Driver:
        settings = {"page_size": 8, "kv_cache_tokens": 256, "max_num_seqs": 6, "device": "cpu"} | config
        return Driver(ModelExecutor.load(EngineConfig(model=str(checkpoint(family)), **settings)))

    return build


@pytest.fixture(scope="session")
def oracle(checkpoint: Callable[[str], Path]) -> Callable[..., torch.Tensor]:
    """``oracle(family, tokens)``: transformers' float32 logits ``[len(tokens), vocab]``."""
    models: dict[str, Any] = {}

    def logits(family: str, tokens: Sequence[int]) -> torch.Tensor:
        import transformers

        if family not in models:
            models[family] = transformers.AutoModelForCausalLM.from_pretrained(
                checkpoint(family), dtype=torch.float32, attn_implementation="eager"
            ).eval()
        with torch.no_grad():
            found: torch.Tensor = models[family](torch.tensor([list(tokens)])).logits[0]
        return found

    return logits
