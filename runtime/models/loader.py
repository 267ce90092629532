"""Weights for a decoder: read from a checkpoint, or random. Never transformers."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Collection
from pathlib import Path

import torch
from torch import Tensor

from ...kernels.file_weight import FileWeight
from ...kernels.quantize import quantize_weight
from ..errors import LoadError
from .checkpoint import Checkpoint
from .config import ModelConfig
from .quantization import FP8_DTYPE, KV_SCALE, refuse_quantized_tensors
from .unread import warn_of_adapter, warn_of_unread
from .weights import Source, WeightSpec, is_linear, lm_head_specs, shard, shard_shape, stored_dtype, weight_specs

Progress = Callable[[int, int], None]  # (bytes loaded, bytes in all)

logger = logging.getLogger(__name__)

_STORED_AS = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}  # in safetensors' words

# Constants that older versions of transformers, or xIELU, save with the weights.
_CONSTANTS = (".inv_freq", ".masked_bias", ".act_fn.beta", ".act_fn.eps")


def load_weights(
    folder: Path,
    config: ModelConfig,
    dtype: torch.dtype,
    device: torch.device,
    progress: Progress | None = None,
    *,
    rank: int = 0,
    world: int = 1,
    in_files: dict[str, FileWeight] | None = None,
) -> dict[str, Tensor]:
    """Reads every weight the config calls for, fused, in ``dtype`` (norms in float32) on ``device``.

    On a CPU with ``dtype`` float32, the embedding and the matrices of linear layers stay in a checkpoint's bfloat16 or
    float16: `kernels.linear` converts them where it packs them, to the same values. Of a model that is not split, those
    that need no conversion are left in the files and put into ``in_files``, if given, instead of the result.

    A quantized weight ``name`` is float8_e4m3fn. Its scales, float32, are ``name_scale``: of each output channel
    ``[N, 1]`` or of each block ``[ceil(N / 128), ceil(K / 128)]``; with static activations ``name_input_scale``, one of
    each tensor that is part of the weight.

    Rank ``rank`` of ``world`` reads and gets its slices alone (`weights.shard`). A ``lm_head`` that differs from the
    embedding is returned although the config says that they are tied, with a warning.

    Raises `LoadError` for a missing, truncated or corrupt file, a missing or mis-shaped tensor, values that are not
    finite, and a checkpoint that is quantized in another way than its config says.
    """
    warn_of_adapter(folder)
    with Checkpoint(folder) as checkpoint:
        specs = list(weight_specs(config))
        if config.tied_embeddings and _head_differs(checkpoint, config):
            logger.warning("lm_head.weight differs from the embedding although tie_word_embeddings is true: using both")
            specs.extend(lm_head_specs(config))
        _check_names(checkpoint, specs, config)
        specs = [spec for spec in specs if spec.shard != "rank0" or rank == 0]
        indices = [shard(spec, rank, world) for spec in specs]
        online = config.quantization is not None and config.quantization.scale is None
        shapes = [shard_shape(spec, rank, world) for spec in specs]
        sizes = [
            math.prod(shape) * stored_dtype(spec, dtype).itemsize for spec, shape in zip(specs, shapes, strict=True)
        ]
        kinds = [_read_dtype(checkpoint, spec, dtype, device) for spec in specs]
        stays = {
            spec.name
            for spec, kind in zip(specs, kinds, strict=True)
            if in_files is not None and world == 1 and _stays_in_file(checkpoint, spec, kind, device)
        }
        weights = _allocate(specs, shapes, kinds, device, without=stays)
        for i, spec in enumerate(specs):
            if in_files is not None and spec.name in stays:
                parts = zip(spec.sources, indices[i], strict=True)
                in_files[spec.name] = FileWeight([_view(checkpoint, *part) for part in parts])
            elif spec.kind == "fp8" and online:
                read = _read(checkpoint, spec, indices[i], torch.empty(shapes[i], dtype=dtype, device=device))
                values, weights[f"{spec.name}_scale"] = quantize_weight(read, torch.float8_e4m3fn)
                weights[spec.name].copy_(values)
            else:
                _read(checkpoint, spec, indices[i], weights[spec.name])
            if spec.kind == "norm":
                weights[spec.name].add_(config.norm_offset)
            if progress is not None:
                progress(sum(sizes[: i + 1]), sum(sizes))
    return weights


def dummy_weights(
    config: ModelConfig, dtype: torch.dtype, device: torch.device, seed: int, *, rank: int = 0, world: int = 1
) -> dict[str, Tensor]:
    """Random weights of the config's shape: the same for the same seed, scaled so that activations stay finite.

    Each rank makes whole weights, one at a time, and keeps its slices: all ranks together have those of a single one.
    """
    generator = torch.Generator(device).manual_seed(seed)
    bound = 0.02 * 3**0.5  # a uniform of the usual standard deviation, several times faster than a normal
    specs = list(weight_specs(config))
    shapes = [shard_shape(spec, rank, world) for spec in specs]
    weights = _allocate(specs, shapes, [stored_dtype(spec, dtype) for spec in specs], device)
    for spec, shape in zip(specs, shapes, strict=True):
        weight = weights[spec.name]
        if spec.kind == "bytes":  # MXFP4: scales of 2 ** -7, random values; each rank makes its own
            weight.random_(*((120, 121) if spec.name.endswith("_scale") else (0, 256)), generator=generator)
            continue
        if spec.kind in ("norm", "scale"):
            weight.fill_(1.0 if spec.kind == "norm" else bound / 448)
            continue
        whole = torch.empty(spec.shape, dtype=dtype, device=device)
        whole.uniform_(-bound, bound, generator=generator)
        if spec.kind == "fp8":
            whole.mul_(448 / bound)
            weights.setdefault(f"{spec.name}_scale", torch.full((shape[0], 1), bound / 448, device=device))
        sources = whole.split([source.shape[0] for source in spec.sources])
        parts = [source[part] for source, part in zip(sources, shard(spec, rank, world), strict=True)]
        for part, kept in zip(parts, weight.split([len(part) for part in parts]), strict=True):
            kept.copy_(part)
        if spec.shard == "rank0" and rank:
            del weights[spec.name]
    return weights


def _allocate(
    specs: list[WeightSpec],
    shapes: list[tuple[int, ...]],
    dtypes: list[torch.dtype],
    device: torch.device,
    without: Collection[str] = (),
) -> dict[str, Tensor]:
    """Memory for all weights, before anything else takes some: torch gives a tensor of 10 MiB or more memory of its own
    only where it has no larger piece free. Weights that were allocated as they were read lay in what temporaries had
    left: 3.1 GiB beside those of a 70B on each of two GPUs could not be returned."""
    each = zip(specs, shapes, dtypes, strict=True)
    return {s.name: torch.empty(shape, dtype=dtype, device=device) for s, shape, dtype in each if s.name not in without}


def _check_names(checkpoint: Checkpoint, specs: list[WeightSpec], config: ModelConfig) -> None:
    """Refuses tensors that are quantized in another way than the config says, and warns of tensors that are not read.

    Looks at the language model's tensors alone: a vision tower may have scales of another kind.
    """
    quantization = config.quantization
    stored = quantization is not None and quantization.scale is not None
    expected = {"fp8": FP8_DTYPE if stored else "", "bytes": "U8"}
    read = {checkpoint.full_name(s.name): expected.get(spec.kind, "") for spec in specs for s in spec.sources}
    ours = (checkpoint.full_name("model."), checkpoint.full_name("lm_head."))
    dtypes = [entry for entry in checkpoint.dtypes() if entry[0].startswith(ours)]
    kv_scales = quantization is not None and quantization.kv_scales
    refuse_quantized_tensors(dtypes, read, kv_scales=kv_scales)
    layers = tuple(checkpoint.full_name(f"model.layers.{i}.") for i in range(config.num_layers))
    known = {*read, checkpoint.full_name("lm_head.weight")}  # a head that equals the tied embedding is not read
    unread = [name for name, _ in checkpoint.dtypes() if name not in known]
    warn_of_unread([name for name in unread if not name.endswith(_CONSTANTS) and not KV_SCALE.search(name)], layers)


def _read_dtype(checkpoint: Checkpoint, spec: WeightSpec, dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """See `load_weights`."""
    kept = spec.kind == "weight" and is_linear(spec)
    if device.type == "cpu" and dtype == torch.float32 and (kept or spec.name == "embedding"):
        found = {checkpoint.dtype(source.name) for source in spec.sources}
        for narrow in (torch.bfloat16, torch.float16):
            if found == {_STORED_AS[narrow]}:
                return narrow
    return stored_dtype(spec, dtype)


def _stays_in_file(checkpoint: Checkpoint, spec: WeightSpec, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether it is a matrix that needs no conversion to ``dtype`` and that `LinearFactory` or `Embedding` takes."""
    matrix = spec.kind == "weight" and is_linear(spec) and ".experts." not in spec.name
    return (
        device.type == "cpu"
        and (matrix or spec.name == "embedding")
        and not any(source.interleaved for source in spec.sources)
        and {checkpoint.dtype(source.name) for source in spec.sources} == {_STORED_AS.get(dtype)}
    )


