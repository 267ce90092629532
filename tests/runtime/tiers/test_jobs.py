"""The operator's jobs on the disk tier of a running engine."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from branchwise import Engine, SamplingParams
from branchwise.runtime.messages import Control

Checkpoint = Callable[[str], Path]
PROMPT = [(7 * i + i * i) % 60 + 3 for i in range(90)]  # five whole pages of 16
GREEDY = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)


class Operator:
    """An engine with a disk tier, and the control messages of its operator."""

    def __init__(self, model: Path, folder: Path, **settings: Any) -> None:
        self.engine = Engine(
            model, device="cpu", max_model_len=256, check_when_idle=True, disk_cache=str(folder), **settings
        )
        self.saved = folder / "saved"

    def ask(self, what: str, **question: Any) -> dict[str, Any]:
        thread = self.engine._thread
        argument = {"namespace": ("", ""), **question}
        reply = thread.ask(lambda: thread.core.control(Control(1, what, argument)))
        if reply.error is not None:
            raise RuntimeError(str(reply.error.error()))
        return dict(reply.value)

    def job(self, what: str, **question: Any) -> dict[str, Any]:
        number, deadline = self.ask(what, **question)["job"], time.monotonic() + 60
        while not (facts := self.ask("cache_disk_job", job=number)).pop("done"):
            assert time.monotonic() < deadline
            time.sleep(0.005)
        return facts

    def save(self, file: str, prompt: list[int] = PROMPT) -> dict[str, Any]:
        import numpy as np

        return self.job("cache_disk_save", tokens=np.array(prompt, "<i4").tobytes(), file=file)

    def __enter__(self) -> Operator:
        return self

    def __exit__(self, *_: object) -> None:
        self.engine.close()


def test_a_warmed_prompt_is_saved_and_loaded_elsewhere(checkpoint: Checkpoint, tmp_path: Path) -> None:
    """The other engine answers from the file with the same tokens, and so does one that is started after it."""
    model = checkpoint("llama-gqa")
    with Operator(model, tmp_path / "here") as here:
        with pytest.raises(RuntimeError, match="prompt is not cached to its end"):
            here.save("system")
        expected = here.engine.generate(PROMPT, GREEDY).token_ids
        assert here.save("system") == {"file": "system", "tokens": 80, "pages": 5}
        assert [each["file"] for each in here.ask("cache_disk_list")["files"]] == ["system"]
    (tmp_path / "there" / "saved").mkdir(parents=True)
    (here.saved / "system").rename(tmp_path / "there" / "saved" / "system")
    with Operator(model, tmp_path / "there") as there:
        assert there.job("cache_disk_load", file="system") == {"pages": 5, "added_pages": 5}
        assert there.job("cache_disk_load", file="system") == {"pages": 5, "added_pages": 0}
        output = there.engine.generate(PROMPT, GREEDY)
        assert output.token_ids == expected
        assert (output.cache.hit_tokens, output.cache.disk_tokens) == (80, 80)
    with Operator(model, tmp_path / "there") as there:
        output = there.engine.generate(PROMPT, GREEDY)
        assert output.token_ids == expected and output.cache.disk_tokens >= 80


def test_a_file_that_shares_a_part_with_the_disk_adds_the_rest(checkpoint: Checkpoint, tmp_path: Path) -> None:
    model, other = checkpoint("llama-gqa"), [*PROMPT[:40], *reversed(PROMPT)]
    with Operator(model, tmp_path) as engine:
        for prompt in (PROMPT, other):
            engine.engine.generate(prompt, GREEDY)
            engine.save(f"file{len(prompt)}", prompt)
        engine.engine.flush_cache()
        assert engine.ask("cache_disk_list")["tiers"]["disk"]["cached"] == 0
        assert engine.job("cache_disk_load", file="file90")["added_pages"] == 5
        assert engine.job("cache_disk_load", file="file130") == {"pages": 8, "added_pages": 6}
        for prompt, expected in ((PROMPT, 80), (other, 128 - 40)):  # 40 tokens are on the device by then
            assert engine.engine.generate(prompt, GREEDY).cache.disk_tokens == expected


@pytest.mark.parametrize(
    ("harm", "problem"), [("flip", "has changed"), ("cut", "cut off"), ("model", "model, page_bytes differ")]
)
def test_a_wrong_file_is_refused_with_the_reason(
    checkpoint: Checkpoint, tmp_path: Path, harm: str, problem: str
) -> None:
    model = checkpoint("llama-gqa")
    with Operator(model, tmp_path / "here") as here:
        expected = here.engine.generate(PROMPT, GREEDY).token_ids
        here.save("system")
        data = bytearray((here.saved / "system").read_bytes())
    if harm == "flip":
        data[-100] ^= 1
    elif harm == "cut":
        del data[-100:]
    saved = tmp_path / "there" / "saved"
    saved.mkdir(parents=True)
    (saved / "system").write_bytes(data)
    with Operator(checkpoint("llama-mha" if harm == "model" else "llama-gqa"), tmp_path / "there") as there:
        with pytest.raises(RuntimeError, match=problem):
            there.job("cache_disk_load", file="system")
        output = there.engine.generate(PROMPT, GREEDY)
        assert harm == "model" or output.token_ids == expected


def test_names_that_leave_the_folder_are_refused(checkpoint: Checkpoint, tmp_path: Path) -> None:
    with Operator(checkpoint("llama-gqa"), tmp_path) as engine:
        for name in ("../x", "", ".hidden", "a/b", "a.tmp", "x" * 200):
            with pytest.raises(RuntimeError, match="must be a name"):
                engine.job("cache_disk_load", file=name)
        with pytest.raises(RuntimeError, match="there is no file"):
            engine.job("cache_disk_load", file="nothing")


def test_verify_forgets_what_is_damaged_and_prune_keeps_what_fits(checkpoint: Checkpoint, tmp_path: Path) -> None:
    with Operator(checkpoint("llama-gqa"), tmp_path) as engine:
        engine.engine.generate(PROMPT, GREEDY)
        engine.save("system")
        assert engine.job("cache_disk_verify") == {"pages": 5, "damaged_pages": 0}
        (segment,) = tmp_path.glob("*/segment-*.bin")
        page_bytes = engine.ask("cache_disk_list")["page_bytes"]
        data = bytearray(segment.read_bytes())
        data[2 * page_bytes + 9] ^= 1
        segment.write_bytes(data)
        assert engine.job("cache_disk_verify") == {"pages": 5, "damaged_pages": 1}
        assert engine.ask("cache_disk_list")["tiers"]["disk"]["cached"] < 5
        assert engine.job("cache_disk_load", file="system")["added_pages"] > 0
        assert engine.job("cache_disk_verify") == {"pages": 5, "damaged_pages": 0}
        assert engine.ask("cache_disk_prune", keep_bytes=3 * page_bytes) == {
            "pruned_pages": 2,
            "pages": 3,
            "bytes": 3 * page_bytes,
        }
