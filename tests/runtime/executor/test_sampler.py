"""The sampler against plain per-request computations over the whole history."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import pytest
import torch

from branchwise.kernels import sampling
from branchwise.runtime.executor import sampler as sampler_module
from branchwise.runtime.executor.sampler import Sampler
from branchwise.runtime.sampling_params import SamplingParams
from branchwise.runtime.step import NON_FINITE, RowStart

V = 200
EOS = (2, 3)
PROMPT = (10, 11, 12, 10)


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def make(max_rows: int = 8, vocab_size: int = V) -> Sampler:
    return Sampler(max_rows, vocab_size, "cpu", eos_ids=EOS)


def start(
    sampler: Sampler,
    row: int,
    seed: int = 0,
    tokens: Sequence[int] = PROMPT,
    prompt_len: int | None = None,
    **params: object,
) -> None:
    known = np.array(tokens, np.int32)
    settings = SamplingParams(**params)  # type: ignore[arg-type]
    sampler.start(RowStart(row, settings, seed, known, len(known) if prompt_len is None else prompt_len))


def draw(sampler: Sampler, logits: torch.Tensor, rows: Sequence[int], positions: Sequence[int]) -> list[int]:
    sampled = sampler.sample(logits, np.array(rows, np.int32), np.array(positions, np.int64))
    assert sampled.tokens.dtype == torch.int64
    tokens, _ = sampled.to_result()
    assert tokens.dtype == np.int32
    assert tokens.tolist() == sampled.tokens.tolist()
    return [int(token) for token in tokens]


def logits_of(rows: int, seed: int = 0, vocab_size: int = V) -> torch.Tensor:
    return torch.randn(rows, vocab_size, generator=torch.Generator().manual_seed(seed)) * 2


KINDS: list[dict[str, object]] = [
    {"temperature": 0.0},
    {"temperature": 1.0},
    {"temperature": 0.8, "top_k": 20},
    {"temperature": 1.2, "top_p": 0.9},
    {"min_p": 0.05, "top_p": 0.99},
    {"top_k": 1, "temperature": 1.5},
    {"repetition_penalty": 1.3, "frequency_penalty": 0.5},
    {"temperature": 0.0, "presence_penalty": 1.0},
    {"logit_bias": {7: 4.0, 9: -100.0}},
    {"temperature": 0.0, "logit_bias": {3: 50.0}, "min_tokens": 4},
    {"stop_token_ids": (20, 21), "min_tokens": 6, "top_p": 0.5},
    {"temperature": 0.0, "logprobs": 3},
    {"logprobs": 0},
]


def test_a_rows_tokens_do_not_depend_on_its_neighbours_or_its_row() -> None:
    """Every kind of request alone, and all together in shuffled rows and orders: 10 steps, the same tokens."""
    count = len(KINDS)
    steps = [logits_of(count, seed=step) for step in range(10)]
    alone: list[list[int]] = []
    for kind, params in enumerate(KINDS):
        sampler = make()
        start(sampler, 5, seed=kind, **params)
        alone.append([draw(sampler, step[kind : kind + 1], [5], [4 + i])[0] for i, step in enumerate(steps)])

    generator = np.random.default_rng(0)
    rows = generator.permutation(32)[:count]
    together = make(max_rows=32)
    for kind, params in enumerate(KINDS):
        start(together, int(rows[kind]), seed=kind, **params)
    for i, step in enumerate(steps):
        order = generator.permutation(count)
        tokens = draw(together, step[order], rows[order].tolist(), [4 + i] * count)
        for kind, token in zip(order, tokens, strict=True):
            assert token == alone[kind][i], KINDS[kind]


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("vocab_size", [V, 256])  # with and without the blocks of `sampling.greedy`
def test_a_row_of_logits_that_is_not_finite_gives_no_token_and_the_others_theirs(value: float, vocab_size: int) -> None:
    sampler, clean = make(vocab_size=vocab_size, max_rows=16), make(vocab_size=vocab_size, max_rows=16)
    for row, params in enumerate(KINDS):
        start(sampler, row, seed=row, **params)
        start(clean, row, seed=row, **params)
    rows, positions = np.arange(len(KINDS), dtype=np.int32), np.full(len(KINDS), 4, np.int64)
    logits = logits_of(len(KINDS), vocab_size=vocab_size)
    expected, _ = clean.sample(logits, rows, positions).to_result()
    for broken in range(len(KINDS)):
        bad = logits.clone()
        bad[broken, 50 : 50 + broken + 1] = value  # one value suffices
        tokens, _ = sampler.sample(bad, rows, positions).to_result()
        assert tokens[broken] == NON_FINITE, KINDS[broken]
        others = rows != broken
        plain = np.array([not {"repetition_penalty", "presence_penalty"} & kind.keys() for kind in KINDS])
        assert (tokens[others & plain] == expected[others & plain]).all()
        assert (tokens[others] != NON_FINITE).all()


def test_each_kind_really_does_something() -> None:
    """Guards the test above: the kinds must sample different tokens."""
    tokens = []
    for params in KINDS:
        sampler = make()
        start(sampler, 0, seed=1, **params)
        tokens.append(tuple(draw(sampler, logits_of(1, seed=i), [0], [4 + i])[0] for i in range(12)))
    assert len(set(tokens)) >= 8


def test_seed_and_position_decide_the_token() -> None:
    sampler = make(max_rows=64)
    flat = torch.zeros(64, V)
    for row in range(64):
        start(sampler, row, seed=7)
    assert len(set(draw(sampler, flat, range(64), [9] * 64))) == 1  # one seed, one position
    assert len(set(draw(sampler, flat, range(64), range(4, 68)))) > 40  # one seed, many positions
    for row in range(64):
        start(sampler, row, seed=7 + row)
    assert len(set(draw(sampler, flat, range(64), [9] * 64))) > 40  # n samples of one request


def test_greedy_is_the_first_argmax_whatever_else_is_set() -> None:
    sampler = make()
    logits = logits_of(3)
    logits[:, 50] = logits[:, 120] = 30.0
    start(sampler, 0, temperature=0.0)
    start(sampler, 1, top_k=1)
    start(sampler, 2, temperature=0.0, top_p=0.5, min_p=0.3, top_k=10)
    assert draw(sampler, logits, [0, 1, 2], [4] * 3) == [50] * 3


@pytest.mark.parametrize("at_once", [2, 64])
def test_penalties_follow_the_whole_history(at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against the definitions, over 60 greedy steps of three rows that repeat themselves a lot."""
    monkeypatch.setattr(sampler_module, "PENALIZED_ROWS", at_once)
    settings = [(1.4, 0.0, 0.0), (1.0, 0.6, 0.3), (0.8, -0.4, 0.9)]
    histories = [list(PROMPT) for _ in settings]
    base = logits_of(3, vocab_size=20)
    sampler = make(vocab_size=20)
    for row, (repetition, frequency, presence) in enumerate(settings):
        start(
            sampler,
            row,
            temperature=0.0,
            repetition_penalty=repetition,
            frequency_penalty=frequency,
            presence_penalty=presence,
        )
    for step in range(60):
        logits = base + 0.1 * logits_of(3, seed=step, vocab_size=20)
        tokens = draw(sampler, logits, [0, 1, 2], [4 + step] * 3)
        for row, (repetition, frequency, presence) in enumerate(settings):
            expected = logits[row].clone()
            for token in set(histories[row]):
                expected[token] = expected[token] / repetition if expected[token] > 0 else expected[token] * repetition
            for token in set(histories[row][len(PROMPT) :]):
                expected[token] -= frequency * histories[row][len(PROMPT) :].count(token) + presence
            best = expected.topk(2).values
            assert tokens[row] == int(expected.argmax()) or best[0] - best[1] < 1e-5
            histories[row].append(tokens[row])
    assert len(set(histories[0])) > 5