def _read(checkpoint: Checkpoint, spec: WeightSpec, indices: tuple[tuple[slice, ...], ...], weight: Tensor) -> Tensor:
    parts = weight.split([index[0].stop - index[0].start for index in indices])
    copy = _copy_scale if spec.kind == "scale" else _copy
    for source, index, part in zip(spec.sources, indices, parts, strict=True):
        copy(checkpoint, source, index, part)
    return weight


def _copy(checkpoint: Checkpoint, source: Source, index: tuple[slice, ...], part: Tensor) -> None:
    tensor = _tensor(checkpoint, source, index)
    part.copy_(_separate(tensor, source) if source.interleaved else tensor)
    _check_values(checkpoint.full_name(source.name), source, tensor, part)


def _view(checkpoint: Checkpoint, source: Source, index: tuple[slice, ...]) -> Tensor:
    tensor = _tensor(checkpoint, source, index)
    _check_values(checkpoint.full_name(source.name), source, tensor, tensor)
    return tensor


def _tensor(checkpoint: Checkpoint, source: Source, index: tuple[slice, ...]) -> Tensor:
    """The rows of ``source``, in the checkpoint's dtype and memory. Raises `LoadError` for another shape."""
    name = checkpoint.full_name(source.name)
    expected: tuple[int, ...] = (source.tensor_rows or source.shape[0], *source.shape[1:])
    first, step = source.start, source.step
    index = (slice(first + step * index[0].start, first + step * (index[0].stop - 1) + 1), *index[1:])
    if source.transposed:
        expected, index = expected[::-1], index[::-1]
    if source.packed:
        parts = slice(index[1].start // source.packed, index[1].stop // source.packed)
        expected = (expected[0], expected[1] // source.packed, source.packed)
        index = (index[0], parts, slice(0, source.packed))
    if source.expert is not None:
        expert, count = source.expert
        expected, index = (count, *expected), (slice(expert, expert + 1), *index)
    if (shape := checkpoint.shape(source.name)) != expected:
        raise LoadError(f"tensor {name} has shape {list(shape)}, config.json calls for {list(expected)}")
    tensor = checkpoint.read(source.name, index)
    tensor = tensor if source.expert is None else tensor[0]
    tensor = tensor.t() if source.transposed else tensor.flatten(1) if source.packed else tensor
    return tensor[:: source.step]


def _check_values(name: str, source: Source, tensor: Tensor, part: Tensor) -> None:
    """Raises `LoadError` if ``part``, which ``tensor`` of the checkpoint was copied to, holds NaN or infinity."""
    if not _finite(part):
        if _finite(tensor):
            raise LoadError(
                f"tensor {name} does not fit {str(part.dtype).removeprefix('torch.')}: use --dtype bfloat16"
            )
        raise LoadError(f"tensor {name} holds NaN or infinity: the checkpoint is damaged; download it again")
    if part.dtype == torch.uint8 and not source.packed and bool((part == 0xFF).any()):
        raise LoadError(f"tensor {name} holds scales that are NaN: the checkpoint is damaged; download it again")


def _copy_scale(checkpoint: Checkpoint, source: Source, index: tuple[slice, ...], part: Tensor) -> None:
    """A scalar stands for all channels."""
    name, shape = checkpoint.full_name(source.name), checkpoint.shape(source.name)
    rows = source.tensor_rows or source.shape[0]
    expected = tuple(-(-size // block) for size, block in zip((rows, *source.shape[1:]), source.block, strict=False))
    if math.prod(shape) == 1:
        tensor = checkpoint.read(source.name, ()).float().reshape([1] * part.dim())
    elif shape == expected:
        first = source.start // source.block[0]
        tensor = checkpoint.read(
            source.name, (slice(first + index[0].start, first + index[0].stop), *index[1:])
        ).float()
        tensor = _separate(tensor, source) if source.interleaved else tensor
    else:
        raise LoadError(f"tensor {name} has shape {list(shape)}, its weight calls for {list(expected)}")
    if not _finite(tensor) or not bool((tensor > 0).all()):
        raise LoadError(f"tensor {name} holds scales that are not positive numbers: the checkpoint is damaged")
    part.copy_(tensor)


def _separate(tensor: Tensor, source: Source) -> Tensor:
    """Reorders the first ``interleaved`` rows of each unit: even ones, then odd ones.

    So rotary channels 2i and 2i + 1 come to where the half-split layout has them. Queries and keys are reordered alike,
    and their products do not depend on the order.
    """
    per_unit = source.shape[0] // source.units
    units = tensor.unflatten(0, (-1, per_unit))
    dim = source.interleaved
    return torch.cat([units[:, 0:dim:2], units[:, 1:dim:2], units[:, dim:]], dim=1).flatten(0, 1)


def _finite(tensor: Tensor) -> bool:
    """Whether every value is: one pass without a temporary, since NaN and infinity survive a sum."""
    if tensor.dtype == torch.float8_e4m3fn:  # no infinity, two NaNs; not every device sums it
        return not bool((tensor.view(torch.uint8) & 0x7F).eq_(0x7F).any())
    # bfloat16 has float32's range and is summed in it; naming float32 would take three times as long.
    dtype = None if tensor.dtype == torch.bfloat16 else torch.float32
    return math.isfinite(tensor.sum(dtype=dtype).item())


def _head_differs(checkpoint: Checkpoint, config: ModelConfig) -> bool:
    """Whether the checkpoint has an output projection that is not the embedding. Read in blocks of 64 MiB or so."""
    if "lm_head.weight" not in checkpoint:
        return False
    embedding, head = "model.embed_tokens.weight", "lm_head.weight"
    (vocab, *rest), other = checkpoint.shape(embedding), checkpoint.shape(head)
    if (vocab, *rest) != other:
        return True  # reading it will say what is wrong with its shape
    block = max(1, (16 << 20) // max(config.hidden_size, 1))
    for row in range(0, vocab, block):
        index = (slice(row, min(row + block, vocab)), *(slice(0, size) for size in rest))
        if not torch.equal(checkpoint.read(embedding, index).float(), checkpoint.read(head, index).float()):
            return True
    return False
