"""Every field of what people configure is explained where they ask: `help()`, the flags, and the limits it states."""

from __future__ import annotations

import math
import re
import typing
from collections.abc import Callable, Iterator
from typing import Any

import msgspec
import pytest
from typer.testing import CliRunner

from branchwise import EngineConfig, SamplingParams
from branchwise.frontend.cli.config_flags import field_docs
from branchwise.frontend.cli.main import app
from branchwise.runtime.config import ServerConfig, check
from branchwise.runtime.errors import BranchwiseError
from branchwise.runtime.sampling_params import MAX_LOGIT_BIAS, MAX_STOP_LENGTH, MAX_STOP_TOKEN_IDS, MAX_STOPS, validate

NUMBER = r"(-?\d+(?:\.\d+)?)"
VOCABULARY = 100_000
CHECKS: dict[type[msgspec.Struct], Callable[[Any], object]] = {
    SamplingParams: lambda params: validate(params, VOCABULARY),
    EngineConfig: check,
}


def number(text: str) -> float | int:
    return float(text) if "." in text else int(text)


def limits(text: str) -> Iterator[tuple[float, bool]]:
    """(a value, whether it is taken) on both sides of every limit that the text states."""
    if found := re.search(rf"[Ff]rom {NUMBER} to {NUMBER}\.", text):
        low, high = map(number, found.groups())
        yield from ((low, True), (high, True), (low - 1, False), (high + 1, False))
    if found := re.search(rf"more than {NUMBER}, at most {NUMBER}\.", text):
        low, high = map(number, found.groups())
        yield from ((low, False), (math.nextafter(low, 1), True), (high, True), (high + 1, False))
    if found := re.search(rf"(?<!\S){NUMBER} or more\b", text):
        low = number(found[1])
        yield from ((low, True), (low - 1, False))


@pytest.mark.parametrize("kind", [SamplingParams, EngineConfig, ServerConfig])
def test_every_field_is_explained(kind: type[msgspec.Struct]) -> None:
    docs = field_docs(kind)
    assert list(docs) == list(kind.__struct_fields__)
    for name, text in docs.items():
        assert text.endswith((".", ")")) and len(text) >= 15, name


def test_no_number_goes_without_its_limits() -> None:
    for kind in CHECKS:
        types = typing.get_type_hints(kind)
        for name, text in field_docs(kind).items():
            if types[name] in (int, float, int | None, float | None):
                assert list(limits(text)) or name == "tensor_parallel_size", name


@pytest.mark.parametrize("kind", CHECKS)
def test_the_limits_are_the_ones_that_are_checked(kind: type[msgspec.Struct]) -> None:
    stated = 0
    for name, text in field_docs(kind).items():
        for value, taken in limits(text):
            stated += 1
            others = {"max_tokens": None} if name == "min_tokens" else {}
            config = kind(**{**others, name: value})
            if taken:
                CHECKS[kind](config)
                continue
            with pytest.raises(BranchwiseError, match=name.replace("_", "[-_]")):
                CHECKS[kind](config)
    assert stated >= 30


def test_lists_say_how_long_they_may_be() -> None:
    docs = field_docs(SamplingParams)
    assert f"{MAX_STOPS} at most, of {MAX_STOP_LENGTH} characters" in docs["stop"]
    assert f"{MAX_STOP_TOKEN_IDS} at most" in docs["stop_token_ids"]
    assert f"{MAX_LOGIT_BIAS} entries at most" in docs["logit_bias"]


def test_a_flag_says_what_its_field_says() -> None:
    shown = CliRunner().invoke(app, ["serve", "--help"], env={"COLUMNS": "400"}).output
    said = " ".join(re.sub(r"\x1b\[[0-9;]*m", "", shown).split())
    docs = field_docs(ServerConfig) | field_docs(EngineConfig)
    without = {"engine", "instance", "namespace_secret", "null_executor", "null_step_seconds", "overlap"}
    for name in docs.keys() - without:
        assert docs[name] in said, name


def test_without_docstrings_nothing_is_explained_and_nothing_fails() -> None:
    class Bare(msgspec.Struct):
        x: int

    Bare.__doc__ = None
    assert field_docs(Bare) == {}
