"""The prefix cache: a radix tree of token prefixes over pages of keys and values. NumPy only: no device, no torch."""

from .errors import InvariantError, LeaseError, OutOfPages, RadixError
from .events import PagesEntered, PagesLeft, TreeObserver
from .explain import Explanation
from .hold import Hold
from .inspection import Inspection
from .lease import Lease
from .node import DEFAULT, Namespace
from .pages import PageAllocator
from .scores import SCORE, Scores
from .tree import RadixTree

__all__ = [
    "DEFAULT",
    "SCORE",
    "Explanation",
    "Hold",
    "Inspection",
    "InvariantError",
    "Lease",
    "LeaseError",
    "Namespace",
    "OutOfPages",
    "PageAllocator",
    "PagesEntered",
    "PagesLeft",
    "RadixError",
    "RadixTree",
    "Scores",
    "TreeObserver",
]
