"""Index arrays on the host."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Int32 = npt.NDArray[np.int32]
Int64 = npt.NDArray[np.int64]


def ranges(starts: Int32 | Int64, lengths: Int32 | Int64) -> Int64:
    """``starts[0] … starts[0] + lengths[0] - 1``, then the same for the next pair, concatenated."""
    ends = lengths.cumsum()
    total = int(ends[-1]) if len(ends) else 0
    found = np.arange(total)
    found += (starts + lengths - ends).repeat(lengths)
    return found
