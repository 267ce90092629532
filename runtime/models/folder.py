"""From a model's name to its folder. No torch here: the processes that do not compute call this too."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ..errors import HubUnreachable, LoadError, why

SHIPPED = Path(__file__).parent / "shipped"  # package data; its README.md is the model's card
ADAPTER = "adapter_config.json"  # of peft
MERGE = "merge it into the base model (peft's merge_and_unload) and serve the result"
WEIGHT_FILES = "*.safetensors"
INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
CODE_FILES = "*.py"
HUB_PATTERNS = ["*.json", "tokenizer*", "*.jinja"]  # without the weights
# A second copy of the weights in Mistral's or Meta's own format, and exports for other runtimes in subfolders.
HUB_IGNORED = ["consolidated*", "original/*", "*/*.safetensors", "*/*.json", "*/tokenizer*"]


def model_folder(model: str, *, weights: bool = True, code: bool = False) -> Path:
    """The folder of ``model``: a folder, a hub id whose files are downloaded, or "" for the model that ships with us.

    ``weights``: False: of a hub id, download only the small files, to check the model before its weights. ``code``:
    also download its Python files. Raises `LoadError` with one line: the problem and its fix.
    """
    if not model:
        return SHIPPED
    path = Path(model).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            if (path / ADAPTER).is_file():
                raise LoadError(f"{path} holds a LoRA adapter and no model: {MERGE}")
            raise LoadError(f"{path} has no config.json: it is not a Hugging Face model folder")
        return path
    if path.exists() or model.startswith((".", "/", "~")) or model.count("/") != 1:
        raise LoadError(f"{model}: not a folder; give a model folder or a hub id such as Qwen/Qwen3-0.6B")
    from huggingface_hub import snapshot_download  # here: it costs time to import and most loads do not need it
    from huggingface_hub.errors import RepositoryNotFoundError
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    here = f"{model}: no such folder"
    silenced = not weights and not are_progress_bars_disabled()  # small files need no bar
    if silenced:
        disable_progress_bars()
    try:
        patterns = [*HUB_PATTERNS, *[WEIGHT_FILES] * weights, *[CODE_FILES] * code]
        return Path(snapshot_download(model, allow_patterns=patterns, ignore_patterns=HUB_IGNORED))
    except RepositoryNotFoundError:
        failure = LoadError(f"{here}, and the hub has none of that name, or asks for a login (HF_TOKEN)")
    except Exception as error:  # the hub's other errors share no base class; all of them mean the same here
        what = "give a model's folder, or try again with a network"
        failure = HubUnreachable(f"{here}, and cannot reach the hub: {_bottom(error)}; {what}")
    finally:
        if silenced:
            enable_progress_bars()
    raise failure  # alone: the hub's own traceback is eighty lines


def weight_files(folder: Path) -> list[str]:
    """Names of the files that hold a checkpoint's weights. Raises `LoadError` if its index is missing or damaged."""
    index = folder / INDEX
    if not index.is_file():
        if not (folder / SINGLE).is_file():
            raise LoadError(f"{folder} has neither {SINGLE} nor {INDEX} (--load-format dummy makes up weights)")
        return [SINGLE]
    try:
        names = list(dict.fromkeys(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise LoadError(f"{index} is not a safetensors index: {error!r}") from error
    for name in names:
        if not isinstance(name, str) or Path(name).name != name:  # a name must not lead out of the folder
            raise LoadError(f"{index}: {name!r} is not the name of a file in the folder")
    return names


def read_json(path: Path) -> dict[str, Any]:
    """The object in one of a model's files. Raises `LoadError` naming the file."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise LoadError(f"{path} cannot be read as JSON: {why(error, path)}") from error
    if not isinstance(value, dict):
        raise LoadError(f"{path} must hold a JSON object, got {type(value).__name__}")
    return value


def _bottom(error: BaseException) -> str:
    """The system's message at the bottom of a chain of errors, else the first line of the top one. No class names."""
    bottom: BaseException | None = error
    while bottom is not None:
        if isinstance(bottom, OSError) and bottom.strerror:
            return bottom.strerror
        bottom = bottom.__cause__ or bottom.__context__
    return str(error).strip().partition("\n")[0] or "no reason given"
