"""Every family against transformers: whole prompts, chunks, cached prefixes, decodes, at both page sizes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from branchwise.runtime.models.registry import ARCHITECTURES, listing

TOLERANCE = 1e-4
Make = Callable[[str, int], Any]
Reference = Callable[[str], torch.Tensor]


def test_every_architecture_has_a_recipe(checkpoints: Any) -> None:
    """But for the wrappers whose text model has one of its own; test_loader.py has their layouts."""
    made = {family.model for family in checkpoints.FAMILIES.values()}
    assert set(ARCHITECTURES) - made == {"Gemma3ForConditionalGeneration", "Mistral3ForConditionalGeneration"}


def test_the_documentation_lists_every_architecture() -> None:
    """With `branchwise models`, whose output it is."""
    assert listing() in (Path(__file__).parents[3] / "docs" / "models.md").read_text(encoding="utf-8")


def close(got: torch.Tensor, expected: torch.Tensor) -> None:
    assert got.shape == expected.shape
    assert (got - expected).abs().max() < TOLERANCE


@pytest.mark.parametrize("page_size", [1, 16])
class TestFamily:
    def test_whole_prompt(
        self, family: str, page_size: int, harness: Make, reference: Reference, prompt: np.ndarray
    ) -> None:
        expected = reference(family)
        assert expected.std() > 0.3  # logits that say nothing would agree with anything
        for length in (1, page_size - 1, page_size, page_size + 1, 2 * page_size, 33, 120):
            if length > 0:
                (got,) = harness(family, page_size).step([(2, prompt[:length], 0)])
                close(got, expected[:length])

    def test_chunked_prefill_equals_whole(
        self, family: str, page_size: int, harness: Make, reference: Reference, prompt: np.ndarray
    ) -> None:
        model, parts, at = harness(family, page_size), [], 0
        for size in (15, 1, 17, 16, 2, 40, 29):
            parts += model.step([(1, prompt[at : at + size], at)])
            at += size
        close(torch.cat(parts), reference(family))

    def test_decodes_equal_prefill(
        self, family: str, page_size: int, harness: Make, reference: Reference, prompt: np.ndarray
    ) -> None:
        model, expected = harness(family, page_size), reference(family)
        lengths = [15, 16, 17, 90]  # of four requests that then decode side by side
        model.step([(row, prompt[:length], 0) for row, length in enumerate(lengths)])
        for turn in range(20):
            ats = [length + turn for length in lengths]
            got = model.step([(row, prompt[at : at + 1], at) for row, at in enumerate(ats)], num_decodes=4)
            close(torch.cat(got), expected[ats])

    def test_extension_of_a_cached_prefix(
        self, family: str, page_size: int, harness: Make, reference: Reference, prompt: np.ndarray
    ) -> None:
        model, expected = harness(family, page_size), reference(family)
        model.step([(0, prompt[:64], 0)])
        model.table[1:4, : 64 // page_size] = model.table[0, : 64 // page_size]  # three more share its pages
        chunks = [(row, prompt[64 : 64 + n], 64) for row, n in ((1, 1), (2, 17), (3, 17), (0, 56))]
        for got in model.step(chunks):
            close(got, expected[64 : 64 + len(got)])

    def test_prefix_written_in_the_same_step(
        self, family: str, page_size: int, harness: Make, reference: Reference, prompt: np.ndarray
    ) -> None:
        """Publish when scheduled: one request computes the prefix, another reads its pages in that very step."""
        model, expected = harness(family, page_size), reference(family)
        model.step([(5, prompt[:30], 0)])
        model.table[4, : 48 // page_size] = model.table[3, : 48 // page_size]
        chunks = [(5, prompt[30:31], 30), (3, prompt[:48], 0), (4, prompt[48:70], 48)]
        decode, producer, reader = model.step(chunks, num_decodes=1)
        close(decode, expected[30:31])
        close(producer, expected[:48])
        close(reader, expected[48:70])


def test_last_layer_runs_for_wanted_tokens_alone(harness: Make, reference: Reference, prompt: np.ndarray) -> None:

    model = harness("gemma2", 16)
    wanted = torch.tensor([39, 3])
    close(model.step([(0, prompt[:40], 0)], outputs=wanted)[0], reference("gemma2")[wanted])
