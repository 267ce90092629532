"""The tensors of a folder of safetensors files. Never torch.load."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Self

from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..errors import LoadError
from .folder import INDEX, SINGLE, weight_files

# Prefixes of a checkpoint for ``model.`` and ``lm_head.``: causal language models; base models (AutoModel);
# multimodal models as transformers 4 and 5 save them, and their base models.
_LAYOUTS = (
    ("model.", ""),
    ("", ""),
    ("language_model.model.", "language_model."),
    ("model.language_model.", ""),
    ("language_model.", ""),
)


class Checkpoint:
    """Open files of one checkpoint, for use in a ``with`` statement. Only headers are read before `read`.

    Raises `LoadError` for a missing, truncated or corrupt file, and if no layout of names fits.
    """

    def __init__(self, folder: Path) -> None:
        self._stack = ExitStack()
        self._files: dict[str, Any] = {}  # tensor name -> the open file
        try:
            for name in weight_files(folder):
                self._open(folder / name)
            self._model, self._head = self._layout(folder)
        except BaseException:
            self._stack.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def __contains__(self, name: str) -> bool:
        return self.full_name(name) in self._files

    def dtypes(self) -> Iterator[tuple[str, str]]:
        """(full name, safetensors' dtype such as ``BF16``) of every tensor."""
        for name, file in self._files.items():
            yield name, file.get_slice(name).get_dtype()

    def full_name(self, name: str) -> str:
        """The checkpoint's name of ``model.…`` or ``lm_head.…``."""
        if name.startswith("model."):
            return self._model + name.removeprefix("model.")
        return self._head + name

    def shape(self, name: str) -> tuple[int, ...]:
        """Raises `LoadError` if there is no such tensor."""
        return tuple(self._tensor(name).get_shape())

    def dtype(self, name: str) -> str:
        """Safetensors' dtype such as ``BF16``. Raises `LoadError` if there is no such tensor."""
        return str(self._tensor(name).get_dtype())

    def read(self, name: str, index: tuple[slice, ...]) -> Tensor:
        """A part of a tensor, in its own dtype on the CPU; bytes outside ``index`` are not read."""
        try:
            part: Tensor = self._tensor(name)[index]
        except (SafetensorError, OSError, ValueError) as error:
            reason = f"cannot be read: {error}; download the checkpoint again"
            raise LoadError(f"tensor {self.full_name(name)} {reason}") from error
        return part

    def _tensor(self, name: str) -> Any:
        full = self.full_name(name)
        if full not in self._files:
            raise LoadError(f"the checkpoint has no tensor {full}: it is incomplete or not of the architecture it says")
        return self._files[full].get_slice(full)

    def _open(self, path: Path) -> None:
        _check_file(path)
        try:  # safetensors checks the header against the file's size
            file = self._stack.enter_context(safe_open(path, framework="pt"))
            self._files.update(dict.fromkeys(file.keys(), file))
        except (SafetensorError, OSError, ValueError) as error:
            raise LoadError(f"{path} is truncated or corrupt ({error}): download the checkpoint again") from error

    def _layout(self, folder: Path) -> tuple[str, str]:
        for model, head in _LAYOUTS:
            if model + "embed_tokens.weight" in self._files:
                return model, head
        raise LoadError(f"{folder} has no tensor model.embed_tokens.weight: is it the whole checkpoint?")


def check_files(folder: Path) -> None:
    """Raises `LoadError` if the folder lacks a file of its weights. Opens none of them."""
    for name in weight_files(folder):
        _check_file(folder / name)


def _check_file(path: Path) -> None:
    if not path.is_file():
        raise LoadError(f"{path} is missing: download the checkpoint again")


def checkpoint_dtype(folder: Path) -> str | None:
    """The dtype of the embedding, as config.json would name it; None for another dtype, or if weights are missing: then
    loading them is the error."""
    if not (folder / INDEX).is_file() and not (folder / SINGLE).is_file():
        return None
    if not all((folder / name).is_file() for name in weight_files(folder)):
        return None
    with Checkpoint(folder) as checkpoint:
        name = checkpoint.full_name("model.embed_tokens.weight")
        found = dict(checkpoint.dtypes())[name]
    return {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}.get(found)
