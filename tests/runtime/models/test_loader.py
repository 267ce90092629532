"""Weights from safetensors, and every way a checkpoint can be broken."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from branchwise.runtime.errors import LoadError
from branchwise.runtime.models.config import load_config
from branchwise.runtime.models.loader import dummy_weights, load_weights
from branchwise.runtime.models.weights import weight_specs

CPU = torch.device("cpu")


@pytest.fixture
def folder(checkpoint: Callable[[str], Path], tmp_path: Path) -> Callable[[str], Path]:
    """A copy of a checkpoint to break."""
    return lambda family: Path(shutil.copytree(checkpoint(family), tmp_path / family))


def load(folder: Path) -> dict[str, torch.Tensor]:
    return load_weights(folder, load_config(folder), torch.float32, CPU)


def edit(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> Path:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")
    return folder


def test_fused_weights_are_the_checkpoints_rows(checkpoint: Callable[[str], Path]) -> None:
    raw = load_file(checkpoint("llama-gqa") / "model.safetensors")
    weights = load(checkpoint("llama-gqa"))
    attention, mlp = "model.layers.1.self_attn.", "model.layers.1.mlp."
    assert torch.equal(weights["layers.1.qkv"], torch.cat([raw[f"{attention}{x}_proj.weight"] for x in "qkv"]))
    assert torch.equal(weights["layers.1.qkv_bias"], torch.cat([raw[f"{attention}{x}_proj.bias"] for x in "qkv"]))
    gate_up = [raw[f"{mlp}{x}_proj.weight"] for x in ("gate", "up")]
    assert torch.equal(weights["layers.1.gate_up"], torch.cat(gate_up))
    assert "lm_head" not in weights  # tied


def test_gemma_norms_hold_their_offset_in_float32(checkpoint: Callable[[str], Path]) -> None:
    folder = checkpoint("gemma2")
    raw = load_file(folder / "model.safetensors")
    weights = load_weights(folder, load_config(folder), torch.bfloat16, CPU)
    assert torch.equal(weights["norm"], raw["model.norm.weight"] + 1)
    assert weights["layers.0.qkv"].dtype == torch.bfloat16


@pytest.mark.parametrize(
    "rename",
    [
        lambda name: name.replace("model.", "model.language_model.", 1),  # transformers 5
        lambda name: "language_model." + name,  # transformers 4
    ],
)
def test_gemma3_inside_a_multimodal_checkpoint(rename: Callable[[str], str], folder: Callable[[str], Path]) -> None:
    path = folder("gemma3")
    plain = load(path)
    tensors = load_file(path / "model.safetensors")
    save_file({rename(name): tensor for name, tensor in tensors.items()}, path / "model.safetensors")
    config = json.loads((path / "config.json").read_text())
    nested = {"architectures": ["Gemma3ForConditionalGeneration"], "text_config": config}
    (path / "config.json").write_text(json.dumps(nested))
    assert all(torch.equal(weight, plain[name]) for name, weight in load(path).items())


def test_missing_tensor(folder: Callable[[str], Path]) -> None:
    path = edit(folder("qwen3"), lambda tensors: tensors.pop("model.layers.2.mlp.up_proj.weight"))
    with pytest.raises(LoadError, match=r"no tensor model\.layers\.2\.mlp\.up_proj\.weight"):
        load(path)


def test_checkpoint_of_something_else(folder: Callable[[str], Path]) -> None:
    path = edit(folder("qwen3"), lambda tensors: [tensors.pop(name) for name in list(tensors) if "embed" in name])
    with pytest.raises(LoadError, match=r"no tensor model\.embed_tokens\.weight"):
        load(path)


def test_misshaped_tensor(folder: Callable[[str], Path]) -> None:
    name = "model.layers.0.self_attn.k_proj.weight"
    path = edit(folder("mistral"), lambda tensors: tensors.update({name: torch.zeros(31, 64)}))
    with pytest.raises(LoadError, match=r"k_proj\.weight has shape \[31, 64\], config.json calls for \[32, 64\]"):
        load(path)


def test_quantized_tensor(folder: Callable[[str], Path]) -> None:
    name = "model.layers.0.mlp.down_proj.weight"
    path = edit(folder("mistral"), lambda tensors: tensors.update({name: tensors[name].to(torch.int8)}))
    with pytest.raises(LoadError, match="quantized"):
        load(path)


@pytest.mark.parametrize("keep", [0, 4, 100, -1])
def test_truncated_file(keep: int, folder: Callable[[str], Path]) -> None:
    path = folder("llama-mha") / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(LoadError, match="truncated or corrupt") as caught:
        load(path.parent)
    assert "\n" not in str(caught.value)


def test_header_that_lies(folder: Callable[[str], Path]) -> None:
    path = folder("llama-mha") / "model.safetensors"
    data = path.read_bytes()
    path.write_bytes((2**40).to_bytes(8, "little") + data[8:])
    with pytest.raises(LoadError, match="truncated or corrupt"):
        load(path.parent)


def test_no_weights_at_all(folder: Callable[[str], Path]) -> None:
    path = folder("llama-mha")
    (path / "model.safetensors").unlink()
    with pytest.raises(LoadError, match=r"neither model\.safetensors nor"):
        load(path)


def test_missing_shard(folder: Callable[[str], Path]) -> None:
    path = folder("llama-sharded")
    shards = sorted(path.glob("model-*.safetensors"))
    assert len(shards) > 2
    shards[1].unlink()
    with pytest.raises(LoadError, match=f"{shards[1].name} is missing"):
        load(path)


@pytest.mark.parametrize(
    ("index", "says"),
    [
        ("{", "is not a safetensors index"),
        ('{"weight_map": []}', "is not a safetensors index"),
        ('{"weight_map": {"a": 3}}', "is not the name of a file"),
        ('{"weight_map": {"a": "../../etc/passwd"}}', "is not the name of a file"),
    ],
)
def test_index_that_is_none(index: str, says: str, folder: Callable[[str], Path]) -> None:
    path = folder("llama-sharded")
    (path / "model.safetensors.index.json").write_text(index)
    with pytest.raises(LoadError, match=says):
        load(path)


def test_dummy_weights_have_the_checkpoints_shapes(checkpoint: Callable[[str], Path]) -> None:
    folder = checkpoint("gemma3")
    config = load_config(folder)
    made = dummy_weights(config, torch.float32, CPU, seed=3)
    assert {name: weight.shape for name, weight in made.items()} == {
        name: weight.shape for name, weight in load(folder).items()
    }
    assert [spec.name for spec in weight_specs(config)] == list(made)
    again, other = (dummy_weights(config, torch.float32, CPU, seed) for seed in (3, 4))
    assert torch.equal(made["layers.0.qkv"], again["layers.0.qkv"])
    assert not torch.equal(made["layers.0.qkv"], other["layers.0.qkv"])