def test_a_resumed_request_continues_as_if_never_retracted() -> None:
    params: dict[str, object] = {"repetition_penalty": 1.2, "frequency_penalty": 0.7, "presence_penalty": 0.2}
    params |= {"min_tokens": 12, "logit_bias": {2: 20.0}}
    steps = [logits_of(1, seed=step) for step in range(24)]
    sampler = make()
    start(sampler, 0, seed=5, **params)
    whole = [draw(sampler, step, [0], [4 + i])[0] for i, step in enumerate(steps)]
    for cut in (1, 9, 15):
        sampler = make()
        start(sampler, 0, seed=5, **params)
        first = [draw(sampler, step, [0], [4 + i])[0] for i, step in enumerate(steps[:cut])]
        start(sampler, 0, seed=99, frequency_penalty=2.0)  # somebody else had the row meanwhile
        draw(sampler, steps[0], [0], [4])
        start(sampler, 3, seed=5, tokens=[*PROMPT, *first], prompt_len=len(PROMPT), **params)
        rest = [draw(sampler, step, [3], [4 + cut + i])[0] for i, step in enumerate(steps[cut:])]
        assert first + rest == whole


@pytest.mark.parametrize("later", KINDS)
def test_no_state_of_a_former_request_leaks(later: dict[str, object]) -> None:
    """A row used by the most demanding request, then restarted, samples like a row that was never used."""
    used, fresh = make(), make()
    everything: dict[str, object] = {
        "temperature": 3.0,
        "top_k": 3,
        "top_p": 0.4,
        "min_p": 0.5,
        "frequency_penalty": -2.0,
        "presence_penalty": 2.0,
        "repetition_penalty": 5.0,
        "logit_bias": dict.fromkeys(range(100, 140), 90.0),
        "min_tokens": 1000,
        "stop_token_ids": tuple(range(50)),
        "logprobs": 9,
    }
    start(used, 0, seed=123, tokens=list(range(90)), prompt_len=40, **everything)
    for i in range(5):
        draw(used, logits_of(1, seed=i), [0], [90 + i])
    for sampler in (used, fresh):
        start(sampler, 0, seed=6, **later)
    for i in range(8):
        logits = logits_of(1, seed=100 + i)
        results = []
        for sampler in (used, fresh):
            sampled = sampler.sample(logits, np.array([0], np.int32), np.array([4 + i]))
            tokens, logprobs = sampled.to_result()
            results.append((tokens.tolist(), {k: (v.chosen.tolist(), v.top_ids.tolist()) for k, v in logprobs.items()}))
        assert results[0] == results[1]


