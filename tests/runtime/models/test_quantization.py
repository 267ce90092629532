"""FP8 checkpoints as the tools that make them name and shape their tensors, and what is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from branchwise.kernels import fp8_linear as fp8
from branchwise.kernels.fp8_linear import Fp8Linear
from branchwise.kernels.quantize import Quantizer, dequantize_weight, quantize, quantize_weight
from branchwise.runtime.errors import LoadError
from branchwise.runtime.models.config import load_config
from branchwise.runtime.models.kv_scales import load_kv_scales
from branchwise.runtime.models.loader import dummy_weights, load_weights
from branchwise.runtime.models.quantization import ONLINE_FP8, Quantization, parse_quantization
from branchwise.runtime.models.weights import shard, weight_specs

from .conftest import Harness

CPU, E4M3 = torch.device("cpu"), torch.float8_e4m3fn
# As compressed-tensors writes it: with nulls for what does not apply.
FP8 = {"num_bits": 8, "type": "float", "symmetric": True, "actorder": None, "block_structure": None, "group_size": None}


def compressed(weights: dict[str, Any], inputs: dict[str, Any], **more: Any) -> dict[str, Any]:
    """A config.json's entry as llm-compressor writes it."""
    group = {
        "targets": ["Linear"],
        "weights": {**FP8, "dynamic": False, "observer": "minmax", **weights},
        "input_activations": {**FP8, "observer": None, **inputs},
        "output_activations": None,
    }
    config = {"quant_method": "compressed-tensors", "format": "float-quantized", "config_groups": {"group_0": group}}
    return {**config, "ignore": ["lm_head"], "kv_cache_scheme": None, "sparsity_config": {}, **more}


DYNAMIC = compressed({"strategy": "channel"}, {"strategy": "token", "dynamic": True})
STATIC = compressed({"strategy": "tensor"}, {"strategy": "tensor", "dynamic": False})
BLOCK = compressed(
    {"strategy": "block", "block_structure": [128, 128]}, {"strategy": "group", "group_size": 128, "dynamic": True}
)
QWEN = {
    "activation_scheme": "dynamic",
    "fmt": "e4m3",
    "quant_method": "fp8",
    "weight_block_size": [128, 128],
    "modules_to_not_convert": ["lm_head", "model.layers.1.mlp.down_proj", "model.layers.0.mlp.gate"],
}
AUTOFP8 = {"quant_method": "fp8", "activation_scheme": "static", "ignored_layers": ["lm_head"]}
MODELOPT = {"quant_algo": "FP8", "kv_cache_quant_algo": None, "exclude_modules": ["lm_head", "model.layers.1.mlp*"]}
FORMATS: dict[str, tuple[str, dict[str, Any]]] = {  # scales of tensor, channel or block; the declared config
    "compressed-tensors dynamic": ("channel", DYNAMIC),
    "compressed-tensors static": ("tensor", STATIC),
    "compressed-tensors block": ("block", BLOCK),
    "fp8 block": ("block", QWEN),
    "fp8 static": ("tensor", AUTOFP8),
    "modelopt in a file": ("tensor", MODELOPT),
    "modelopt": ("tensor", {"quant_method": "modelopt", "quant_algo": "FP8", "ignore": ["lm_head", "*.1.mlp*"]}),
}


