"""Programs nobody would write mean the same in process, on a server, with its branches, and read along or not."""

from __future__ import annotations

import random
from typing import Any

import pytest

import branchwise as bw

PIECES = [
    "Mira",
    "the baker",
    " of Fernhollow",
    "\n",
    " and",
    "日本",
    "🌳 tree",
    "?",
    "  ",
    "é",
    "<|im_end|>",
    "1 + 2 = ",
]
CHOICES = [" yes", " no", "maybe", " the baker", "the mill", " "]


def some(draw: random.Random, most: int) -> str:
    return "".join(draw.choice(PIECES) for _ in range(draw.randint(1, most)))


def write(draw: random.Random, name: str) -> Any:
    stop = draw.choice([None, " of", ["a", "e"], "\n", "ker"])
    temperature, n = draw.choice([0, 0.8, 2.0]), draw.choice([1, 1, 1, 2])
    return bw.gen(name, max_tokens=draw.randint(1, 8), stop=stop, temperature=temperature, n=n, ignore_eos=n == 1)


def grow(draw: random.Random, s: Any, depth: int = 0) -> None:
    for _ in range(draw.randint(1, 5)):
        match draw.choice(["text", "text", "gen", "gen", "select", "scope", "copy", "regex", "fork"]):
            case "text":
                s += some(draw, 4)
            case "gen":
                s += write(draw, draw.choice("abc"))
            case "select":
                s += bw.select(draw.choice("de"), draw.sample(CHOICES, 3))
            case "scope":
                with s.var_scope("scope"):
                    s += some(draw, 1) + bw.gen("inside", max_tokens=3)
            case "copy":
                twin = s.copy()
                twin += "zz" + bw.gen("twin", max_tokens=2)
                s["copy"] = twin.text()
            case "regex":
                s += bw.gen("regex", max_tokens=10, regex="[a-z]{1,3} [0-9]")
            case "fork" if depth < 2:
                forks = s.fork(draw.randint(1, 3))
                for fork in forks:
                    grow(draw, fork, depth + 1)
                forks.join(draw.choice(["gather_variable", "concate_and_append"]))


@bw.function
def program(s, number):
    draw = random.Random(number)
    if number % 2:
        s += some(draw, 2)
        grow(draw, s)
        return
    s += bw.system(some(draw, 3))
    for _ in range(draw.randint(1, 3)):
        with s.user():
            s += some(draw, 3)
        with s.assistant():
            grow(draw, s)


def outcome(state: bw.State) -> Any:
    return state.text(), state.messages(), {name: state[name] for name in sorted(state._interpreter.variables)}


@pytest.mark.parametrize("number", range(12))
def test_a_random_program(server: Any, engine: Any, number: int) -> None:
    expected = outcome(program.run(number, seed=number))
    for branches in (False, True):
        backend = bw.connect(server.url, "the-key", branches=branches)
        state = program.run(number, backend=backend, seed=number, stream=True)
        assert "".join(state.text_iter()) == state.text()
        assert outcome(state) == expected
