"""How many requests of a model fit on GPUs of some size: ``branchwise doctor --device-memory``. Needs no GPU."""

from __future__ import annotations

from collections.abc import Iterator

from ...runtime.config import EngineConfig, parse_bytes, step_budget
from ...runtime.errors import LoadError


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
    plan = plan_memory(
        config, model, dtype, device, longest, batched, gpu_bytes=parse_bytes(device_memory, "--device-memory")
    )
    yield from plan.lines()
    ranks = config.tensor_parallel_size
    if ranks > 1:
        yield f"On each of {ranks} GPUs; a token's keys and values are split over them."
    tokens = request_tokens or longest
    count = fitting_requests(plan.kv_tokens, tokens, shared_tokens)
    sharing = f", {shared_tokens:,} of them shared," if shared_tokens else ""
    yield (
        f"{count:,} requests of {tokens:,} tokens{sharing} fit at once: "
        f"({plan.kv_tokens:,} - {shared_tokens:,}) / ({tokens:,} - {shared_tokens:,})"
    )
