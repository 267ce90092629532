"""The outputs of models that the parser's own tests read, and answers made of them."""

from __future__ import annotations

import importlib
import sys
from array import array
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from branchwise.runtime.chat.tools.parser import StreamParser
from branchwise.runtime.logprobs import pack
from branchwise.runtime.messages import Delta, Finished
from branchwise.runtime.sampling_params import SamplingParams
from branchwise.runtime.server.http.chat.sample import Sample
from branchwise.runtime.server.http.openai.responses.reply import ResponseReply
from branchwise.runtime.server.http.openai.responses.request import read
from branchwise.runtime.server.http.state import AppState
from branchwise.runtime.step import TokenLogprobs
from branchwise.runtime.tokenizer.detokenizer import IncrementalDetokenizer
from branchwise.runtime.tokenizer.tokenizer import Tokenizer


def _tools_conftest() -> ModuleType:
    """The parser's conftest, as a module of a package: it imports the files beside it."""
    package = ModuleType("branchwise_tool_outputs")
    package.__path__ = [str(Path(__file__).parents[4] / "chat" / "tools")]
    sys.modules[package.__name__] = package
    return importlib.import_module(f"{package.__name__}.conftest")


OUTPUTS = _tools_conftest().CORPUS


@pytest.fixture(params=[case for _, case in OUTPUTS], ids=[name for name, _ in OUTPUTS])
def case(request: pytest.FixtureRequest) -> Any:
    """A text, how to parse it, and what it must be read as."""
    return request.param


@pytest.fixture
def told(tokenizer: Tokenizer) -> Callable[..., list[Delta]]:
    """``told(text, size)``: what the detokenizer says of ``text``, ``size`` tokens at a time, with logprobs."""

    def tell(text: str, size: int, reason: Any = "stop") -> list[Delta]:
        ids = tokenizer.encode(text, add_special_tokens=False).tolist()
        detokenizer = IncrementalDetokenizer(tokenizer, SamplingParams())
        texts = [detokenizer.push(id) for id in ids]
        texts = [*texts[:-1], (texts[-1] if texts else "") + detokenizer.finish()]
        none = np.zeros((1, 0), np.float32)
        rows = [
            pack(TokenLogprobs(np.array([-0.5], np.float32), np.array([9], np.int32), none.astype(np.int32), none))
            for _ in ids
        ]
        deltas = [
            Delta(1, "".join(texts[i : i + size]), array("i", ids[i : i + size]).tobytes(), rows[i : i + size])
            for i in range(0, len(ids), size)
        ] or [Delta(1)]
        deltas[-1].finish = Finished(1, reason, prompt_tokens=4, completion_tokens=len(ids))
        assert "".join(delta.text for delta in deltas) == text
        return deltas

    return tell


@pytest.fixture
def make_answer(make_state: Callable[..., AppState], tokenizer: Tokenizer) -> Callable[..., ResponseReply]:
    """``make_answer(parser, **fields of the request)``."""

    def make(
        parser: StreamParser | None, *, one_call: bool = False, offered: Any = None, **fields: Any
    ) -> ResponseReply:
        drawn = {name: fields[name] for name in ("temperature", "top_p") if name in fields}
        params = SamplingParams(logprobs=0 if fields.get("include") else None, **drawn)
        sample = Sample(tokenizer, params, parser, one_call=one_call)
        return ResponseReply(make_state(), read({"input": "x", **fields}), sample, offered or {})

    return make
