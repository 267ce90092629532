"""Weights from a folder of safetensors, or made up. Never transformers, never torch.load."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..errors import LoadError
from .config import ModelConfig
from .registry import ARCHITECTURES
from .weights import Source, WeightSpec, weight_specs

Progress = Callable[[int, int], None]  # (bytes loaded, bytes in all)

_INDEX, _SINGLE = "model.safetensors.index.json", "model.safetensors"


def load_weights(
    folder: Path, config: ModelConfig, dtype: torch.dtype, device: torch.device, progress: Progress | None = None
) -> dict[str, Tensor]:
    """Reads every weight the config calls for, fused, in ``dtype`` (norms in float32) on ``device``.

    Raises `LoadError` for a missing, truncated or corrupt file and for a missing or mis-shaped tensor.
    """
    specs = list(weight_specs(config))
    total = sum(math.prod(spec.shape) * _itemsize(spec, dtype) for spec in specs)
    done = 0
    with ExitStack() as stack:
        files = _open_files(folder, stack)
        prefix = _prefix(config, files, folder)
        weights = {}
        for spec in specs:
            weights[spec.name] = _read(spec, prefix, files, config, dtype, device)
            done += weights[spec.name].nbytes
            if progress is not None:
                progress(done, total)
    return weights


def dummy_weights(config: ModelConfig, dtype: torch.dtype, device: torch.device, seed: int) -> dict[str, Tensor]:
    """Random weights of the config's shape: the same for the same seed, scaled so that activations stay finite."""
    generator = torch.Generator(device).manual_seed(seed)
    weights = {}
    for spec in weight_specs(config):
        if spec.norm:
            weights[spec.name] = torch.ones(spec.shape, device=device)
        else:
            weight = torch.empty(spec.shape, dtype=dtype, device=device)
            bound = 0.02 * 3**0.5  # a uniform of the usual standard deviation, several times faster than a normal
            weights[spec.name] = weight.uniform_(-bound, bound, generator=generator)
    return weights


def _read(
    spec: WeightSpec, prefix: str, files: dict[str, Any], config: ModelConfig, dtype: torch.dtype, device: torch.device
) -> Tensor:
    weight = torch.empty(spec.shape, dtype=torch.float32 if spec.norm else dtype, device=device)
    row = 0
    for source in spec.sources:
        weight[row : row + source.shape[0]].copy_(_tensor(source, prefix, files))
        row += source.shape[0]
    return weight.add_(config.norm_offset) if spec.norm else weight


def _tensor(source: Source, prefix: str, files: dict[str, Any]) -> Tensor:
    name = _full_name(source.name, prefix, files)
    if name not in files:
        raise LoadError(f"the checkpoint has no tensor {name}: it is incomplete or not of the architecture it says")
    shape = tuple(files[name].get_slice(name).get_shape())
    if shape != source.shape:
        raise LoadError(f"tensor {name} has shape {list(shape)}, config.json calls for {list(source.shape)}")
    try:
        tensor: Tensor = files[name].get_tensor(name)
    except (SafetensorError, OSError, ValueError) as error:
        raise LoadError(f"tensor {name} cannot be read: {error}; download the checkpoint again") from error
    if not tensor.is_floating_point():
        raise LoadError(f"tensor {name} is {tensor.dtype}: quantized checkpoints are not supported")
    return tensor


def _open_files(folder: Path, stack: ExitStack) -> dict[str, Any]:
    """Tensor name -> the open file that holds it. safetensors checks every header against its file's size."""
    files: dict[str, Any] = {}
    for name in _file_names(folder):
        path = folder / name
        if not path.is_file():
            raise LoadError(f"{path} is missing: download the checkpoint again")
        try:
            file = stack.enter_context(safe_open(path, framework="pt"))
            files.update(dict.fromkeys(file.keys(), file))
        except (SafetensorError, OSError, ValueError) as error:
            raise LoadError(f"{path} is truncated or corrupt ({error}): download the checkpoint again") from error
    return files


def _file_names(folder: Path) -> list[str]:
    index = folder / _INDEX
    if not index.is_file():
        if not (folder / _SINGLE).is_file():
            raise LoadError(f"{folder} has neither {_SINGLE} nor {_INDEX} (--load-format dummy makes up weights)")
        return [_SINGLE]
    try:
        names = list(dict.fromkeys(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise LoadError(f"{index} is not a safetensors index: {error!r}") from error
    for name in names:
        if not isinstance(name, str) or Path(name).name != name:  # a name must not lead out of the folder
            raise LoadError(f"{index}: {name!r} is not the name of a file in the folder")
    return names


def _prefix(config: ModelConfig, files: dict[str, Any], folder: Path) -> str:
    embedding = "model.embed_tokens.weight"
    candidates = ARCHITECTURES[config.architecture].prefixes
    for prefix in candidates:
        if _full_name(embedding, prefix, files) in files:
            return prefix
    missing = _full_name(embedding, candidates[0], files)
    raise LoadError(f"{folder} has no tensor {missing}: is it the whole checkpoint?")


def _full_name(name: str, prefix: str, files: dict[str, Any]) -> str:
    """``model.x`` under prefix ``language_model.`` is ``language_model.model.x``; under ``model.language_model.`` (the
    newer layout) it is ``model.language_model.x``, with ``lm_head`` left outside."""
    if prefix == "model.language_model.":
        return prefix + name.removeprefix("model.") if name.startswith("model.") else name
    return prefix + name


def _itemsize(spec: WeightSpec, dtype: torch.dtype) -> int:
    return torch.float32.itemsize if spec.norm else dtype.itemsize
