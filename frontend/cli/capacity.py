"""How many requests of a model fit on GPUs of some size: ``branchwise doctor --device-memory``. Needs no GPU."""

from __future__ import annotations

import re
from collections.abc import Iterator

from ...runtime.config import EngineConfig, step_budget
from ...runtime.errors import LoadError

_UNITS = {"": 1, "B": 1, "MB": 10**6, "GB": 10**9, "MIB": 2**20, "GIB": 2**30}


def parse_size(text: str) -> int:
    """``80GiB``, ``80 GB`` or a number of bytes. Raises `LoadError`."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]*)\s*", text)
    if match is None or match[2].upper() not in _UNITS:
        raise LoadError(f"--device-memory {text!r}: give a size such as 80GiB, 80GB or a number of bytes")
    return int(float(match[1]) * _UNITS[match[2].upper()])


def fitting_requests(kv_tokens: int, request_tokens: int, shared_tokens: int) -> int:
    """Requests whose tokens are in a pool at once: (pool - shared) / (request - shared). Raises `LoadError`."""
    if not 0 <= shared_tokens < request_tokens:
        raise LoadError(f"--shared-tokens {shared_tokens}: must be less than the {request_tokens} tokens of a request")
    return max(0, kv_tokens - shared_tokens) // (request_tokens - shared_tokens)


def lines(config: EngineConfig, device_memory: str, request_tokens: int, shared_tokens: int) -> Iterator[str]:
    """The memory plan of one rank, and the requests that fit. Loads no weights; raises `LoadError`."""
    import torch

    from ...runtime.executor.device import apply_quantization
    from ...runtime.executor.executor import max_model_len
    from ...runtime.executor.memory import plan_memory
    from ...runtime.models.folder import model_folder
    from ...runtime.models.implementation import load_model_config

    device = torch.device("cuda")
    folder = model_folder(config.model, weights=False, code=config.trust_remote_code)
    model = apply_quantization(config, load_model_config(config, folder), device)
    dtype = getattr(torch, model.dtype if config.dtype == "auto" else config.dtype)
    longest, batched = max_model_len(config, model), step_budget(config, gpu=True)
    plan = plan_memory(config, model, dtype, device, longest, batched, gpu_bytes=parse_size(device_memory))
    yield from plan.lines()
    ranks = config.tensor_parallel_size
    if ranks > 1:
        yield f"On each of {ranks} GPUs; a token's keys and values are split over them."
    tokens = request_tokens or longest
    count = fitting_requests(plan.kv_tokens, tokens, shared_tokens)
    sharing = f", {shared_tokens:,} of them shared" if shared_tokens else ""
    yield (
        f"{count:,} requests of {tokens:,} tokens{sharing}, fit at once: "
        f"({plan.kv_tokens:,} - {shared_tokens:,}) / ({tokens:,} - {shared_tokens:,})"
    )
