"""Index arrays on the host."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Int32 = npt.NDArray[np.int32]
Int64 = npt.NDArray[np.int64]


def ranges(starts: Int64, lengths: Int64) -> Int64:
    """``starts[0] … starts[0] + lengths[0] - 1``, then the same for the next pair, concatenated."""
    return np.arange(int(lengths.sum())) + np.repeat(starts - (np.cumsum(lengths) - lengths), lengths)
