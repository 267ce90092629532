"""What a model wants where a request says nothing: the sampling values in its ``generation_config.json``."""

from __future__ import annotations

from pathlib import Path

from ..config import EngineConfig
from ..errors import InvalidRequest, LoadError
from ..sampling_params import SamplingParams, validate
from .folder import read_json

# Fields of `SamplingParams` that a model may have a default of its own for: those that vLLM and SGLang read. Like them
# we leave ``do_sample`` alone: it says how transformers' `generate` draws, and that is greedily where it is missing or
# false. Nor is ``max_new_tokens`` read: how long an answer may be is for the request to say.
DEFAULTED = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")


def sampling_defaults(config: EngineConfig, folder: Path) -> dict[str, float]:
    """Of the fields in `DEFAULTED` those that the model in ``folder`` has a value for; none with the setting "neutral".

    Raises `LoadError` naming the file, the key and the limit: served with another value than its maker meant to give,
    a model would be a worse one, and nobody would know why.
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
