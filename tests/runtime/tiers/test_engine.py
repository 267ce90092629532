"""A real model over memory tiers: the same tokens from every tier, after preemption, and after a restart."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from branchwise import Engine, LoadError, SamplingParams
from branchwise.runtime.tiers.host import HostTier

Checkpoint = Callable[[str], Path]
PROMPTS = [[(7 * i + j * j) % 60 + 3 for j in range(90)] for i in range(6)]
GREEDY = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)


@contextlib.contextmanager
def engine(folder: Path, **settings: Any) -> Iterator[Engine]:
    with Engine(folder, device="cpu", max_model_len=256, check_when_idle=True, **settings) as made:
        yield made


@pytest.fixture(scope="module")
def expected(checkpoint: Checkpoint) -> list[list[int]]:
    with engine(checkpoint("llama-gqa"), disable_radix_cache=True) as made:
        return [made.generate(prompt, GREEDY).token_ids for prompt in PROMPTS]


def test_the_same_tokens_from_the_host(checkpoint: Checkpoint, expected: list[list[int]]) -> None:
    """Six prompts of 90 tokens pass twice through a pool of 128 tokens."""
    with engine(checkpoint("llama-gqa"), kv_cache_tokens=128, host_cache="4MiB") as made:
        for again in (False, True):
            for prompt, tokens in zip(PROMPTS, expected, strict=True):
                output = made.generate(prompt, GREEDY)
                assert output.token_ids == tokens
                assert (output.cache.hit_tokens, output.cache.host_tokens > 60) == ((89, True) if again else (0, False))
        stats = made.stats()
        assert stats.host_tokens > 6 * 60 and stats.tier_failures == 0


def test_swapped_requests_answer_as_if_they_had_been_alone(checkpoint: Checkpoint) -> None:
    params = SamplingParams(temperature=0.9, seed=5, max_tokens=100, ignore_eos=True)
    with engine(checkpoint("llama-gqa")) as made:
        alone = [made.generate(prompt[:30], params).token_ids for prompt in PROMPTS]
    settings: dict[str, Any] = {"kv_cache_tokens": 320, "host_cache": "4MiB", "preemption": "swap"}
    with engine(checkpoint("llama-gqa"), **settings) as made:
        outputs = made.generate([prompt[:30] for prompt in PROMPTS], params)
        assert [output.token_ids for output in outputs] == alone
        assert made.stats().retractions > 0


def test_a_host_that_rounds_answers_nearly_the_same(checkpoint: Checkpoint, tmp_path: Path) -> None:
    """Prefixes come back from the host and, after a restart, from the disk: logprobs are close and not the same."""
    params = SamplingParams(temperature=0, max_tokens=1, logprobs=0)
    settings: dict[str, Any] = {"kv_cache_tokens": 128, "host_cache": "4MiB", "host_cache_dtype": "fp8"}
    settings |= {"disk_cache": str(tmp_path)}

    def logprob(output: Any) -> float:
        return (
            float(output.logprobs[0].chosen[0]) if hasattr(output.logprobs[0], "chosen") else output.logprobs[0].logprob
        )

    with engine(checkpoint("llama-gqa"), **settings) as made:
        fresh = [logprob(made.generate(prompt, params)) for prompt in PROMPTS]
        from_host = [made.generate(prompt, params) for prompt in PROMPTS]
        assert all(output.cache.host_tokens > 60 for output in from_host)
    with engine(checkpoint("llama-gqa"), **settings) as made:
        from_disk = [made.generate(prompt, params) for prompt in PROMPTS]
        assert all(output.cache.disk_tokens > 60 for output in from_disk)
    for outputs in (from_host, from_disk):
        errors = [abs(logprob(output) - before) for output, before in zip(outputs, fresh, strict=True)]
        assert 0 < max(errors) < 0.2


def test_a_restart_keeps_the_tree(
    checkpoint: Checkpoint, expected: list[list[int]], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A clean stop writes everything. The next engine answers from the disk, and computes one token a prompt."""
    settings: dict[str, Any] = {"kv_cache_tokens": 128, "host_cache": "4MiB", "disk_cache": str(tmp_path)}
    with engine(checkpoint("llama-gqa"), **settings) as made:
        for prompt in PROMPTS:
            made.generate(prompt, GREEDY)
        with pytest.raises(LoadError, match="in use by process"):
            Engine(checkpoint("llama-gqa"), device="cpu", **settings)
    with caplog.at_level(logging.INFO), engine(checkpoint("llama-gqa"), **settings) as made:
        for prompt, tokens in zip(PROMPTS, expected, strict=True):
            output = made.generate(prompt, GREEDY)
            assert output.token_ids == tokens
            assert (output.cache.hit_tokens, output.cache.disk_tokens) == (89, 89)
        assert made.stats().disk_tokens == 6 * 89
    assert any("tokens of earlier runs" in record.message for record in caplog.records)