@pytest.fixture(scope="session")
def plain(checkpoints: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose matrices are whole blocks of 128."""
    return in_whole_blocks("llama-mha", checkpoints, tmp_path_factory)


@pytest.fixture(scope="session")
def plain_experts(checkpoints: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A mixture of experts whose matrices are whole blocks of 128."""
    return in_whole_blocks("qwen3-moe", checkpoints, tmp_path_factory, moe_intermediate_size=128)


def in_whole_blocks(family: str, checkpoints: ModuleType, factory: pytest.TempPathFactory, **others: Any) -> Path:
    sizes = {"hidden_size": 256, "intermediate_size": 384, "head_dim": 64, "num_hidden_layers": 2, **others}
    folder = factory.mktemp("fp8") / family
    return Path(checkpoints.build(family, folder, **sizes, num_key_value_heads=2, tie_word_embeddings=False))


def quantized(plain: Path, folder: Path, form: str, declared: dict[str, Any], dtype: torch.dtype) -> tuple[Path, Path]:
    """``plain`` as a quantized checkpoint, and the plain checkpoint of its dequantized weights."""
    made, reference = (Path(shutil.copytree(plain, folder / name)) for name in ("quantized", "reference"))
    config = json.loads((plain / "config.json").read_text())
    if "exclude_modules" in declared:
        (made / "hf_quant_config.json").write_text(
            json.dumps({"producer": {"name": "modelopt"}, "quantization": declared})
        )
    else:
        (made / "config.json").write_text(json.dumps({**config, "quantization_config": declared}))
    quantization = load_config(made).quantization
    assert quantization is not None
    tensors, exact = load_file(plain / "model.safetensors"), {}
    for name, weight in list(tensors.items()):
        module = name.removesuffix(".weight")
        if not name.endswith("proj.weight") or not quantization.covers(module):
            exact[name] = weight
            continue
        values, scale, stored = quantize_as(form, weight, dtype)
        tensors |= {name: values, f"{module}.{quantization.scale}": stored}
        exact[name] = dequantize_weight(values, scale, torch.float32)
        if quantization.activations == "static":
            tensors[f"{module}.input_scale"] = torch.tensor(0.05)
    save_file(tensors, made / "model.safetensors")
    save_file(exact, reference / "model.safetensors")
    return made, reference


def quantize_as(form: str, weight: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Values, scales as `dequantize_weight` takes them, and scales as the checkpoint has them."""
    if form == "channel":
        scale = (weight.abs().amax(1, keepdim=True) / 448).to(dtype)
        return (weight / scale.float()).to(E4M3), scale.float(), scale
    if form == "tensor":
        scale = weight.abs().max() / 448
        return (weight / scale).to(E4M3), scale.expand(len(weight), 1), scale
    blocks = weight.unflatten(0, (-1, 128)).unflatten(-1, (-1, 128))
    scale = blocks.abs().amax((1, 3)) / 448
    return (blocks / scale[:, None, :, None]).flatten(2).flatten(0, 1).to(E4M3), scale, scale


class Rounded:
    """A layer in float32 whose input is quantized and dequantized: what a layer in FP8 computes."""

    quantizer = None

    def __init__(self, linear: Any, quantizer: Quantizer) -> None:
        self._linear, self._quantizer = linear, quantizer

    def __call__(self, x: torch.Tensor) -> Any:
        values, scales = quantize(x, self._quantizer)
        groups = values.float().unflatten(-1, (scales.shape[1], -1))
        return self._linear((groups * scales[..., None]).flatten(-2))


def logits(folder: Path, tokens: np.ndarray[Any, np.dtype[np.int64]]) -> torch.Tensor:
    return Harness(folder, 8).step([(0, tokens, 0)])[0]


@pytest.mark.parametrize("name", FORMATS)
def test_a_quantized_checkpoint_has_the_logits_of_its_dequantized_weights(
    name: str, plain: Path, tmp_path: Path, prompt: Any
) -> None:
    form, declared = FORMATS[name]
    made, reference = quantized(plain, tmp_path, form, declared, torch.bfloat16)
    torch.testing.assert_close(logits(made, prompt), logits(reference, prompt), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["compressed-tensors dynamic", "compressed-tensors static", "fp8 block"])
def test_quantized_experts_have_the_logits_of_their_dequantized_weights(
    name: str, plain_experts: Path, tmp_path: Path, prompt: Any
) -> None:
    test_a_quantized_checkpoint_has_the_logits_of_its_dequantized_weights(name, plain_experts, tmp_path, prompt)


@pytest.mark.parametrize("name", FORMATS)
def test_products_in_fp8_quantize_activations_as_the_checkpoint_says(
    name: str, plain: Path, tmp_path: Path, prompt: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    form, declared = FORMATS[name]
    made, reference = quantized(plain, tmp_path, form, declared, torch.float32)
    monkeypatch.setattr(fp8, "multiplies_fp8", lambda device: True)
    harness = Harness(made, 8)
    layer = harness.decoder._layers[0]
    assert isinstance(layer.qkv, Fp8Linear) and isinstance(layer.o, Fp8Linear)
    quantizer = layer.qkv.quantizer
    assert quantizer.group == (128 if form == "block" else 0)
    assert (quantizer.scale is not None) == ("static" in name or "modelopt" in name)
    assert isinstance(harness.decoder._layers[1].mlp._down, Fp8Linear) != ("modelopt" in name or name == "fp8 block")
    exact = Harness(reference, 8)
    for layer, plain_layer in zip(harness.decoder._layers, exact.decoder._layers, strict=True):
        for owner, names in ((lambda x: x, ("qkv", "o")), (lambda x: x.mlp, ("_gate_up", "_down"))):
            for attribute in names:
                linear = getattr(owner(layer), attribute)
                if isinstance(linear, Fp8Linear):
                    rounded = Rounded(getattr(owner(plain_layer), attribute), linear.quantizer)
                    setattr(owner(plain_layer), attribute, rounded)
    got, expected = (h.step([(0, prompt[:8], 0)])[0] for h in (harness, exact))
    assert float((got - expected).norm()) < 0.02 * float(expected.norm())  # a value between two codes may take either


@pytest.mark.parametrize("family", ["phi3", "cohere", "apertus", "qwen2", "llama-gqa"])
def test_channel_scales_follow_fused_and_reordered_rows(
    family: str, checkpoint: Callable[[str], Path], tmp_path: Path, prompt: Any
) -> None:
    made, reference = quantized(checkpoint(family), tmp_path, "channel", DYNAMIC, torch.float32)
    torch.testing.assert_close(logits(made, prompt), logits(reference, prompt), atol=1e-4, rtol=1e-4)


def test_weights_are_quantized_while_they_are_loaded(plain: Path) -> None:
    config = load_config(plain)
    weights = load_weights(plain, config, torch.bfloat16, CPU)
    object.__setattr__(config, "quantization", ONLINE_FP8)
    found, made = load_weights(plain, config, torch.bfloat16, CPU), dummy_weights(config, torch.bfloat16, CPU, 0)
    values, scale = quantize_weight(weights["layers.1.gate_up"], E4M3)
    assert torch.equal(found["layers.1.gate_up"].float(), values.float())
    assert torch.equal(found["layers.1.gate_up_scale"], scale) and found["lm_head"].dtype == torch.bfloat16
    assert {n: (w.dtype, w.shape) for n, w in found.items()} == {n: (w.dtype, w.shape) for n, w in made.items()}
    assert made["layers.0.o"].float().std() * made["layers.0.o_scale"][0] == pytest.approx(0.02, rel=0.05)


@pytest.mark.parametrize("name", ["compressed-tensors dynamic", "compressed-tensors block", "fp8 static"])
def test_ranks_have_the_scales_of_their_part(name: str, plain: Path, tmp_path: Path) -> None:
    form, declared = FORMATS[name]
    made, _ = quantized(plain, tmp_path, form, declared, torch.float32)
    config = load_config(made)
    if form == "block":
        with pytest.raises(LoadError, match=r"k_proj.weight_scale: a rank's part \[0, 64\) is not whole blocks of 128"):
            load_weights(made, config, torch.float32, CPU, rank=0, world=2)
        return
    ranks = [load_weights(made, config, torch.float32, CPU, rank=rank, world=2) for rank in range(2)]
    whole = load_weights(made, config, torch.float32, CPU)
    assert torch.equal(ranks[0]["layers.0.o_scale"], whole["layers.0.o_scale"])
    for spec in weight_specs(config):
        if spec.shard == "column" and spec.kind == "scale":
            rows = [[index[0].stop - index[0].start for index in shard(spec, rank, 2)] for rank in range(2)]
            parts = zip(*(ranks[rank][spec.name].split(rows[rank]) for rank in range(2)), strict=True)
            assert torch.equal(torch.cat([torch.cat(part) for part in parts]), whole[spec.name])


def test_dummy_weights_have_the_formats_of_the_checkpoint(plain: Path, tmp_path: Path) -> None:
    for name, (form, declared) in FORMATS.items():
        made, _ = quantized(plain, tmp_path / name, form, declared, torch.float32)
        config = load_config(made)
        loaded, dummy = load_weights(made, config, torch.bfloat16, CPU), dummy_weights(config, torch.bfloat16, CPU, 0)
        assert {n: (w.dtype, w.shape) for n, w in loaded.items()} == {n: (w.dtype, w.shape) for n, w in dummy.items()}


Change = Callable[[dict[str, torch.Tensor]], object]
MODULE = "model.layers.1.self_attn.v_proj"


@pytest.mark.parametrize(
    ("name", "change", "says"),
    [
        ("fp8 block", lambda t: t.pop(f"{MODULE}.weight_scale_inv"), f"no tensor {MODULE}.weight_scale_inv"),
        (
            "fp8 block",
            lambda t: t.update({f"{MODULE}.weight_scale_inv": torch.ones(1, 3)}),
            rf"{MODULE}.weight_scale_inv has shape \[1, 3\], its weight calls for \[1, 2\]",
        ),
        (
            "compressed-tensors dynamic",
            lambda t: t.update({f"{MODULE}.weight_scale": torch.ones(64, 1)}),
            rf"{MODULE}.weight_scale has shape \[64, 1\], its weight calls for \[128, 1\]",
        ),
        (
            "fp8 static",
            lambda t: t[f"{MODULE}.input_scale"].fill_(-1),
            f"{MODULE}.input_scale holds scales that are not",
        ),
        (
            "fp8 static",
            lambda t: t.update({f"{MODULE}.weight": torch.zeros(128, 256)}),
            f"{MODULE}.weight is F32, config.json says that it is quantized to F8_E4M3",
        ),
        (
            "modelopt",
            lambda t: t.update({"model.layers.1.mlp.up_proj.weight": torch.zeros(384, 256).to(E4M3)}),
            "up_proj.weight is F8_E4M3: config.json does not say how it is quantized",
        ),
        (
            "compressed-tensors static",
            lambda t: t[f"{MODULE}.weight"].view(torch.uint8)[3, 3].fill_(0xFF),
            f"{MODULE}.weight holds NaN",
        ),
        ("fp8 static", lambda t: t.update({f"{MODULE}.qzeros": torch.ones(1)}), f"{MODULE}.qzeros"),
        ("fp8 static", lambda t: t.update({"model.layers.1.self_attn.k_scale": torch.ones(1)}), "self_attn.k_scale"),
    ],
)
def test_broken_quantized_checkpoints_name_the_tensor(
    name: str, change: Change, says: str, plain: Path, tmp_path: Path
) -> None:
    made, _ = quantized(plain, tmp_path, *FORMATS[name], torch.float32)
    tensors = load_file(made / "model.safetensors")
    change(tensors)
    save_file(tensors, made / "model.safetensors")
    with pytest.raises(LoadError, match=says) as caught:
        load_weights(made, load_config(made), torch.float32, CPU)
    assert "\n" not in str(caught.value)


def test_a_product_of_quantized_and_plain_tensors_is_refused(plain: Path, tmp_path: Path) -> None:
    declared = {**DYNAMIC, "ignore": ["lm_head", "re:.*k_proj"]}
    with pytest.raises(LoadError, match=r"k_proj.weight.*only some of them are quantized"):
        made, _ = quantized(plain, tmp_path, "channel", declared, torch.float32)
        load_weights(made, load_config(made), torch.float32, CPU)


def test_blocks_that_do_not_fit_a_fused_weight(checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(checkpoint("mistral"), tmp_path / "made"))
    raw = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**raw, "quantization_config": QWEN}))
    with pytest.raises(LoadError, match=r"q_proj.weight: scales of 128 × 128 blocks do not fit its 64 rows"):
        load_weights(folder, load_config(folder), torch.float32, CPU)


@pytest.mark.parametrize(
    ("declared", "says"),
    [
        ({"quant_method": "awq", "bits": 4}, "quant_method 'awq'"),
        ({"quant_method": "gptq", "bits": 4, "desc_act": False}, "quant_method 'gptq'"),
        ({"quant_method": "bitsandbytes", "load_in_8bit": True}, "quant_method 'bitsandbytes'"),
        ({"bits": 4}, "quant_method None"),
        ({**DYNAMIC, "format": "pack-quantized"}, "format 'pack-quantized'"),
        ({**DYNAMIC, "sparsity_config": {"format": "sparse-24-bitmask"}}, "sparsity_config"),
        ({**DYNAMIC, "transform_config": {"config_groups": {"R1": {}}}}, "transform_config"),
        ({**DYNAMIC, "config_groups": {}}, "0 config_groups"),
        ({**DYNAMIC, "config_groups": {"a": {}, "b": {}}}, "2 config_groups"),
        (compressed({"num_bits": 4, "strategy": "group"}, {}), "weights of type 'float' with 4 bits"),
        (compressed({"type": "int", "strategy": "channel"}, {}), "weights of type 'int' with 8 bits"),
        (compressed({"strategy": "group"}, {}), "weights of strategy 'group'"),
        (compressed({"strategy": "block", "block_structure": [64, 64]}, {}), r"block_structure \[64, 64\]"),
        (
            compressed({"strategy": "channel"}, {"strategy": "tensor", "dynamic": True}),
            "channel weights and dynamic tensor input_act",
        ),
        ({**DYNAMIC, "kv_cache_scheme": {"num_bits": 4, "type": "int"}}, "kv_cache_scheme"),
        ({**QWEN, "weight_block_size": [64, 64]}, r"weight_block_size \[64, 64\]"),
        ({**QWEN, "activation_scheme": "static"}, r"weight_block_size \[128, 128\] and activation_scheme 'static'"),
        ({**QWEN, "fmt": "e5m2"}, "fmt 'e5m2'"),
        ({"quant_method": "modelopt", "quant_algo": "NVFP4"}, "quant_algo 'NVFP4'"),
        (
            {"quant_method": "modelopt", "quant_algo": "FP8", "kv_cache_quant_algo": "NVFP4"},
            "kv_cache_quant_algo 'NVFP4'",
        ),
    ],
)
def test_other_formats_are_refused_by_name_with_what_to_use(declared: dict[str, Any], says: str) -> None:
    with pytest.raises(
        LoadError, match=f"quantization_config: quantized checkpoints with {says}.*use the model's"
    ) as e:
        parse_quantization({"quantization_config": declared}, "config.json")
    assert "\n" not in str(e.value)


@pytest.mark.parametrize(
    "declared",
    [
        {**DYNAMIC, "ignore": "lm_head"},
        {**DYNAMIC, "ignore": ["re:("]},
        {**DYNAMIC, "config_groups": [1]},
        {**DYNAMIC, "config_groups": {"group_0": 1}},
        {**DYNAMIC, "sparsity_config": 1},
        {**AUTOFP8, "kv_cache_scheme": "fp8"},
    ],
)
def test_malformed_configs_say_where(declared: dict[str, Any]) -> None:
    with pytest.raises(LoadError, match=r"^config.json: quantization_config: "):
        parse_quantization({"quantization_config": declared}, "config.json")


@pytest.mark.parametrize(
    ("pattern", "covered"),
    [
        ("model.layers.0.mlp.gate", True),  # a router, not gate_proj
        ("model.layers.0.mlp.gate_proj", False),
        ("gate_proj", False),
        ("model.layers.0", False),
        ("model.layers.1", True),
        ("re:.*gate_proj", False),
        ("re:gate_proj", True),  # the expression must begin where the name does
        ("model.layers.0.*", False),
        ("*layers.1*", True),
        ("language_model.model.layers.0.mlp.gate_proj", False),
        ("model.language_model.layers.0", False),
        ("Linear", False),
    ],
)
def test_patterns_of_modules(pattern: str, covered: bool) -> None:
    quantization = Quantization("tensor", "static", "weight_scale", ignored=(pattern,))
    assert quantization.covers("model.layers.0.mlp.gate_proj") == covered


KV = {"kv_cache_scheme": {**FP8, "strategy": "tensor", "dynamic": False}}


@pytest.mark.parametrize(
    ("declared", "names", "shape"),
    [
        ({**DYNAMIC, **KV}, ("self_attn.k_scale", "self_attn.v_scale"), ()),
        ({**DYNAMIC, **KV}, ("self_attn.k_scale", "self_attn.v_scale"), (2, 1, 1)),
        ({**DYNAMIC, **KV}, ("self_attn.k_proj.output_scale", "self_attn.v_proj.output_scale"), (1,)),
        ({**AUTOFP8, **KV}, ("self_attn.kv_scale", "self_attn.kv_scale"), ()),
        ({**MODELOPT, "kv_cache_quant_algo": "FP8"}, ("self_attn.k_proj.k_scale", "self_attn.v_proj.v_scale"), (1,)),
    ],
)
def test_scales_of_keys_and_values(
    declared: dict[str, Any], names: tuple[str, str], shape: tuple[int, ...], plain: Path, tmp_path: Path
) -> None:
    form = "channel" if "config_groups" in declared else "tensor"
    made, _ = quantized(plain, tmp_path, form, declared, torch.float32)
    tensors = load_file(made / "model.safetensors")
    for i in range(2):
        for j, name in enumerate(names):
            value = torch.arange(1.0, 3.0) if len(shape) == 3 else torch.ones(1)
            tensors[f"model.layers.{i}.{name}"] = ((i + 1) * (j + 1) * value).reshape(shape).clone()
    save_file(tensors, made / "model.safetensors")
    config = load_config(made)
    load_weights(made, config, torch.float32, CPU)
    scales = load_kv_scales(made, config)
    both = 2 if names[0] == names[1] else 1  # the last one written
    per_head = [1.0, 2.0] if len(shape) == 3 else [1.0, 1.0]
    assert scales.keys() == {0, 1}
    assert scales[1].k.tolist() == [2 * both * x for x in per_head] and scales[1].v.tolist() == [
        4 * x for x in per_head
    ]
    ranks = [load_kv_scales(made, config, rank=rank, world=2)[0].v for rank in range(2)]
    assert torch.cat(ranks).tolist() == scales[0].v.tolist()
    tensors[f"model.layers.0.{names[0]}"] = torch.ones(3)
    save_file(tensors, made / "model.safetensors")
    with pytest.raises(LoadError, match=rf"{names[0]} has shape \[3\], expected one value or 2"):
        load_kv_scales(made, config)


def test_a_checkpoint_without_scales_of_keys_and_values_has_none(plain: Path) -> None:
    assert load_kv_scales(plain, load_config(plain)) == {}
