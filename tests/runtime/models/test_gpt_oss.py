"""GPT-OSS: experts in MXFP4 as OpenAI publishes them, and settings that are refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from branchwise import Engine, SamplingParams
from branchwise.runtime.errors import LoadError
from branchwise.runtime.models.config import load_config, parse_config
from branchwise.runtime.models.loader import load_weights
from branchwise.runtime.models.weights import shard_shape, weight_specs

EXPERTS = ("gate_up_proj", "down_proj")
CPU = torch.device("cpu")


def pack(folder: Path) -> None:
    """Replaces the experts of a checkpoint by random ones in MXFP4."""
    generator, path = torch.Generator().manual_seed(3), folder / "model.safetensors"
    tensors = load_file(path)
    for name in [name for name in tensors if name.endswith(EXPERTS)]:
        experts, inputs, outputs = tensors.pop(name).shape
        blocks = torch.randint(256, (experts, outputs, inputs // 32, 16), generator=generator)
        scales = torch.randint(120, 126, (experts, outputs, inputs // 32), generator=generator)
        tensors[f"{name}_blocks"], tensors[f"{name}_scales"] = blocks.to(torch.uint8), scales.to(torch.uint8)
    save_file(tensors, path, metadata={"format": "pt"})
    raw = json.loads((folder / "config.json").read_text())
    ignored = ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"]
    raw["quantization_config"] = {"quant_method": "mxfp4", "modules_to_not_convert": ignored}
    (folder / "config.json").write_text(json.dumps(raw))


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory, checkpoints: Any) -> Path:
    folder = tmp_path_factory.mktemp("gpt-oss-mxfp4")
    checkpoints.build("gpt-oss", folder, intermediate_size=96)
    pack(folder)
    return folder


@pytest.fixture(scope="module")
def reference(packed: Path) -> Any:
    """transformers' model in float32, with the experts that transformers dequantizes."""
    import transformers
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    config = transformers.AutoConfig.from_pretrained(packed)
    del config.quantization_config
    config._attn_implementation = "eager"
    tensors = load_file(packed / "model.safetensors")
    for name in [name.removesuffix("_blocks") for name in tensors if name.endswith("_blocks")]:
        parts = (tensors.pop(f"{name}_{part}") for part in ("blocks", "scales"))
        tensors[name] = convert_moe_packed_tensors(*parts, dtype=torch.float32)
    model = transformers.GptOssForCausalLM(config).eval()
    model.load_state_dict(tensors)
    return model


def test_logits_of_experts_in_mxfp4(packed: Path, reference: Any, prompt: np.ndarray) -> None:
    from .conftest import Harness

    with torch.no_grad():
        expected = reference(torch.from_numpy(prompt)[None]).logits[0]
    assert expected.std() > 0.3
    (got,) = Harness(packed, 16).step([(2, prompt, 0)])
    assert (got - expected).abs().max() < 1e-4


def test_greedy_tokens_of_experts_in_mxfp4(packed: Path, reference: Any, prompt: np.ndarray) -> None:
    with torch.no_grad():
        ids = torch.from_numpy(prompt[:40])[None]
        expected = reference.generate(ids, max_new_tokens=64, min_new_tokens=64, do_sample=False)[0, 40:].tolist()
    params = SamplingParams(temperature=0, max_tokens=64, ignore_eos=True)
    with Engine(str(packed), max_model_len=256) as engine:
        for _ in ("cold", "warm"):
            assert engine.generate([prompt[:40].tolist()], params)[0].token_ids == expected


@pytest.mark.parametrize("world", [2, 3, 4])
def test_ranks_have_whole_blocks_and_all_of_them(packed: Path, world: int) -> None:
    config = load_config(packed)
    specs = {spec.name: spec for spec in weight_specs(config)}
    for part in ("layers.0.experts.gate_up", "layers.0.experts.down"):
        shapes = [[shard_shape(specs[part + end], rank, world) for rank in range(world)] for end in ("", "_scale")]
        dim = 0 if part.endswith("gate_up") else 1
        assert sum(shape[dim] for shape in shapes[0]) >= specs[part].shape[dim]
        assert all(values[1] == 16 * scales[1] for values, scales in zip(*shapes, strict=True))


def test_damaged_scales_are_refused(packed: Path, tmp_path: Path) -> None:
    for file in packed.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["model.layers.1.mlp.experts.down_proj_scales"][2, 3, 1] = 255
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(LoadError, match=r"layers\.1\.mlp\.experts\.down_proj_scales holds scales that are NaN"):
        load_weights(tmp_path, load_config(tmp_path), torch.float32, CPU)


def test_mxfp4_without_experts_is_refused(checkpoint: Callable[[str], Path]) -> None:
    raw = json.loads((checkpoint("llama-gqa") / "config.json").read_text())
    with pytest.raises(LoadError, match="MXFP4 is supported for experts alone, and LlamaForCausalLM has none"):
        parse_config({**raw, "quantization_config": {"quant_method": "mxfp4"}}, {})


def test_another_activation_is_refused(checkpoint: Callable[[str], Path]) -> None:
    raw = json.loads((checkpoint("gpt-oss") / "config.json").read_text())
    with pytest.raises(LoadError, match=r"swiglu_limit 5\.0 is not supported; supported: 7\.0"):
        parse_config({**raw, "swiglu_limit": 5.0}, {})
