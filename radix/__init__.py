"""The prefix cache: a radix tree of token prefixes over pages of keys and values. NumPy only: no device, no torch."""

from .errors import InvariantError, LeaseError, OutOfPages, RadixError
from .events import CopiesEntered, CopiesLeft, Event, Observer, PagesEntered, PagesLeft
from .explain import Explanation
from .hold import Hold
from .inspection import Inspection
from .lease import Lease
from .moves import Moves, Reach, Transfer
from .node import DEFAULT, DEVICE, DISK, HOST, Namespace
from .pages import PageAllocator
from .scores import SCORE, Scores
from .tree import RadixTree

__all__ = [
    "DEFAULT",
    "DEVICE",
    "DISK",
    "HOST",
    "SCORE",
    "CopiesEntered",
    "CopiesLeft",
    "Event",
    "Explanation",
    "Hold",
    "Inspection",
    "InvariantError",
    "Lease",
    "LeaseError",
    "Moves",
    "Namespace",
    "Observer",
    "OutOfPages",
    "PageAllocator",
    "PagesEntered",
    "PagesLeft",
    "RadixError",
    "RadixTree",
    "Reach",
    "Scores",
    "Transfer",
]
