"""Who computes a model: our decoder, or transformers' layers with our attention (``--model-impl``)."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import torch

from ...kernels.base import Ops
from ...kernels.file_weight import FileWeight
from ...kernels.fp8_linear import multiplies_fp8
from ..config import EngineConfig
from ..errors import LoadError
from ..parallel.group import TensorGroup
from . import linear
from .config import ModelConfig, UnsupportedArchitecture, load_config
from .decoder import Decoder
from .hf.config import TransformersConfig, load_transformers_config
from .hf.decoder import TransformersDecoder
from .hf.library import EXTRA, transformers_version
from .hf.loader import dummy_model, load_model
from .hf.model import make_decoder
from .loader import Progress, dummy_weights, load_weights

logger = logging.getLogger(__name__)

AnyConfig: TypeAlias = ModelConfig | TransformersConfig
AnyDecoder: TypeAlias = Decoder | TransformersDecoder


def load_model_config(config: EngineConfig, folder: Path) -> AnyConfig:
    """The config of the implementation that ``config.model_impl`` names. ``auto``: ours, or transformers' for an
    architecture that ours does not have. Raises `LoadError`."""
    why = "--model-impl transformers"
    if config.model_impl == "native":
        return load_config(folder).for_length(config.max_model_len)
    if config.model_impl == "auto":
        try:
            return load_config(folder).for_length(config.max_model_len)
        except UnsupportedArchitecture as error:
            if transformers_version() is None:
                raise LoadError(f"{error}; with transformers it may be: {EXTRA}") from error
            why = str(error)
    if config.deterministic:
        raise LoadError(
            "--deterministic: not with --model-impl transformers, whose sums depend on a step's other tokens"
        )
    ranks = config.tensor_parallel_size
    model = load_transformers_config(folder, ranks, trust_remote_code=config.trust_remote_code)
    logger.info("%s: computed by transformers %s with our attention", why, transformers_version())
    if model.note:
        logger.info("%s: %s", model.architecture, model.note)
    return model


def implementation_name(model: AnyConfig) -> str:
    """In words, for people."""
    if isinstance(model, ModelConfig):
        return "served natively"
    note = f" ({model.note})" if model.note else ""
    return f"computed by transformers {transformers_version()} with our attention{note}"


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A rank's weights, and how to make the decoder of them once the ranks have met. Can be made once."""

    nbytes: int
    decoder: Callable[[TensorGroup], AnyDecoder]


def load(
    config: EngineConfig,
    model: AnyConfig,
    folder: Path,
    dtype: torch.dtype,
    device: torch.device,
    ops: Ops,
    progress: Progress | None,
    *,
    rank: int,
    ranks: int,
    fixed_rows: int | None,
) -> LoadedModel:
    """Reads the weights of rank ``rank`` of ``ranks``, or makes them up. Raises `LoadError`."""
    int8, dummy = config.quantization == "int8", config.load_format == "dummy"
    if isinstance(model, TransformersConfig):
        if dummy:
            loaded = dummy_model(model, dtype, device if ranks == 1 else torch.device("cpu"), config.seed)
        else:
            loaded = load_model(model, dtype)
        size = weight_bytes(model, dtype, device, rank, ranks, int8=int8)
        if progress is not None:
            progress(size, size)
        return LoadedModel(size, lambda group: make_decoder(model, loaded, ops, device, group, int8=int8))
    in_files: dict[str, FileWeight] = {}
    if dummy:
        weights = dummy_weights(model, dtype, device, config.seed, rank=rank, world=ranks)
    else:
        weights = load_weights(folder, model, dtype, device, progress, rank=rank, world=ranks, in_files=in_files)
    settings: dict[str, Any] = {"dtype": dtype, "int8": int8, "fixed_rows": fixed_rows, "in_files": in_files}
    return LoadedModel(
        sum(weight.nbytes for weight in weights.values()) + sum(weight.nbytes for weight in in_files.values()),
        lambda group: Decoder(model, weights, ops, group, **settings),
    )


def weight_bytes(
    model: AnyConfig,
    dtype: torch.dtype,
    device: torch.device,
    rank: int,
    ranks: int,
    *,
    int8: bool,
    copied: bool = True,
) -> int:
    """Bytes of a rank's weights as a decoder stores them, or with ``copied`` off those that a step reads."""
    if isinstance(model, TransformersConfig):
        return model.weight_bytes(dtype, device, int8=int8, fp8=multiplies_fp8(device), copied=copied)
    return linear.weight_bytes(model, dtype, device, rank, ranks, int8=int8, copied=copied)


def weight_format(model: AnyConfig, dtype: torch.dtype, device: torch.device, *, int8: bool) -> str:
    """How a decoder stores its weights, in words."""
    return linear.weight_format(model, dtype, device, int8=int8)
