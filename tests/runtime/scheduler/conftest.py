"""An executor whose tokens depend on the whole context, so that a wrong page gives a wrong token."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import pytest

from branchwise.runtime.config import EngineConfig
from branchwise.runtime.engine.core import EngineCore
from branchwise.runtime.logprobs import TokenLogprob, unpack
from branchwise.runtime.messages import Finished, Generate, StepOutput
from branchwise.runtime.sampling_params import SamplingParams
from branchwise.runtime.scheduler.memory import LowerTiers
from branchwise.runtime.step import PENDING, StepPlan, StepResult, TokenLogprobs
from branchwise.runtime.tiers.copies import Ended, HostCopies
from branchwise.runtime.tiers.disk import DiskTier

VOCAB = 50
EOS = 1


def next_token(context: Sequence[int], seed: int) -> int:
    """The oracle: the token that the canary model samples after ``context``."""
    data = np.asarray(context, dtype="<i4").tobytes() + int(seed).to_bytes(8, "little")
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little") % VOCAB


def score_of(context: Sequence[int]) -> tuple[float, int, int, float]:
    """The oracle's logprob and rank of the context's last token, and the likeliest token in its place with its
    logprob."""
    mark = next_token(context, 0)
    return -float(mark + 1), mark + 2, next_token(context[:-1], 1), -0.5


def prompt_rows(scores: Sequence[tuple[float, int, int, float]], k: int) -> TokenLogprobs:
    chosen, ranks, ids, best = (np.array(column) for column in zip(*scores, strict=True))
    wide = np.repeat(ids[:, None], k, axis=1).astype(np.int32)
    top = np.repeat(best[:, None], k, axis=1).astype(np.float32)
    return TokenLogprobs(chosen.astype(np.float32), ranks.astype(np.int32), wide, top)


def expected_output(prompt: Sequence[int], seed: int, params: SamplingParams) -> tuple[list[int], str]:
    context = list(prompt)
    stops = set(params.stop_token_ids) | (set() if params.ignore_eos else {EOS})
    outputs: list[int] = []
    for _ in range(params.max_tokens or 0):
        token = next_token(context, seed)
        context.append(token)
        outputs.append(token)
        if token in stops:
            return outputs, "stop"
    return outputs, "length"


class Pending:
    def __init__(self, result: StepResult) -> None:
        self._result = result

    def result(self) -> StepResult:
        return self._result


class CanaryExecutor:
    """A KV pool whose slots hold the token and position written to them. Attention reads the whole context back
    through the page table and checks it, so a wrong page, a lost copy or a page reused too early cannot go unseen."""

    vocab_size = VOCAB

    def __init__(self, num_pages: int, page_size: int, max_rows: int, max_len: int) -> None:
        self.num_pages, self.page_size = num_pages, page_size
        self.slots = np.full((num_pages * page_size, 2), -7, dtype=np.int64)  # (token, position)
        self.table = np.full((max_rows, -(-max_len // page_size) + 1), -1, dtype=np.int32)
        self.seeds = np.zeros(max_rows, dtype=np.int64)
        self.last_token = np.zeros(max_rows, dtype=np.int32)
        self.prefilled = self.scored = 0
        self.prompts: dict[int, list[int]] = {}  # by row
        self.plans: list[StepPlan] = []
        self.fail_next = False

    def beat(self) -> None:
        pass

    def launch(self, plan: StepPlan) -> Pending:
        if self.fail_next:
            self.fail_next = False
            raise RuntimeError("injected")
        self.plans.append(plan)
        assert len(set(plan.rows.tolist())) == len(plan.rows), "a row appears twice"
        assert (plan.q_lens >= 1).all() and plan.q_lens.sum() == len(plan.token_ids)
        assert (plan.q_lens[: plan.num_decodes] == 1).all()
        cells = list(zip(plan.table_rows.tolist(), plan.table_cols.tolist(), strict=True))
        assert len(set(cells)) == len(cells), "a page-table cell is written twice"
        self.table[plan.table_rows, plan.table_cols] = plan.table_pages
        for start in plan.starts:
            self.seeds[start.row] = start.seed
            self.prompts[start.row] = start.tokens[: start.prompt_len].tolist()
        page = self.page_size
        if len(plan.copies):
            pool = self.slots.reshape(self.num_pages, page, 2)
            pool[plan.copies[:, 1]] = pool[plan.copies[:, 0]]
        offset = 0
        written: set[int] = set()
        for row, q_len, kv_len in zip(plan.rows, plan.q_lens, plan.kv_lens, strict=True):
            tokens = plan.token_ids[offset : offset + q_len].copy()
            offset += q_len
            tokens[tokens == PENDING] = self.last_token[row]
            positions = np.arange(kv_len - q_len, kv_len)
            slots = self.table[row, positions // page] * page + positions % page
            assert not written & set(slots.tolist()), "two requests write one slot"
            written |= set(slots.tolist())
            self.slots[slots, 0], self.slots[slots, 1] = tokens, positions
        self.prefilled += int(plan.q_lens[plan.num_decodes :].sum())
        drawn = []
        for index in range(len(plan.rows)):
            row, kv_len = plan.rows[index], plan.kv_lens[index]
            positions = np.arange(kv_len)
            read = self.slots[self.table[row, positions // page] * page + positions % page]
            assert (read[:, 1] == positions).all(), "a slot of the context belongs to another position"
            if index in plan.sampled_requests:
                token = next_token(read[:, 0].tolist(), int(self.seeds[row]))
                self.last_token[row] = token
                drawn.append(token)
        result = StepResult(np.array(drawn, dtype=np.int32))
        for index, k, wanted in plan.prompt_logprobs:
            row, end = int(plan.rows[index]), int(plan.kv_lens[index])
            start = max(wanted, end - int(plan.q_lens[index]) + 1)
            prompt = self.prompts[row]
            stop = min(end + 1, len(prompt))
            positions = np.arange(end)
            read = self.slots[self.table[row, positions // page] * page + positions % page, 0].tolist()
            scores = [score_of([*read[:at], prompt[at]]) for at in range(start, stop)]
            result.prompt_logprobs[index] = start, prompt_rows(scores, k)
            self.scored += stop - start
        return Pending(result)

    def prepare_next(self) -> bool:
        return False

    def close(self) -> None:
        pass


class CanaryHost:
    """A `HostCopier` for the canary executor. Loads end late, fail or stay under way as ``fate`` says of each."""

    def __init__(self, executor: CanaryExecutor, num_slots: int) -> None:
        self.num_slots = num_slots
        self._pool = executor.slots.reshape(executor.num_pages, -1)
        self.page_bytes = self._pool.shape[1] * self._pool.itemsize
        self.memory = np.zeros((num_slots, self.page_bytes), np.uint8)
        self.fate: Callable[[], str] = lambda: "arrives"
        self.loads = self.stores = self._calls = 0
        self._under_way: list[tuple[int, np.ndarray, np.ndarray]] = []

    def store(self, copies: HostCopies) -> None:
        assert len(set(copies.slots.tolist())) == len(copies.slots)
        self._calls += 1
        self.stores += len(copies.pages)
        self.memory[copies.slots] = self._pool[copies.pages].view(np.uint8)

    def load(self, copies: HostCopies) -> None:
        for id_, slots, pages in copies.loads:
            self._pool[pages] = -9  # until it has ended
            self._under_way.append((id_, slots, pages))

    def stored(self) -> int:
        return self._calls

    def ended(self) -> list[Ended]:
        ended, waiting = [], []
        for id_, slots, pages in self._under_way:
            fate = self.fate()
            if fate == "waits":
                waiting.append((id_, slots, pages))
                continue
            good = len(slots) if fate == "arrives" else len(slots) // 2
            self._pool[pages[:good]] = self.memory[slots[:good]].view(np.int64)
            self.loads += good
            ended.append(Ended(id_, good, 1e-4, damaged=fate == "damaged"))
        self._under_way = waiting
        return ended


@dataclass
class Driver:
    """Feeds a core, collects its output and compares it with the oracle."""

    core: EngineCore
    executor: CanaryExecutor
    host: CanaryHost | None = None
    prompts: dict[int, list[int]] = field(default_factory=dict)
    params: dict[int, SamplingParams] = field(default_factory=dict)
    outputs: dict[int, list[int]] = field(default_factory=dict)
    finished: dict[int, Finished] = field(default_factory=dict)
    prompt_logprobs: dict[int, dict[int, TokenLogprob]] = field(default_factory=dict)
    aborted: set[int] = field(default_factory=set)
    max_running: int = 0
    next_id: int = 1

    def add(
        self, prompt: Sequence[int], *, priority: int = 0, owner: str = "", salt: str = "", **params: object
    ) -> int:
        id_ = self.next_id
        self.next_id += 1
        defaults: dict[str, object] = {"max_tokens": 8, "seed": id_, "ignore_eos": True}
        self.params[id_] = SamplingParams(**(defaults | params))  # type: ignore[arg-type]
        self.prompts[id_] = list(prompt)
        self.outputs[id_] = []
        data = np.asarray(prompt, dtype="<i4").tobytes()
        self.core.add(Generate([id_], self.params[id_], tokens=data, namespace=(owner, salt), priority=priority))
        return id_

    def abort(self, id_: int) -> None:
        self.aborted.add(id_)
        self.core.abort(id_)

    def step(self, *, check: bool = True) -> None:
        self.take(self.core.step())
        self.max_running = max(self.max_running, len(self.core.scheduler.ledger.rows))
        if check:
            self.core.check()

    def take(self, output: StepOutput | None) -> None:
        if output is None:
            return
        ids = np.frombuffer(output.ids, dtype="<i8").tolist()
        assert len(set(ids)) == len(ids)
        for id_, token in zip(ids, np.frombuffer(output.tokens, dtype="<i4").tolist(), strict=True):
            assert id_ not in self.finished, "a token after the end"
            self.outputs[id_].append(token)
        for piece in output.prompt_logprobs:
            assert piece.id not in self.finished, "logprobs after the end"
            if piece.id not in self.prompts:
                continue  # of a branch
            found = self.prompt_logprobs.setdefault(piece.id, {})
            tokens = self.prompts[piece.id][piece.start :][: len(piece.rows.chosen) // 4]
            assert piece.start == max(found, default=piece.start - 1) + 1, "logprobs out of order"
            found.update(enumerate(unpack(tokens, piece.rows), piece.start))
        for finish in output.finished:
            assert finish.id not in self.finished, "two ends"
            self.finished[finish.id] = finish

    def drain(self, max_steps: int = 20_000) -> None:
        steps = 0
        while self.core.has_work:
            self.step()
            steps += 1
            assert steps < max_steps, f"no end in sight: {self.core.stats()}"

    def verify(self) -> None:
        """Every request ended once, with exactly the oracle's tokens, and all pages can be freed."""
        self.check_outputs()
        allocator = self.core.scheduler.tree.allocator
        self.core.scheduler.tree.flush()
        self.core.check()
        assert allocator.free == allocator.total
        assert len(self.core.scheduler.ledger.rows) == 0

    def check_outputs(self) -> None:
        """Every request ended once, with exactly the oracle's tokens."""
        for id_, prompt in self.prompts.items():
            finish, params = self.finished[id_], self.params[id_]
            expected, reason = expected_output(prompt, params.seed or 0, params)
            if id_ in self.aborted and finish.reason == "abort":
                assert self.outputs[id_] == expected[: len(self.outputs[id_])]
                continue
            assert self.outputs[id_] == expected
            self.verify_prompt_logprobs(id_)
            assert finish.reason == reason
            assert finish.completion_tokens == len(expected)

    def verify_prompt_logprobs(self, id_: int) -> None:
        params, prompt, found = self.params[id_], self.prompts[id_], self.prompt_logprobs.get(id_, {})
        if params.prompt_logprobs is None:
            assert not found
            return
        assert list(found) == list(range(max(1, params.prompt_logprob_start), len(prompt)))
        for position, row in found.items():
            chosen, rank, best_id, best = score_of(prompt[: position + 1])
            assert (row.logprob, row.rank) == (chosen, rank) and row.top == [(best_id, best)] * params.prompt_logprobs


@pytest.fixture
def make_driver() -> Callable[..., Driver]:
    def make(
        *,
        num_pages: int = 64,
        page_size: int = 4,
        max_len: int = 512,
        overlap: bool = False,
        host_slots: int = 0,
        disk: DiskTier | None = None,
        **config: object,
    ) -> Driver:
        settings = EngineConfig(page_size=page_size, overlap=overlap, **({"max_num_seqs": 8} | config))  # type: ignore[arg-type]
        executor = CanaryExecutor(num_pages, page_size, settings.max_num_seqs, max_len)
        host = CanaryHost(executor, host_slots) if host_slots else None
        lower = None if host is None else LowerTiers(host, disk)
        core = EngineCore(settings, executor, (EOS,), max_len, lower=lower)
        return Driver(core, executor, host)

    return make
