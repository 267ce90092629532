"""The corpus of outputs that the parser's own tests have."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest

CORPUS = Path(__file__).parents[3] / "chat" / "tools" / "conftest.py"


@pytest.fixture(scope="session")
def corpus() -> list[Any]:
    spec = importlib.util.spec_from_file_location("branchwise_test_corpus", CORPUS)
    if spec is None or spec.loader is None:
        raise ImportError(f"{CORPUS} cannot be imported")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up while they are being made
    spec.loader.exec_module(module)
    return [case for _, case in module.CORPUS]
