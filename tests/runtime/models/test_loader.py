"""Weights from safetensors, and every way a checkpoint can be broken."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from branchwise.kernels.file_weight import FileWeight
from branchwise.runtime.errors import LoadError
from branchwise.runtime.models.checkpoint import Checkpoint
from branchwise.runtime.models.config import load_config
from branchwise.runtime.models.folder import HUB_IGNORED, HUB_PATTERNS, WEIGHT_FILES, model_folder
from branchwise.runtime.models.loader import dummy_weights, load_weights
from branchwise.runtime.models.weights import even_range, rank_config, shard, weight_specs

CPU = torch.device("cpu")


@pytest.fixture
def folder(checkpoint: Callable[[str], Path], tmp_path: Path) -> Callable[[str], Path]:
    """A copy of a checkpoint to break."""
    return lambda family: Path(shutil.copytree(checkpoint(family), tmp_path / family))


def load(folder: Path) -> dict[str, torch.Tensor]:
    return load_weights(folder, load_config(folder), torch.float32, CPU)


def load_in_files(folder: Path) -> dict[str, torch.Tensor]:
    """The same, with matrices left in the files."""
    in_files: dict[str, FileWeight] = {}
    weights = load_weights(folder, load_config(folder), torch.float32, CPU, in_files=in_files)
    assert "embedding" in in_files
    return weights | {name: weight.view() for name, weight in in_files.items()}


def edit(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> Path:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")
    return folder


def rename_tensors(folder: Path, rename: Callable[[str], str]) -> None:
    tensors = load_file(folder / "model.safetensors")
    save_file({rename(name): tensor for name, tensor in tensors.items()}, folder / "model.safetensors")


def test_fused_weights_are_the_checkpoints_rows(checkpoint: Callable[[str], Path]) -> None:
    raw = load_file(checkpoint("llama-gqa") / "model.safetensors")
    weights = load(checkpoint("llama-gqa"))
    attention, mlp = "model.layers.1.self_attn.", "model.layers.1.mlp."
    assert torch.equal(weights["layers.1.qkv"], torch.cat([raw[f"{attention}{x}_proj.weight"] for x in "qkv"]))
    assert torch.equal(weights["layers.1.qkv_bias"], torch.cat([raw[f"{attention}{x}_proj.bias"] for x in "qkv"]))
    gate_up = [raw[f"{mlp}{x}_proj.weight"] for x in ("gate", "up")]
    assert torch.equal(weights["layers.1.gate_up"], torch.cat(gate_up))
    assert "lm_head" not in weights  # tied


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_float32_on_a_cpu_keeps_a_narrower_checkpoint_until_it_is_laid_out(
    dtype: torch.dtype, folder: Callable[[str], Path]
) -> None:
    narrow = edit(folder("llama-gqa"), lambda tensors: tensors.update({k: v.to(dtype) for k, v in tensors.items()}))
    weights = load(narrow)
    kept = {name for name, weight in weights.items() if weight.dtype == dtype}
    matrices = {name for name in weights if name == "embedding" or name.endswith((".qkv", ".o", ".gate_up", ".down"))}
    assert kept == matrices
    assert all(weight.dtype == torch.float32 for name, weight in weights.items() if name not in kept)
    wide = load(edit(narrow, lambda tensors: tensors.update({k: v.float() for k, v in tensors.items()})))
    assert all(torch.equal(weights[name].float(), wide[name]) for name in wide)


def test_gemma_norms_hold_their_offset_in_float32(checkpoint: Callable[[str], Path]) -> None:
    folder = checkpoint("gemma2")
    raw = load_file(folder / "model.safetensors")
    weights = load_weights(folder, load_config(folder), torch.bfloat16, CPU)
    assert torch.equal(weights["norm"], raw["model.norm.weight"] + 1)
    assert weights["layers.0.qkv"].dtype == torch.bfloat16


NESTED: list[Callable[[str], str]] = [
    lambda name: name.replace("model.", "model.language_model.", 1),  # transformers 5
    lambda name: "language_model." + name,  # transformers 4
]


def nest(path: Path, rename: Callable[[str], str]) -> None:
    """Makes the checkpoint the language model of a multimodal one."""
    rename_tensors(path, rename)
    config = json.loads((path / "config.json").read_text())
    nested = {"architectures": ["Gemma3ForConditionalGeneration"], "text_config": config}
    (path / "config.json").write_text(json.dumps(nested))


@pytest.mark.parametrize("rename", NESTED)
def test_gemma3_inside_a_multimodal_checkpoint(rename: Callable[[str], str], folder: Callable[[str], Path]) -> None:
    path = folder("gemma3")
    plain = load(path)
    nest(path, rename)
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


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.int8, torch.uint8])
def test_weights_that_are_no_plain_floats_are_refused(dtype: torch.dtype, folder: Callable[[str], Path]) -> None:
    name = "model.layers.0.mlp.down_proj.weight"
    path = edit(folder("mistral"), lambda tensors: tensors.update({name: tensors[name].to(dtype)}))
    with pytest.raises(LoadError, match=r"tensor .*down_proj\.weight is .*quantized"):
        load(path)


@pytest.mark.parametrize(
    "name",
    [
        "mlp.down_proj.weight_scale",
        "mlp.down_proj.weight_scale_inv",
        "mlp.down_proj.weight_scale_2",
        "mlp.down_proj.input_scale",
        "mlp.down_proj.scales",
        "mlp.down_proj.biases",
        "mlp.down_proj.qweight",
        "mlp.down_proj.qzeros",
        "mlp.down_proj.g_idx",
        "mlp.down_proj.weight_packed",
        "mlp.down_proj.weight.absmax",
        "mlp.down_proj.weight.quant_state.bitsandbytes__nf4",
        "self_attn.k_scale",
    ],
)
def test_scales_that_nobody_reads_are_refused(name: str, folder: Callable[[str], Path]) -> None:
    path = edit(folder("mistral"), lambda tensors: tensors.update({f"model.layers.0.{name}": torch.ones(1)}))
    with pytest.raises(LoadError, match="quantized checkpoint") as caught:
        load(path)
    assert name in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["vision_tower.logit_scale", "model.layers.0.self_attn.rotary_emb.inv_freq"])
def test_tensors_that_say_nothing_of_quantization_are_ignored(name: str, folder: Callable[[str], Path]) -> None:
    load(edit(folder("mistral"), lambda tensors: tensors.update({name: torch.ones(1)})))


@pytest.mark.parametrize(
    ("name", "warns"),
    [
        ("model.layers.0.self_attn.q_norm.weight", True),
        ("model.layers.2.mlp.up_proj.bias", True),
        ("model.layers.3.eh_proj.weight", False),  # beyond the last layer: multi-token prediction
        ("model.layers.0.self_attn.rotary_emb.inv_freq", False),
        ("vision_tower.layers.0.weight", False),
    ],
)
def test_weights_of_a_layer_that_are_not_used_are_warned_of(
    name: str, warns: bool, folder: Callable[[str], Path], caplog: pytest.LogCaptureFixture
) -> None:
    load(edit(folder("mistral"), lambda tensors: tensors.update({name: torch.ones(1)})))
    assert (f"1 tensors of the checkpoint's layers are not used, such as {name}" in caplog.text) == warns


def test_other_tensors_that_are_not_used_are_named_by_group(
    folder: Callable[[str], Path], caplog: pytest.LogCaptureFixture
) -> None:
    extra = {f"vision_tower.layers.{i}.weight": torch.ones(1) for i in range(3)}
    load(edit(folder("mistral"), lambda tensors: tensors.update({**extra, "lm_head.bias": torch.ones(1)})))
    text = "4 tensors of the checkpoint are no part of the model served: vision_tower (3), lm_head.bias (1)"
    assert text in caplog.text


def test_a_lora_adapter_that_is_not_merged_is_named(
    folder: Callable[[str], Path], caplog: pytest.LogCaptureFixture
) -> None:
    path = folder("mistral")
    load(path)
    assert "LoRA" not in caplog.text
    (path / "adapter_config.json").write_text("{}")
    load(path)
    assert f"{path / 'adapter_config.json'}: this LoRA adapter is not used: merge it" in caplog.text
    name = "model.layers.0.self_attn.q_proj.lora_A.default.weight"
    load(edit(path, lambda tensors: tensors.update({name: torch.ones(1)})))
    assert "holds a LoRA adapter that is not merged and not used: merge it" in caplog.text
    (path / "config.json").unlink()
    with pytest.raises(LoadError, match="holds a LoRA adapter and no model: merge it"):
        model_folder(str(path))


@pytest.mark.parametrize(
    "family",
    [
        "apertus",
        "gemma3",
        "qwen2",
        "phi3",
        "glm4",
        "starcoder2",
        "glm4-moe",
        "phimoe",
        "granite-moe-shared",
        "ernie-moe",
    ],
)
def test_no_family_leaves_weights_unused(
    family: str, checkpoint: Callable[[str], Path], caplog: pytest.LogCaptureFixture
) -> None:
    folder = checkpoint(family)
    caplog.clear()  # what transformers said while it made the checkpoint
    load(folder)
    assert not caplog.text


@pytest.mark.parametrize("nested", [None, *NESTED])
def test_a_head_of_its_own_is_used_although_the_config_ties_it(
    nested: Callable[[str], str] | None, folder: Callable[[str], Path], caplog: pytest.LogCaptureFixture
) -> None:
    path = folder("qwen3" if nested is None else "gemma3")
    embedding = load_file(path / "model.safetensors")["model.embed_tokens.weight"]
    for head, differs in ((embedding.clone(), False), (embedding * 2, True)):
        edit(path, lambda tensors, head=head: tensors.update({"lm_head.weight": head}))
        if nested is not None and differs:
            nest(path, nested)
        weights = load(path)
        assert ("lm_head" in weights) == differs == ("differs from the embedding" in caplog.text)
    assert torch.equal(weights["lm_head"], embedding * 2) and torch.equal(weights["embedding"], embedding)


def test_names_without_a_prefix(folder: Callable[[str], Path]) -> None:
    """What AutoModel saves: the model without its head."""
    path = folder("qwen3")
    plain = load(path)
    rename_tensors(path, lambda name: name.removeprefix("model."))
    config = json.loads((path / "config.json").read_text()) | {"architectures": ["Qwen3Model"]}
    (path / "config.json").write_text(json.dumps(config))
    found = load(path)
    assert found.keys() == plain.keys() and all(torch.equal(found[name], plain[name]) for name in found)


@pytest.mark.parametrize("read", [load, load_in_files])
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("name", ["model.norm.weight", "model.layers.1.self_attn.v_proj.weight"])
def test_weights_that_are_not_finite(
    value: float, name: str, read: Callable[[Path], dict[str, torch.Tensor]], folder: Callable[[str], Path]
) -> None:
    path = edit(folder("qwen3"), lambda tensors: tensors[name].view(-1)[3:4].fill_(value))
    with pytest.raises(LoadError, match=f"tensor {name} holds NaN or infinity"):
        read(path)


@pytest.mark.parametrize("family", ["qwen3", "gemma2", "glm4-moe", "granite-moe"])
def test_weights_in_files_have_the_values_of_copies(family: str, checkpoint: Callable[[str], Path]) -> None:
    copies, views = load(checkpoint(family)), load_in_files(checkpoint(family))
    assert copies.keys() == views.keys() and all(torch.equal(copies[name], views[name]) for name in copies)


def test_weights_that_float16_cannot_hold(folder: Callable[[str], Path]) -> None:
    path = edit(folder("qwen3"), lambda tensors: tensors["model.embed_tokens.weight"].view(-1)[:1].fill_(1e6))
    with pytest.raises(LoadError, match=r"embed_tokens\.weight does not fit float16: use --dtype bfloat16"):
        load_weights(path, load_config(path), torch.float16, CPU)


@pytest.mark.parametrize("named", ["auto", None])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_a_dtype_that_the_config_leaves_open_is_the_tensors(
    dtype: torch.dtype, named: str | None, folder: Callable[[str], Path]
) -> None:
    path = edit(folder("qwen3"), lambda tensors: tensors.update({n: t.to(dtype) for n, t in tensors.items()}))
    config = json.loads((path / "config.json").read_text()) | {"dtype": named, "torch_dtype": named}
    (path / "config.json").write_text(json.dumps(config))
    assert load_config(path).dtype == str(dtype).removeprefix("torch.")
    (path / "model.safetensors").unlink()
    assert load_config(path).dtype == "float32"


# -- tensor parallelism ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama-gqa", "llama-mqa", "qwen3", "gemma2", "glm4-moe", "granite-moe"])
@pytest.mark.parametrize("world", [1, 2, 4])
def test_the_shards_of_all_ranks_make_up_the_whole(family: str, world: int, checkpoint: Callable[[str], Path]) -> None:
    folder = checkpoint(family)
    config = load_config(folder)
    whole = load(folder)
    ranks = [load_weights(folder, config, torch.float32, CPU, rank=rank, world=world) for rank in range(world)]
    kv_heads, head_dim = config.num_kv_heads, config.head_dim
    for spec in weight_specs(config):
        if spec.shard == "rank0":
            assert torch.equal(ranks[0][spec.name], whole[spec.name])
            assert not any(spec.name in rank for rank in ranks[1:])
            continue
        if spec.shard == "replicated":
            assert all(torch.equal(rank[spec.name], whole[spec.name]) for rank in ranks)
            continue
        parts = [rank[spec.name] for rank in ranks]
        dim = 0 if spec.shard == "column" else 1
        rows = [source.shape[0] for source in spec.sources]
        for i, source in enumerate(whole[spec.name].split(rows)):
            sizes = [
                index[i][dim].stop - index[i][dim].start for index in (shard(spec, r, world) for r in range(world))
            ]
            if dim:
                pieces = [part.split(rows)[i] for part in parts]
            else:
                starts = [sum(s.stop - s.start for s, *_ in shard(spec, r, world)[:i]) for r in range(world)]
                pieces = [part[start : start + n] for part, start, n in zip(parts, starts, sizes, strict=True)]
            if source.shape[dim] == kv_heads * head_dim and sum(sizes) > source.shape[dim]:
                copies = world // kv_heads  # neighbouring ranks hold the same KV head
                assert all(torch.equal(pieces[r], pieces[r - r % copies]) for r in range(world))
                pieces = pieces[::copies]
            assert torch.equal(torch.cat(pieces, dim), source)


@pytest.mark.parametrize("world", [3, 8])
def test_heads_that_cannot_be_divided(world: int, checkpoint: Callable[[str], Path]) -> None:
    with pytest.raises(LoadError, match=rf"--tensor-parallel-size {world}: 4 attention heads and 2 KV heads cannot"):
        rank_config(load_config(checkpoint("llama-gqa")), world)


def test_kv_heads_are_divided_or_replicated(checkpoint: Callable[[str], Path]) -> None:
    config = load_config(checkpoint("llama-gqa"))
    heads = [(one.num_heads, one.num_kv_heads) for one in (rank_config(config, world) for world in (1, 2, 4))]
    assert heads == [(4, 2), (2, 1), (1, 1)]


@pytest.mark.parametrize("size", [128_256, 14_336, 11_008, 112, 300, 7])
@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_an_even_range_is_a_part_of_whole_blocks(size: int, world: int) -> None:
    parts = [even_range(size, rank, world) for rank in range(world)]
    assert [i for part in parts for i in range(part.start, part.stop)] == list(range(size))
    assert all(part.stop - part.start <= parts[0].stop for part in parts)
    if size >= 128 * world and not size % 128:
        assert not any(part.start % 128 for part in parts)


@pytest.mark.parametrize("family", ["llama-gqa", "olmo2", "glm4-moe"])
def test_dummy_weights_of_all_ranks_are_those_of_one(family: str, checkpoint: Callable[[str], Path]) -> None:
    config = load_config(checkpoint(family))
    whole = dummy_weights(config, torch.float32, CPU, seed=3)
    ranks = [dummy_weights(config, torch.float32, CPU, seed=3, rank=rank, world=2) for rank in range(2)]
    for spec in weight_specs(config):
        for rank, weights in enumerate(ranks):
            if spec.shard == "rank0" and rank:
                assert spec.name not in weights
                continue
            parts = whole[spec.name].split([source.shape[0] for source in spec.sources])
            cut = [part[index] for part, index in zip(parts, shard(spec, rank, 2), strict=True)]
            assert torch.equal(weights[spec.name], torch.cat(cut))


def test_a_rank_reads_its_slices_alone(checkpoint: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    folder = checkpoint("llama-mha")
    read: list[torch.Tensor] = []
    real = Checkpoint.read
    monkeypatch.setattr(Checkpoint, "read", lambda *args: read.append(real(*args)) or read[-1])
    sizes = {}
    for rank, world in [(0, 1), *((rank, 4) for rank in range(4))]:
        read.clear()
        load_weights(folder, load_config(folder), torch.float32, CPU, rank=rank, world=world)
        sizes[rank, world] = sum(tensor.numel() for tensor in read if tensor.dim() == 2)
    assert sum(sizes[rank, 4] for rank in range(4)) == sizes[0, 1]  # each weight by one rank
    assert max(sizes[rank, 4] for rank in range(4)) < 0.3 * sizes[0, 1]


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


def test_the_hub_download_takes_one_copy_of_the_weights() -> None:
    from huggingface_hub.utils import filter_repo_objects

    wanted = ["config.json", "model-00001-of-00002.safetensors", "tokenizer.json", "additional_chat_templates/x.jinja"]
    left_out = ["consolidated.safetensors", "consolidated-00001-of-2.safetensors", "original/params.json"]
    left_out += ["original/tokenizer.model", "metal/model.safetensors", "onnx/config.json", "pytorch_model.bin"]
    allowed = [*HUB_PATTERNS, WEIGHT_FILES]
    found = filter_repo_objects(wanted + left_out, allow_patterns=allowed, ignore_patterns=HUB_IGNORED)
    assert list(found) == wanted


def test_a_config_can_be_read_before_its_weights_are_there(folder: Callable[[str], Path]) -> None:
    path = folder("llama-sharded")
    config = json.loads((path / "config.json").read_text()) | {"dtype": None}
    (path / "config.json").write_text(json.dumps(config))
    for shard_file in path.glob("*.safetensors"):
        shard_file.unlink()
    assert load_config(path).dtype == "float32"