def test_history_slots_are_reused_and_cleared() -> None:
    sampler = make(max_rows=16)
    for turn in range(50):  # more requests than rows: slots must be given back
        row = turn % 16
        start(sampler, row, tokens=[5] * 10, presence_penalty=2.0 if turn % 3 else 0.0)
    for row in range(16):
        start(sampler, row, temperature=0.0, tokens=[5, 6], prompt_len=2, presence_penalty=2.0)
    logits = torch.zeros(16, V)
    logits[:, 5] = 1.0
    assert draw(sampler, logits, range(16), [2] * 16) == [5] * 16  # in the prompt: presence does not count it
    assert 5 not in draw(sampler, logits, range(16), [3] * 16)  # in the output now


def test_min_tokens_holds_off_every_end() -> None:
    logits = torch.full((4, V), -10.0)
    logits[:, [2, 3, 40]] = 10.0
    logits[:, 77] = 5.0
    sampler = make()
    start(sampler, 0, temperature=0.0, min_tokens=3)
    start(sampler, 1, temperature=0.0, min_tokens=3, stop_token_ids=(40,))
    start(sampler, 2, temperature=0.0, min_tokens=3, stop_token_ids=(40,), ignore_eos=True)
    start(sampler, 3, temperature=0.0, min_tokens=0)
    for produced in range(5):
        tokens = draw(sampler, logits, [0, 1, 2, 3], [len(PROMPT) + produced] * 4)
        assert tokens == ([40, 77, 2, 2] if produced < 3 else [2, 2, 2, 2])


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_bias_of_100_forces_and_of_minus_100_forbids(temperature: float) -> None:
    sampler = make()
    start(sampler, 0, temperature=temperature, logit_bias={0: 100.0, V - 1: 100.0, 5: -100.0})
    logits = torch.zeros(1, V)
    logits[0, 5] = 60.0
    tokens = {draw(sampler, logits, [0], [4 + i])[0] for i in range(40)}
    assert tokens == ({0} if temperature == 0 else {0, V - 1})


