"""Weights for a decoder: read from a checkpoint, or random. Never transformers."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from ..errors import LoadError
from .checkpoint import Checkpoint
from .config import ModelConfig
from .quantization import refuse_quantized_tensors
from .weights import Source, WeightSpec, lm_head_spec, shard, shard_shape, weight_specs

Progress = Callable[[int, int], None]  # (bytes loaded, bytes in all)

logger = logging.getLogger(__name__)

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
) -> dict[str, Tensor]:
    """Reads every weight the config calls for, fused, in ``dtype`` (norms in float32) on ``device``.

    Rank ``rank`` of ``world`` reads and gets its slices alone (`weights.shard`). A ``lm_head`` that differs from the
    embedding is returned although the config says that they are tied, with a warning.

    Raises `LoadError` for a missing, truncated or corrupt file, a missing or mis-shaped tensor, values that are not
    finite, and a quantized checkpoint.
    """
    with Checkpoint(folder) as checkpoint:
        specs = list(weight_specs(config))
        if config.tied_embeddings and _head_differs(checkpoint, config):
            logger.warning("lm_head.weight differs from the embedding although tie_word_embeddings is true: using both")
            specs.append(lm_head_spec(config))
        _check_names(checkpoint, specs, config.num_layers)
        specs = [spec for spec in specs if spec.shard != "rank0" or rank == 0]
        indices = [shard(spec, rank, world) for spec in specs]
        dtypes = [torch.float32 if spec.norm else dtype for spec in specs]
        shapes = [shard_shape(spec, rank, world) for spec in specs]
        sizes = [math.prod(shape) * kind.itemsize for shape, kind in zip(shapes, dtypes, strict=True)]
        weights: dict[str, Tensor] = {}
        for i, spec in enumerate(specs):
            weight = torch.empty(shapes[i], dtype=dtypes[i], device=device)
            weight = _read(checkpoint, spec, indices[i], weight)
            weights[spec.name] = weight.add_(config.norm_offset) if spec.norm else weight
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
    weights = {}
    for spec in weight_specs(config):
        shape = shard_shape(spec, rank, world)
        if spec.norm:
            weights[spec.name] = torch.ones(shape, device=device)
            continue
        weight = torch.empty(spec.shape, dtype=dtype, device=device)
        bound = 0.02 * 3**0.5  # a uniform of the usual standard deviation, several times faster than a normal
        weight.uniform_(-bound, bound, generator=generator)
        if shape != spec.shape:
            sources = weight.split([source.shape[0] for source in spec.sources])
            weight = torch.cat([source[part] for source, part in zip(sources, shard(spec, rank, world), strict=True)])
        if spec.shard != "rank0" or rank == 0:
            weights[spec.name] = weight
    return weights


def _check_names(checkpoint: Checkpoint, specs: list[WeightSpec], num_layers: int) -> None:
    """Refuses quantized checkpoints, and warns of tensors of a layer that are not read: the model may be another one.

    Looks at the language model's tensors alone: a vision tower may have scales of another kind.
    """
    read = {checkpoint.full_name(source.name) for spec in specs for source in spec.sources}
    ours = (checkpoint.full_name("model."), checkpoint.full_name("lm_head."))
    refuse_quantized_tensors([entry for entry in checkpoint.dtypes() if entry[0].startswith(ours)], read)
    layers = tuple(checkpoint.full_name(f"model.layers.{i}.") for i in range(num_layers))
    unread = [name for name, _ in checkpoint.dtypes() if name.startswith(layers) and name not in read]
    unread = [name for name in unread if not name.endswith(_CONSTANTS)]
    if unread:
        logger.warning("%d tensors of the checkpoint's layers are not used, such as %s", len(unread), unread[0])


def _read(checkpoint: Checkpoint, spec: WeightSpec, indices: tuple[tuple[slice, ...], ...], weight: Tensor) -> Tensor:
    parts = weight.split([index[0].stop - index[0].start for index in indices])
    for source, index, part in zip(spec.sources, indices, parts, strict=True):
        _copy(checkpoint, source, index, part)
    return weight


def _copy(checkpoint: Checkpoint, source: Source, index: tuple[slice, ...], part: Tensor) -> None:
    name = checkpoint.full_name(source.name)
    shape, expected = checkpoint.shape(source.name), (source.tensor_rows or source.shape[0], *source.shape[1:])
    if shape != expected:
        raise LoadError(f"tensor {name} has shape {list(shape)}, config.json calls for {list(expected)}")
    rows = slice(source.start + index[0].start, source.start + index[0].stop)
    tensor = checkpoint.read(source.name, (rows, *index[1:]))
    part.copy_(_separate(tensor, source) if source.interleaved else tensor)
    if not _finite(part):
        if _finite(tensor):
            raise LoadError(
                f"tensor {name} does not fit {str(part.dtype).removeprefix('torch.')}: use --dtype bfloat16"
            )
        raise LoadError(f"tensor {name} holds NaN or infinity: the checkpoint is damaged; download it again")


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
    return math.isfinite(tensor.sum(dtype=torch.float32).item())


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
