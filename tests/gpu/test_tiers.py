"""The host tier on a device: bytes, order against steps, and answers."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
if not torch.cuda.is_available():
    pytest.skip("needs a GPU", allow_module_level=True)

from branchwise import Engine, SamplingParams  # noqa: E402
from branchwise.kernels.kv_pool import KVLayout, KVPool  # noqa: E402
from branchwise.runtime.tiers import host as host_module  # noqa: E402
from branchwise.runtime.tiers.copies import Ended, HostCopies  # noqa: E402
from branchwise.runtime.tiers.gate import Gate  # noqa: E402
from branchwise.runtime.tiers.host import HostTier  # noqa: E402
from branchwise.runtime.tiers.page_format import PageFormat  # noqa: E402

pytestmark = pytest.mark.gpu
NONE = np.empty(0, np.int32)


def wait(tier: HostTier, loads: int) -> list[Ended]:
    ended: list[Ended] = []
    deadline = time.monotonic() + 20
    while len(ended) < loads:
        ended += tier.ended()
        assert time.monotonic() < deadline
    return ended


@pytest.mark.parametrize("way", ["2d", "gathered"])
def test_pages_come_back_as_they_were(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stores wait for the step that wrote the pages, later steps for the stores, and loads for everything launched."""
    if way == "gathered":
        monkeypatch.setattr(host_module, "_MAX_PITCH", 0)
    pool = KVPool.allocate(KVLayout(8, 16, 8, 128, torch.bfloat16), 300, torch.device("cuda"))
    tier = HostTier(pool, 200)
    data = pool.fragments()
    pages = np.random.default_rng(0).permutation(300)[:200].astype(np.int32)
    slots = np.random.default_rng(1).permutation(200).astype(np.int32)
    for step in range(5):
        torch.cuda._sleep(20_000_000)  # the step is still running when its pages are to be copied
        data.random_(0, 256)
        tier.launched(step)
        expected = data[:, torch.from_numpy(pages).long().cuda()].clone()
        tier.store(HostCopies(pages, slots, step))
        data.zero_()  # a later step writes at once
        tier.load(HostCopies(NONE, NONE, -1, [(step, slots[:100], pages[100:]), (9, slots[100:], pages[:100])]))
        assert [(end.id, end.good) for end in wait(tier, 2)] == [(step, 100), (9, 100)]
        found = data[:, torch.from_numpy(np.concatenate([pages[100:], pages[:100]])).long().cuda()]
        assert torch.equal(found, expected)
        assert tier.stored() == step + 1
    tier.close()


def test_rounded_pages_are_those_of_the_specification() -> None:
    """``--host-cache-dtype fp8``: what comes back is what `PageFormat` computes on a CPU, while steps run."""
    pool = KVPool.allocate(KVLayout(8, 16, 8, 128, torch.bfloat16), 100, torch.device("cuda"))
    tier = HostTier(pool, 80, fp8=True)
    pages, slots = np.arange(80, dtype=np.int32)[::-1].copy(), np.arange(80, dtype=np.int32)
    for step in range(3):
        torch.cuda._sleep(20_000_000)
        pool.data.normal_()
        tier.launched(step)
        before = pool.fragments()[:, torch.from_numpy(pages).long().cuda()].cpu()
        tier.store(HostCopies(pages, slots, step))
        pool.data.zero_()
        tier.load(HostCopies(NONE, NONE, -1, [(step, slots, pages)]))
        assert [end.good for end in wait(tier, 1)] == [80]
        found = pool.fragments()[:, torch.from_numpy(pages).long().cuda()].cpu()
        format_ = PageFormat(pool.layout, fp8=True)
        assert torch.equal(torch.from_numpy(tier.memory[slots]), format_.encode(before))
        assert torch.equal(found, format_.decode(format_.encode(before)))
    tier.close()


@pytest.fixture
def always_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    """So small a model computes 90 tokens sooner than they are copied: the gate would choose that."""
    monkeypatch.setattr(Gate, "pays", lambda *_: True)


def test_answers_do_not_change(gpu_checkpoint: Callable[[str], Path], always_copied: None) -> None:
    """Prompts one by one, twice: a prefix from the host gives the tokens that it gives from the device."""
    prompts = [[(7 * i + j * j) % 60 + 3 for j in range(90)] for i in range(24)]
    params = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True)
    settings: dict[str, Any] = {"device": "cuda", "dtype": "bfloat16", "attention_backend": "triton"}
    found = []
    for pool in ({"kv_cache_tokens": 8192}, {"kv_cache_tokens": 512, "host_cache": "256MiB", "check_when_idle": True}):
        with Engine(str(gpu_checkpoint("llama-gqa")), max_model_len=256, **settings, **pool) as engine:
            found.append([[engine.generate(prompt, params).token_ids for prompt in prompts] for _ in range(2)])
            stats = engine.stats()
    assert found[0] == found[1]
    assert stats.host_tokens > 1000 and stats.tier_failures == 0


def test_answers_in_a_batch_do_not_change(gpu_checkpoint: Callable[[str], Path], always_copied: None) -> None:
    """Requests at once in a pool that holds a sixth of them, beside copies in both directions: the same bits."""
    prompts = [[(7 * i + j * j) % 60 + 3 for j in range(90)] for i in range(24)]
    params = SamplingParams(temperature=0.8, seed=3, max_tokens=40, ignore_eos=True, logprobs=1)
    settings: dict[str, Any] = {"device": "cuda", "deterministic": True, "max_model_len": 256}
    found = []
    for pool in (
        {"kv_cache_tokens": 8192},
        {"kv_cache_tokens": 512, "host_cache": "256MiB", "preemption": "swap", "check_when_idle": True},
    ):
        with Engine(str(gpu_checkpoint("llama-gqa")), **settings, **pool) as engine:
            answers = [[(one.token_ids, one.logprobs) for one in engine.generate(prompts, params)] for _ in range(4)]
            stats = engine.stats()
        found.append(answers)
    assert found[0] == found[1]
    assert stats.host_tokens > 1000 and stats.tier_failures == 0
