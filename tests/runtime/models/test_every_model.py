"""A sample of `tests/every_model.py`, the table of every causal language model in docs/models.md."""

from __future__ import annotations

import importlib.util
import re
import sys
from pathlib import Path
from types import ModuleType

import pytest

TESTS = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def every_model() -> ModuleType:
    spec = importlib.util.spec_from_file_location("branchwise_every_model", TESTS / "every_model.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("kind", "served"),
    [("dots1", "native"), ("gpt_bigcode", "transformers"), ("hy_v3", "transformers"), ("deepseek_v3", "transformers")],
)
def test_a_small_model_says_what_transformers_says(kind: str, served: str, every_model: ModuleType) -> None:
    verdict = every_model.verdict(kind, kind)
    assert (verdict.served, verdict.reason) == (served, "")


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("minimax_m3_vl_text", "layers of minimax_m3_sparse, and pages hold"),
        ("deepseek_v32", "layers of indexed_attention, and pages hold"),
        ("llama4_text", "layers of chunked_attention, and pages hold"),
        ("gpt_neo", "not marked in transformers"),
    ],
)
def test_what_pages_cannot_hold_is_refused(kind: str, reason: str, every_model: ModuleType) -> None:
    """By a small model, or by the default config where a small one is not valid."""
    verdict = every_model.verdict(kind, kind)
    assert verdict.served is None and not verdict.untried and reason in verdict.reason


def test_the_page_has_every_model(every_model: ModuleType) -> None:
    """Written by the script for the transformers that is installed: no class is left out, none is in two lines."""
    page = (TESTS.parent / "docs" / "models.md").read_text(encoding="utf-8")
    found = re.search(rf"<!-- figures: {every_model.MARK} -->\n(.*?)\n<!-- /figures -->", page, re.DOTALL)
    assert found is not None
    listed = [name for line in found[1].splitlines() for name in line.rpartition(": ")[2].split(", ")]
    if f"of {every_model.transformers.__version__.rpartition('.')[0]} " not in page:
        pytest.skip("the page is of another version of transformers")
    classes = {name.removesuffix("ForCausalLM") for name in every_model.model_types().values()}
    assert sorted(listed) == sorted(set(listed)) and classes - {"Llama"} <= set(listed)
