"""A vocabulary small enough to try every text, and engines over a model of random weights."""

from __future__ import annotations

import importlib.util
import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from branchwise import Engine
from branchwise.runtime.constraint import Constraint
from branchwise.runtime.grammar.llg import GrammarBackend
from branchwise.runtime.grammar.matcher import Grammar
from branchwise.runtime.models.folder import SHIPPED
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


class Schemas:
    """JSON schemas compiled for the shipped tokenizer."""

    def __init__(self) -> None:
        self.tokenizer = Tokenizer.load(SHIPPED)
        self.backend = GrammarBackend(self.tokenizer, self.tokenizer.vocab_size, [2, 0])
        self._bytes = [self.tokenizer.token_bytes(id) for id in range(self.tokenizer.vocab_size)]

    def compile(self, schema: Any) -> Grammar:
        """Raises `ConstraintError`."""
        return Grammar(self.backend, self.backend.compile(Constraint("json_schema", json.dumps(schema))))

    def take(self, schema: Any, text: str) -> bool:
        """Whether an output may be exactly this text."""
        matcher = self.backend.compile(Constraint("json_schema", json.dumps(schema)))
        ids = self.tokenizer.encode(text, add_special_tokens=False).tolist()
        return bool(matcher.try_consume_tokens(ids) == len(ids) and matcher.is_accepting())

    def write(self, grammar: Grammar, seed: int, most: int = 200) -> str | None:
        """An output of random tokens, which closes strings and brackets half of the time; None if it did not end.

        Fails if the output cannot go on.
        """
        r, matcher, ids = random.Random(seed), grammar.matcher(), []
        while not matcher.ended and len(ids) < most:
            matcher.compute_mask()
            if matcher.ended:
                break
            allowed = np.flatnonzero(np.unpackbits(matcher.mask.view(np.uint8), bitorder="little")).tolist()
            assert allowed, "nothing may follow"
            closing = [id for id in allowed if id in (0, 2) or self._bytes[id][:1] in b'"}],']
            token = r.choice(closing) if closing and r.random() < 0.5 else r.choice(allowed)
            if token in (0, 2):
                return self.tokenizer.decode(ids)
            ids.append(token)
            matcher.advance(token)
        assert matcher.error is None, f"{matcher.error} after {self.tokenizer.decode(ids)}"
        return self.tokenizer.decode(ids) if matcher.finished else None


@pytest.fixture(scope="session")
def compiled() -> Schemas:
    return Schemas()
