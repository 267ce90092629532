"""The corpus of outputs that the parser's own tests have."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest


@pytest.fixture(scope="session")
def corpus() -> list[Any]:
    """The parser's conftest is imported as a module of a package: it imports the files beside it."""
    package = ModuleType("branchwise_tool_corpus")
    package.__path__ = [str(Path(__file__).parents[3] / "chat" / "tools")]
    sys.modules[package.__name__] = package
    module = importlib.import_module(f"{package.__name__}.conftest")
    return [case for _, case in module.CORPUS]
