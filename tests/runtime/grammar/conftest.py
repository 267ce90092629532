"""A vocabulary small enough to try every text, and engines over a model of random weights."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from branchwise import Engine
from branchwise.runtime.tokenizer.tokenizer import Tokenizer

TINY = ["<eos>", "a", "b", "c", "ab", "bc", "abc", "ca"]


@pytest.fixture(scope="session")
def tiny_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("tiny")
    special = {"id": 0, "content": "<eos>", "special": True}
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    bpe = {
        "type": "BPE",
        "vocab": {token: id for id, token in enumerate(TINY)},
        "merges": [["a", "b"], ["b", "c"], ["ab", "c"], ["c", "a"]],
    }
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    document = {
        "version": "1.0",
        "added_tokens": [special | flags],
        "pre_tokenizer": byte_level,
        "decoder": byte_level,
        "model": bpe,
    }
    (folder / "tokenizer.json").write_text(json.dumps(document))
    return Tokenizer.load(folder)


@pytest.fixture(scope="session")
def make_engine(checkpoint: Callable[[str], Path]) -> Iterator[Callable[..., Engine]]:
    """``make_engine(**settings)``: one engine for each settings, checked at the end."""
    engines: dict[str, Engine] = {}

    def make(**settings: Any) -> Engine:
        settings = {"max_num_seqs": 16, "kv_cache_tokens": 8192, **settings}
        key = repr(sorted(settings.items()))
        if key not in engines:
            engines[key] = Engine(checkpoint("llama-gqa"), **settings)
        return engines[key]

    yield make
    for engine in engines.values():
        engine.check()
        engine.close()


@pytest.fixture(scope="session")
def generated() -> ModuleType:
    """The module `schemas.py`."""
    spec = importlib.util.spec_from_file_location("branchwise_test_schemas", Path(__file__).parent / "schemas.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
