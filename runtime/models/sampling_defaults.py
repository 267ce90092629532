"""Model defaults for sampling fields that a request omits, from ``generation_config.json``."""

from __future__ import annotations

from pathlib import Path

from ..config import EngineConfig
from ..errors import InvalidRequest, LoadError
from ..sampling_params import SamplingParams, validate
from .folder import read_json

# Fields of `SamplingParams` that may have a model default: those that vLLM and SGLang read. Like them we ignore
# ``do_sample``, false for transformers' `generate` where it is missing, and ``max_new_tokens``: the length of an answer
# is the request's choice.
DEFAULTED = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")


def sampling_defaults(config: EngineConfig, folder: Path) -> dict[str, float]:
    """Values of the fields in `DEFAULTED` that the model in ``folder`` defines; none with the setting "neutral".

    Raises `LoadError` naming the file, the key and the limit of a value that is out of range, since replacing it would
    silently make the model worse.
    """
    path = folder / "generation_config.json"
    if config.sampling_defaults != "model" or not path.is_file():
        return {}
    raw = read_json(path)
    found = {name: raw[name] for name in DEFAULTED if raw.get(name) is not None}
    try:
        validate(SamplingParams(**found), vocab_size=1)  # no token ids among them
    except InvalidRequest as error:
        raise LoadError(f"{path}: {error.message} (--sampling-defaults neutral does without)") from error
    return found
