"""End tokens that only one of a model's files names end a conversation's answer."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from branchwise import Engine, SamplingParams
from branchwise.runtime.models.folder import SHIPPED

ABSENT = object()
MESSAGES = [{"role": "user", "content": "What is the capital of France?"}]


def shipped_with(folder: Path, config: Any, generation: Any) -> Path:
    """A copy of the shipped model whose two configs name other end tokens."""
    shutil.copytree(SHIPPED, folder)
    for name, value in (("config.json", config), ("generation_config.json", generation)):
        values = json.loads((folder / name).read_text())
        values.pop("eos_token_id", None)
        if value is not ABSENT:
            values["eos_token_id"] = value
        (folder / name).write_text(json.dumps(values))
    return folder


@pytest.mark.parametrize(("config", "generation"), [(0, 0), (ABSENT, ABSENT), (ABSENT, None), ("its own", None)])
def test_an_answer_ends_where_any_file_says_so(config: Any, generation: Any, tmp_path: Path) -> None:
    own = json.loads((SHIPPED / "config.json").read_text())["eos_token_id"]
    folder = shipped_with(tmp_path / "model", own if config == "its own" else config, generation)
    if config == "its own":  # a null in generation_config.json falls back to config.json
        tokenizer = folder / "tokenizer_config.json"
        values = json.loads(tokenizer.read_text())
        tokenizer.write_text(json.dumps({**values, "eos_token": values.get("pad_token") or values.get("bos_token")}))
    engine = Engine(folder, device="cpu", kv_cache_tokens=2048)
    try:
        output = engine.chat(MESSAGES, SamplingParams(temperature=0, max_tokens=200))
        assert output.finish_reason == "stop"
        assert "<|im_" not in output.text
    finally:
        engine.close()


def test_a_skipped_special_token_is_a_stop_string(tmp_path: Path) -> None:
    engine = Engine(SHIPPED, device="cpu", kv_cache_tokens=2048)
    try:
        params = SamplingParams(temperature=0, max_tokens=200, ignore_eos=True, stop=("<|im_end|>",))
        output = engine.chat(MESSAGES, params)
        plain = engine.chat(MESSAGES, SamplingParams(temperature=0, max_tokens=200))
        assert (output.finish_reason, output.text) == ("stop", plain.text)
    finally:
        engine.close()