def test_logprobs_are_of_the_raw_logits() -> None:
    sampler = make()
    start(sampler, 0, temperature=0.0)
    start(sampler, 1, temperature=0.3, logprobs=4, logit_bias={9: 50.0}, repetition_penalty=2.0)
    start(sampler, 2, temperature=0.0, logprobs=0)
    start(sampler, 3, temperature=0.0, logprobs=2)
    logits = logits_of(4)
    sampled = sampler.sample(logits, np.arange(4, dtype=np.int32), np.full(4, 4))
    tokens, logprobs = sampled.to_result()
    assert sorted(logprobs) == [1, 2, 3]
    assert tokens[1] == 9
    expected = torch.log_softmax(logits.double(), dim=-1)
    for sample, k in ((1, 4), (2, 0), (3, 2)):
        found = logprobs[sample]
        assert found.chosen.shape == (1,) and found.top.shape == (1, k) and found.top_ids.shape == (1, k)
        assert found.chosen.dtype == np.float32 and found.top_ids.dtype == np.int32
        assert found.chosen[0] == pytest.approx(float(expected[sample, tokens[sample]]), abs=1e-5)
        order = expected[sample].argsort(descending=True).tolist()
        assert found.ranks.tolist() == [1 + order.index(int(tokens[sample]))] and found.ranks.dtype == np.int32
        best = expected[sample].topk(k)
        assert found.top_ids[0].tolist() == best.indices.tolist()
        assert found.top[0].tolist() == pytest.approx(best.values.tolist(), abs=1e-5)


def test_logprobs_stay_finite_under_minus_infinity() -> None:
    sampler = make()
    start(sampler, 0, logprobs=20)
    logits = torch.full((1, V), -float("inf"))
    logits[0, 8] = 0.0
    tokens, logprobs = sampler.sample(logits, np.array([0], np.int32), np.array([4])).to_result()
    assert tokens.tolist() == [8]
    assert np.isfinite(logprobs[0].top).all()
    assert logprobs[0].top[0, 1] == np.float32(sampling.LOGPROB_FLOOR)


def test_the_callers_logits_are_not_modified() -> None:
    sampler = make(max_rows=len(KINDS))
    for row, params in enumerate(KINDS):
        start(sampler, row, **params)
    logits = logits_of(len(KINDS))
    before = logits.clone()
    draw(sampler, logits, range(len(KINDS)), [4] * len(KINDS))
    assert torch.equal(logits, before)


def test_a_vocabulary_of_one_and_a_step_without_samples() -> None:
    sampler = Sampler(2, 1, "cpu", eos_ids=(0, 5))  # eos ids outside the logits are ignored
    start(sampler, 0, tokens=[0], top_p=0.5, min_p=0.1, top_k=7, min_tokens=2, repetition_penalty=2.0)
    assert draw(sampler, torch.zeros(1, 1), [0], [1]) == [0]
    assert draw(sampler, torch.zeros(0, 1), [], []) == []


def test_out_of_range_top_k_is_off() -> None:
    sampler = make()
    for row, top_k in enumerate((0, -1, V, V + 1, 2**31 - 1)):
        start(sampler, row, seed=4, top_k=top_k)
    logits = logits_of(1).expand(5, -1).contiguous()
    for position in range(4, 30):
        assert len(set(draw(sampler, logits, range(5), [position] * 5))) == 1
