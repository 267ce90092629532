"""A matrix in a checkpoint's mapped files, which a server on a CPU copies once it is ready."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class FileWeight:
    """A matrix ``[outputs, inputs]`` whose values are still in mapped files.

    Copying the 1.2 GB of a 0.6B model before a server was ready took 1.0 s, mapping and checking them takes 0.2 s (2
    cores). Until a weight is copied its file must not change in place: a truncated file ends the process.

    Args:
        parts: ``[rows, inputs]`` each, one below the other, of one dtype: views of mapped files.
    """

    def __init__(self, parts: Sequence[Tensor]) -> None:
        self._parts = tuple(parts)
        self.dtype, self.device = parts[0].dtype, parts[0].device
        self.shape = torch.Size((sum(len(part) for part in parts), *parts[0].shape[1:]))
        self._copy: Tensor | None = None

    @property
    def nbytes(self) -> int:
        return self.shape.numel() * self.dtype.itemsize

    def view(self) -> Tensor:
        """The matrix for one use. Not to be kept: it is the file's memory where it has one part."""
        if self._copy is not None:
            return self._copy
        return self._parts[0].contiguous() if len(self._parts) == 1 else torch.cat(self._parts)

    def copy(self) -> Tensor:
        """The matrix in memory: the first call copies it, and the files are not read again."""
        if self._copy is None:
            self._copy, self._parts = torch.cat(self._parts), ()
        return self._copy
