"""``--kv-cache-dtype`` in the executor: sizes, refusals, a checkpoint's scales, and equal answers warm and cold."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import get_args, get_type_hints

import pytest
import torch
from safetensors.torch import load_file, save_file

from branchwise import Engine, LoadError, SamplingParams
from branchwise.kernels.kv_format import CHOICES
from branchwise.runtime.config import EngineConfig
from branchwise.runtime.executor.executor import ModelExecutor
from branchwise.runtime.models.folder import SHIPPED

QUANTIZED = [choice for choice in CHOICES if choice != "auto"]
STEM = "Mira is the baker of Fernhollow, and Tobin keeps the mill by the river. " * 6


def test_the_settings_and_the_table_of_formats_have_the_same_names() -> None:
    assert set(get_args(get_type_hints(EngineConfig)["kv_cache_dtype"])) == set(CHOICES)


@pytest.mark.parametrize("choice", QUANTIZED)
def test_a_reused_prefix_answers_as_a_computed_one(choice: str) -> None:
    """Prefixes that end inside a page, chunks of a few tokens, samples that branch: the same tokens as from a cold
    cache that computes each prompt at once."""
    prompts = [STEM + f"Question {i}: who keeps the mill?" for i in range(4)]
    params = SamplingParams(temperature=0.8, max_tokens=12, seed=7, n=2)

    def tokens(engine: Engine) -> list[list[int]]:
        return [list(sample.token_ids) for out in engine.generate(prompts, params) for sample in out.outputs]

    settings = {"device": "cpu", "dtype": "float32", "kv_cache_dtype": choice, "kv_cache_tokens": 8192}
    with Engine(**settings, disable_radix_cache=True) as engine:
        cold = tokens(engine)
    with Engine(**settings, max_num_batched_tokens=96, page_size=32) as engine:
        assert tokens(engine) == cold
        assert tokens(engine) == cold, "warm"
        plan = ModelExecutor.load(EngineConfig(**settings)).memory_plan  # type: ignore[arg-type]
        assert engine.stats().kv_token_bytes == plan.layout.token_bytes


@pytest.mark.parametrize("choice", ["fp8", "int4"])
def test_the_pool_holds_more_tokens(choice: str) -> None:
    plain, quantized = (
        ModelExecutor.load(EngineConfig(device="cpu", dtype="float32", kv_cache_dtype=each, kv_cache_tokens=64))
        for each in ("auto", choice)
    )
    sizes = [executor.memory_plan.layout.token_bytes for executor in (plain, quantized)]
    assert sizes[0] / sizes[1] > {"fp8": 3.7, "int4": 7}[choice], "of float32"
    assert choice in "\n".join(quantized.memory_plan.lines())
    for executor in (plain, quantized):
        executor.close()


def test_a_checkpoints_scales_are_used(tmp_path: Path) -> None:
    shutil.copytree(SHIPPED, tmp_path / "model")
    folder = tmp_path / "model"
    config = json.loads((folder / "config.json").read_text())
    scheme = {"num_bits": 8, "type": "float", "strategy": "tensor", "dynamic": False, "symmetric": True}
    config["quantization_config"] = {
        "quant_method": "compressed-tensors",
        "format": "float-quantized",
        "config_groups": {},
        "kv_cache_scheme": scheme,
    }
    (folder / "config.json").write_text(json.dumps(config))
    tensors = load_file(folder / "model.safetensors")
    for i in range(config["num_hidden_layers"]):
        tensors[f"model.layers.{i}.self_attn.k_scale"] = torch.tensor(0.25 * (i + 1))
        tensors[f"model.layers.{i}.self_attn.v_scale"] = torch.tensor(0.5)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    settings = EngineConfig(model=str(folder), device="cpu", kv_cache_dtype="fp8", kv_cache_tokens=64)
    executor = ModelExecutor.load(settings)
    found = executor._pool.layer(2).static_scales
    assert found is not None and found.tolist() == [[0.75, 0.75], [0.5, 0.5]]
    executor.close()


def test_a_format_that_the_heads_cannot_have_is_refused(tmp_path: Path) -> None:
    shutil.copytree(SHIPPED, tmp_path / "model")
    path = tmp_path / "model" / "config.json"
    config = json.loads(path.read_text()) | {"head_dim": 40}
    path.write_text(json.dumps(config))
    with pytest.raises(LoadError, match=r"--kv-cache-dtype int4: heads of 40 channels .* use fp8"):
        Engine(str(path.parent), load_format="dummy", device="cpu", kv_cache_dtype="int4")
    with pytest.raises(LoadError, match=r"--kv-cache-dtype: must be one of auto, .*'fp7'"):
        Engine(device="cpu", kv_cache_dtype="fp7")
