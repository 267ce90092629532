"""The table of token embeddings."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from ...kernels.file_weight import FileWeight


class Embedding:
    """Rows of ``[vocabulary, hidden]`` by token id. A table in a file is read from there until it is laid out."""

    def __init__(self, table: Tensor | FileWeight) -> None:
        self._table = table

    def lay_out(self) -> None:
        """Copies the table to memory, once."""
        if isinstance(self._table, FileWeight):
            self._table = self._table.copy()

    def __call__(self, ids: Tensor) -> Tensor:
        """``[T]`` to ``[T, hidden]``, in the table's dtype."""
        return F.embedding(ids, self._table if isinstance(self._table, Tensor) else self._table.view())
