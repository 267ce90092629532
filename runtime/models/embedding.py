"""The table of token embeddings."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from ...kernels.file_weight import FileWeight


class Embedding:
    """Rows of ``[vocabulary, hidden]`` by token id."""

    def __init__(self, table: Tensor | FileWeight) -> None:
        self._table = table

    def lay_out(self) -> Tensor:
        """The table, which the first call copies to memory if it is in a file."""
        if isinstance(self._table, FileWeight):
            self._table = self._table.copy()
        return self._table

    def __call__(self, ids: Tensor) -> Tensor:
        """``[T]`` to ``[T, hidden]``, in the table's dtype. Lays the table out: a server that is never idle would read
        it from a file that others may replace for as long as it lives."""
        return F.embedding(ids, self.lay_out())
