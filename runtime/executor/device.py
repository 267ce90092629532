"""The device an executor runs on, its dtype, and how a thread makes it current."""

from __future__ import annotations

import contextlib
import logging
from contextlib import AbstractContextManager
from dataclasses import replace

import torch

from ...kernels.processor import multiplies_bfloat16, multiplies_int8
from ..config import EngineConfig
from ..errors import LoadError
from ..models.implementation import AnyConfig
from ..models.quantization import ONLINE_FP8
from ..parallel.devices import rank_devices

logger = logging.getLogger(__name__)


def on_device(device: torch.device) -> AbstractContextManager[object]:
    """Makes a GPU the calling thread's current device, and the previous one current again afterwards.

    CUDA launches kernels, records events and captures graphs on the thread's current device, wherever their tensors
    are. Engines of one process may be on several devices, and the current device of the user's threads stays theirs.
    """
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


def pick_device(config: EngineConfig, rank: int = 0) -> torch.device:
    """The device that ``config.device`` names; a GPU with its index. ``auto`` is a GPU if there is one. The ranks of a
    model have GPUs side by side: rank 0 the named one."""
    name = config.device
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise LoadError(f"--device {name}: give auto, cpu, cuda or cuda:N") from error
    if device.type not in ("cpu", "cuda"):
        raise LoadError(f"--device {name}: give auto, cpu, cuda or cuda:N")
    if device.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if (device.index or 0) >= count:
            raise LoadError(f"--device {name}: torch {torch.__version__} sees {count} CUDA devices")
        first = torch.cuda.current_device() if device.index is None else device.index
        ranks = config.tensor_parallel_size
        indices = rank_devices(first, ranks)
        if indices[-1] >= count:
            raise LoadError(
                f"--tensor-parallel-size {ranks}: torch {torch.__version__} sees {count} CUDA devices, and the model "
                f"would be on cuda:{first} to cuda:{indices[-1]}"
            )
        return torch.device("cuda", indices[rank])
    return device


def pick_dtype(config: EngineConfig, model: AnyConfig, device: torch.device) -> torch.dtype:
    """The dtype of activations, of weights that are not quantized, and of KV. ``auto`` is the checkpoint's, on a device
    that multiplies it natively; float32 on other CPUs."""
    name: str = config.dtype
    if name == "auto":
        name = model.dtype
        if device.type == "cpu":
            return torch.bfloat16 if name == "bfloat16" and multiplies_bfloat16() else torch.float32
        if name == "bfloat16" and torch.cuda.get_device_capability(device) < (8, 0):
            # Gemma's activations exceed the range of float16 (65,504).
            name = "float32" if model.sandwich_norms else "float16"
            logger.warning("this GPU does not support bfloat16, the checkpoint's dtype: serving in %s", name)
    dtype: torch.dtype = getattr(torch, name)
    return dtype


def apply_quantization(config: EngineConfig, model: AnyConfig, device: torch.device) -> AnyConfig:
    """The model with the quantization that ``config`` asks for, beside its checkpoint's own. Raises `LoadError` if the
    device cannot multiply int8."""
    if config.quantization == "int8" and (device.type != "cpu" or not multiplies_int8()):
        where = f"{device} is a GPU: use fp8" if device.type != "cpu" else "this processor has no VNNI: use auto"
        raise LoadError(f"--quantization int8 is for CPUs with VNNI, and {where}")
    if config.quantization == "fp8" and model.quantization is None:
        return replace(model, quantization=ONLINE_FP8)
    return model


def device_name(device: str) -> str:
    """The name of a GPU, as its driver gives it."""
    return torch.cuda.get_device_name(torch.device(device))