def test_damage_on_the_disk_is_a_miss(checkpoint: Checkpoint, expected: list[list[int]], tmp_path: Path) -> None:
    settings: dict[str, Any] = {"kv_cache_tokens": 256, "disk_cache": str(tmp_path)}
    with engine(checkpoint("llama-gqa"), **settings) as made:
        for prompt in PROMPTS:
            made.generate(prompt, GREEDY)
    (segment,) = tmp_path.glob("*/segment-*.bin")
    data = bytearray(segment.read_bytes())
    for at in range(100, len(data), 9000):
        data[at] ^= 0xFF
    segment.write_bytes(data)
    with engine(checkpoint("llama-gqa"), **settings) as made:
        for _ in range(2):
            for prompt, tokens in zip(PROMPTS, expected, strict=True):
                assert made.generate(prompt, GREEDY).token_ids == tokens
        assert made.stats().tier_failures > 0


def test_what_is_used_twice_is_on_the_disk_before_the_engine_stops(checkpoint: Checkpoint, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"disk_cache": str(tmp_path)}
    with engine(checkpoint("llama-gqa"), **settings) as made:
        made.generate(PROMPTS[0], GREEDY)
        made.generate(PROMPTS[1], GREEDY)
        made.generate(PROMPTS[0], GREEDY)
        deadline = time.monotonic() + 60
        while made.stats().disk_pages_cached < 5:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        assert made.stats().disk_pages_cached <= 6, "only what was used twice"
        assert made.flush_cache() and made.stats().disk_pages_cached == 0


def test_settings_that_cannot_be_are_refused(checkpoint: Checkpoint, tmp_path: Path) -> None:
    for settings, problem in (
        ({"host_cache": "much"}, "is not a size"),
        ({"host_cache": "900TiB"}, "of memory are free"),
        ({"disk_cache": str(tmp_path), "disk_cache_size": "1KiB"}, "less than one page"),
        ({"host_cache": "1MiB", "disable_radix_cache": True}, "nothing for --host-cache"),
        ({"host_cache_dtype": "fp8", "preemption": "swap"}, "fp8 rounds .* --preemption swap does not allow"),
        ({"host_cache_dtype": "fp8", "kv_cache_dtype": "int4"}, "--kv-cache-dtype int4 does not allow"),
    ):
        with pytest.raises(LoadError, match=problem):
            Engine(checkpoint("llama-gqa"), device="cpu", **settings)  # type: ignore[arg-type]


def test_an_engine_without_its_disk_keeps_nothing_of_its_host_tier(
    checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a GPU a thread pins its memory, until it is closed."""
    closed: list[HostTier] = []
    monkeypatch.setattr(HostTier, "close", lambda tier: closed.append(tier))
    (tmp_path / "file").touch()
    with pytest.raises(LoadError, match="cannot be used"):
        Engine(checkpoint("llama-gqa"), device="cpu", host_cache="4MiB", disk_cache=str(tmp_path / "file"))
    assert len(closed) == 1


def test_a_disk_that_cannot_be_written_does_not_keep_the_engine(
    checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Serving goes on, and closing takes no longer than without the disk."""

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("branchwise.runtime.tiers.folder.CacheFolder.write", full)
    with engine(checkpoint("llama-gqa"), disk_cache=str(tmp_path)) as made:
        for _ in range(2):
            for prompt in PROMPTS:
                assert made.generate(prompt, GREEDY).token_ids
        assert made.stats().disk_pages_cached == 0
