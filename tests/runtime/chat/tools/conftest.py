"""Outputs of models, one for each way they go, by format: the modules beside this file."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from .cases import Case
from .cases_hermes import HERMES, REASONING
from .cases_json import LLAMA, MISTRAL
from .cases_tags import PYTHONIC, XML

CORPUS = [
    (f"{group}: {case.name}", case)
    for group, cases in {
        "hermes": HERMES,
        "reasoning": REASONING,
        "llama": LLAMA,
        "mistral": MISTRAL,
        "xml": XML,
        "pythonic": PYTHONIC,
    }.items()
    for case in cases
]


@pytest.fixture(params=[case for _, case in CORPUS], ids=[name for name, _ in CORPUS])
def case(request: pytest.FixtureRequest) -> Case:
    return request.param


@pytest.fixture(scope="session")
def corpus() -> list[Case]:
    return [case for _, case in CORPUS]


@pytest.fixture(scope="session")
def make_case() -> Callable[..., Case]:
    return Case
