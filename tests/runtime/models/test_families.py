"""Every family against transformers: whole prompts, chunks, cached prefixes, decodes, at both page sizes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from branchwise.kernels import native_ops
from branchwise.kernels.kv_format import PLAIN
from branchwise.runtime.models.registry import ARCHITECTURES, listing

TOLERANCE = 1e-4
Make = Callable[..., Any]
Reference = Callable[[str], torch.Tensor]


def test_every_architecture_has_a_recipe(checkpoints: Any) -> None:
    """But for multimodal models: test_loader.py has the layouts of those whose text model has a recipe."""
    made = {family.model for family in checkpoints.FAMILIES.values()} | set(VISION)
    assert set(ARCHITECTURES) - made == {"Gemma3ForConditionalGeneration", "Mistral3ForConditionalGeneration"}


_EYES = {"depth": 1, "hidden_size": 32, "num_heads": 2, "intermediate_size": 32, "patch_size": 4}
_MROPE = {"rope_type": "default", "mrope_section": [4, 2, 2], "rope_theta": 1000.0}
VISION: dict[str, dict[str, Any]] = {
    "Qwen2VLForConditionalGeneration": {"depth": 1, "embed_dim": 32, "num_heads": 2, "hidden_size": 64},
    "Qwen2_5_VLForConditionalGeneration": _EYES | {"out_hidden_size": 64},
    "Qwen3VLForConditionalGeneration": _EYES | {"out_hidden_size": 64, "deepstack_visual_indexes": [0]},
    "Qwen3VLMoeForConditionalGeneration": _EYES | {"out_hidden_size": 64, "deepstack_visual_indexes": [0]},
}


@pytest.mark.parametrize("name", VISION)
def test_the_text_of_a_vision_model(
    name: str, checkpoints: Any, harness_of: Callable[[Path], Any], prompt: np.ndarray, tmp_path: Path
) -> None:
    """Its rotary embedding has three positions, which text has alike."""
    import transformers

    model_class = getattr(transformers, name)
    text = {"vocab_size": checkpoints.write_tokenizer(tmp_path), "hidden_size": 64, "intermediate_size": 112}
    text |= {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
    text |= {"num_experts": 6, "num_experts_per_tok": 3, "moe_intermediate_size": 48, "rope_parameters": _MROPE}
    torch.manual_seed(0)
    model = model_class(model_class.config_class(text_config=text, vision_config=VISION[name])).eval()
    checkpoints.sharpen(model, 0)
    experts = [tensor for name, tensor in model.named_parameters() if ".experts." in name]
    with torch.no_grad():
        for tensor in experts:  # the published layout
            tensor.data = tensor.mT.contiguous()
        model.save_pretrained(tmp_path)
        for tensor in experts:
            tensor.data = tensor.mT.contiguous()
        expected = model(input_ids=torch.from_numpy(prompt)[None]).logits[0]
    assert expected.std() > 0.1
    (got,) = harness_of(tmp_path).step([(1, prompt, 0)])
    close(got, expected)


def test_the_documentation_lists_every_architecture() -> None:
    """With `branchwise models`, whose output it is."""
    assert listing() in (Path(__file__).parents[3] / "docs" / "models.md").read_text(encoding="utf-8")


def close(got: torch.Tensor, expected: torch.Tensor) -> None:
    assert got.shape == expected.shape
    assert (got - expected).abs().max() < TOLERANCE


def within_rounding(got: torch.Tensor, expected: torch.Tensor, exact: Callable[[], torch.Tensor]) -> None:
    """As `close`, but for tokens that rounding changes more: those where transformers itself is off ``exact``, which is
    in float64. OLMo 2 divides by the norm of small vectors: one token here is 5e-5 off in transformers."""
    assert got.shape == expected.shape
    off = (got - expected).abs().amax(-1)
    if off.max() >= TOLERANCE:
        assert (off < TOLERANCE + 4 * (expected - exact()).abs().amax(-1)).all()


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

    def test_rotated_keys_change_nothing(
        self, family: str, page_size: int, harness: Make, reference: Reference, prompt: np.ndarray
    ) -> None:
        """What some storage formats do before they quantize, here without quantizing."""
        model, rotated = harness(family, page_size), replace(PLAIN, rotates_keys=True)
        model.pool._layers = [replace(layer, k_format=rotated) for layer in model.pool._layers]
        (got,) = model.step([(1, prompt, 0)])
        assert (got - reference(family)).abs().max() < 10 * TOLERANCE  # what is rounded differs

    def test_decodes_equal_prefill(
        self, family: str, page_size: int, harness: Make, reference: Reference, exact: Reference, prompt: np.ndarray
    ) -> None:
        model, expected = harness(family, page_size), reference(family)
        lengths = [15, 16, 17, 90]  # of four requests that then decode side by side
        model.step([(row, prompt[:length], 0) for row, length in enumerate(lengths)])
        for turn in range(20):
            ats = [length + turn for length in lengths]
            got = model.step([(row, prompt[at : at + 1], at) for row, at in enumerate(ats)], num_decodes=4)
            within_rounding(torch.cat(got), expected[ats], lambda ats=ats: exact(family)[ats])  # type: ignore[misc]

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


@pytest.mark.parametrize("name", ["qwen3", "llama-gqa", "gemma2", "mistral", "gpt-oss"])
def test_compiled_kernels_decode_as_transformers(
    name: str, compiled_kernels: object, harness: Make, reference: Reference, prompt: np.ndarray
) -> None:
    """Norms of heads, biases, soft-caps, windows and sinks; with decodes beside a chunk."""
    model, expected = harness(name, 16, ops=native_ops), reference(name)
    lengths = [15, 16, 60]
    model.step([(row, prompt[:length], 0) for row, length in enumerate(lengths)])
    for turn in range(5):
        ats = [length + turn for length in lengths]
        chunks = [(row, prompt[at : at + 1], at) for row, at in enumerate(ats)]
        *got, chunk = model.step([*chunks, (3, prompt[turn * 9 : turn * 9 + 9], turn * 9)], num_decodes=3)
        close(torch.cat(got), expected[ats])
        close(chunk, expected[turn * 9 : turn * 9 + 9])


def test_last_layer_runs_for_wanted_tokens_alone(harness: Make, reference: Reference, prompt: np.ndarray) -> None:

    model = harness("gemma2", 16)
    wanted = torch.tensor([39, 3])
    close(model.step([(0, prompt[:40], 0)], outputs=wanted)[0], reference("gemma2")[wanted])
