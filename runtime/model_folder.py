"""Where a model lives. No torch here: the processes that do not compute call this too."""

from __future__ import annotations

from pathlib import Path

from .errors import LoadError

HUB_PATTERNS = ["*.json", "*.safetensors", "tokenizer*", "*.jinja"]


def model_folder(model: str) -> Path:
    """The folder of ``model``: a folder, a hub id whose files are fetched, or "" for the model that ships with us.

    Raises `LoadError` with one line that says what is wrong and what to give instead.
    """
    if not model:
        from .models.shipped import shipped_model  # builds the model once, when nothing else was asked for

        return shipped_model()
    path = Path(model).expanduser()
    if path.is_dir():
        return path
    if path.exists() or model.startswith((".", "/", "~")) or model.count("/") != 1:
        raise LoadError(f"{model}: not a folder; give a model folder or a hub id such as Qwen/Qwen3-0.6B")
    from huggingface_hub import snapshot_download  # here: it costs time to import and most loads do not need it

    try:
        return Path(snapshot_download(model, allow_patterns=HUB_PATTERNS))
    except Exception as error:  # the hub's errors share no base class; all of them mean the same here
        reason = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no reason given'}"
        raise LoadError(f"{model}: no such folder, and the hub did not provide it ({reason})") from error
