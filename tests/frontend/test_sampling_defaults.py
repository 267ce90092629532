"""A model that wants to be greedy, in the language and on the command line: it is, until somebody says otherwise."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import branchwise as bw
from branchwise.frontend.lang.backend import GenerationRequest
from branchwise.frontend.lang.openai import OpenAIBackend

PROMPT = "A tree of tokens grows a branch"
NEUTRAL = {"temperature": 1.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0}


@bw.function
def program(s: bw.State, n: int = 1) -> None:
    s += PROMPT + bw.gen("first", max_tokens=20) + " and " + bw.gen("second", max_tokens=20, n=n)


def said(state: bw.State) -> list[Any]:
    return [state["first"], state["second"]]


@pytest.fixture(scope="module")
def engine(wanting_folder: Path) -> Iterator[bw.Engine]:
    with bw.Engine(wanting_folder, kv_cache_tokens=8192) as engine:
        yield engine


@pytest.fixture(scope="module")
def backends(engine: bw.Engine, wanting_server: Any) -> list[Any]:
    url = wanting_server.url
    return [engine, bw.connect(url, branches=False), bw.connect(url, branches=True)]


def test_a_program_that_says_nothing_draws_as_the_model_wants_on_every_backend(
    backends: list[Any], engine: bw.Engine, wanting_folder: Path, wanting_server: Any
) -> None:
    wanted = said(program.run(backend=engine, temperature=0))
    assert [said(program.run(backend=backend)) for backend in backends] == [wanted] * len(backends)
    texts = OpenAIBackend(wanting_server.url, wanting_folder.name)
    assert program.run(backend=texts)["first"] == wanted[0]
    forked = said(program.run(n=2, backend=engine))
    assert forked == [wanted[0], [wanted[1]] * 2]
    assert said(program.run(n=2, backend=bw.connect(backends[1].name, branches=False))) == forked
    uncached = backends[1].without_cache()
    assert said(program.run(n=2, backend=uncached)) == forked


def test_a_program_that_says_what_is_usual_gets_it(backends: list[Any], engine: bw.Engine) -> None:
    """It used not to be sent, being `SamplingParams`' own."""
    usual = said(program.run(backend=engine, seed=4, **NEUTRAL))
    assert usual != said(program.run(backend=engine, seed=4))
    for backend in backends:
        assert said(program.run(backend=backend, seed=4, **NEUTRAL)) == usual


def test_other_servers_are_told_what_is_said_and_nothing_else() -> None:
    backend = OpenAIBackend("http://127.0.0.1:1", "m")
    assert backend._body(GenerationRequest({"max_tokens": 5}), chats=False) == {"model": "m", "max_tokens": 5}
    body = backend._body(GenerationRequest({"max_tokens": 5, "seed": None, **NEUTRAL}), chats=True)
    assert body == {"model": "m", "max_tokens": 5, **NEUTRAL}


def branchwise(*arguments: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [sys.executable, "-m", "branchwise", *arguments], input=stdin, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return done


def test_serve_says_what_the_model_wants(wanting_server: Any, open_server: Any) -> None:
    line = "model defaults for fields that a request omits: temperature 1.7, top_k 1"
    assert line in re.sub(r"\x1b\[[0-9;]*m", "", wanting_server.output)
    assert "is silent" not in open_server.output


@pytest.mark.parametrize("where", ["here", "there"])
def test_generate_draws_as_the_model_wants_unless_a_flag_says_otherwise(
    where: str, wanting_folder: Path, wanting_server: Any
) -> None:
    at = ["--model", str(wanting_folder)] if where == "here" else ["--url", wanting_server.url]

    def texts(*flags: str) -> list[str]:
        done = branchwise("generate", *at, "--json", "--max-tokens", "20", "--seed", "3", *flags, PROMPT)
        return [one["text"] for one in json.loads(done.stdout)]

    greedy = texts("--temperature", "0", "--top-k", "0")
    assert texts() == greedy
    assert texts("--top-k", "0") != greedy, "with the model's temperature"


def test_chat_draws_as_the_model_wants_unless_a_flag_says_otherwise(wanting_server: Any) -> None:
    def talk(*flags: str) -> str:
        return branchwise("chat", "--url", wanting_server.url, "--max-tokens", "20", *flags, stdin="Hello\n").stdout

    greedy = talk("--temperature", "0")
    assert greedy.strip()
    assert [talk(), talk("--temperature", "1.2")] == [greedy, greedy], "top_k 1 is the model's"


def test_commands_keep_their_own_defaults_for_a_model_that_wants_nothing(open_server: Any) -> None:
    def texts(*flags: str) -> list[str]:
        done = branchwise("generate", "--url", open_server.url, "--json", "--max-tokens", "8", *flags, PROMPT)
        return [one["text"] for one in json.loads(done.stdout)]

    assert texts() == texts() == texts("--temperature", "0")


def test_doctor_sees_a_value_that_cannot_be_served(wanting_folder: Path, tmp_path: Path) -> None:
    for file in wanting_folder.iterdir():
        if file.name != "generation_config.json":
            (tmp_path / file.name).symlink_to(file)
    (tmp_path / "generation_config.json").write_text('{"top_p": 2}')
    done = subprocess.run(
        [sys.executable, "-m", "branchwise", "doctor", str(tmp_path)], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 1
    assert "generation_config.json: top_p must be greater than 0.0 and at most 1.0, got 2" in done.stdout
