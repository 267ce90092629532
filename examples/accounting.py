"""Shared by the examples: a backend from the command line, and a report of the tokens that the cache saved.

python examples/tree_of_thought.py                         # the shipped model, in this process
python examples/tree_of_thought.py http://127.0.0.1:8000   # a Branchwise server
python examples/multi_turn_chat.py http://127.0.0.1:8000   # or an OpenAI-compatible one, for examples without select
"""

from __future__ import annotations

import argparse
import inspect
import sys
import time
from collections.abc import Callable
from statistics import median

import branchwise as bw

RUNS = 3  # with the cache and without it, in turn
ENOUGH_SECONDS = 8.0  # after which no further runs begin


def show(title: str, work: Callable[[], str]) -> None:
    """Runs ``work`` with and without the cache; prints its result, how many prompt tokens were computed, and
    the median times."""
    parser = argparse.ArgumentParser(
        description=inspect.getdoc(sys.modules["__main__"]), formatter_class=argparse.RawDescriptionHelpFormatter
    )
    what = "a Branchwise server (its key: BRANCHWISE_API_KEY), or an OpenAI-compatible one; default: the shipped model"
    parser.add_argument("url", metavar="URL", nargs="?", help=what)
    url = parser.parse_args().url
    print(title)
    if url is None:
        with bw.Engine(kv_cache_tokens=32768) as engine:
            _report(engine, work)
        return
    try:
        _report(bw.connect(url), work)
    except (bw.ProgramError, bw.BackendError) as error:
        sys.exit(str(error))


def _report(where: object, work: Callable[[], str]) -> None:
    bw.set_default_backend(where)
    backend = bw.default_backend()
    if not hasattr(backend, "without_cache"):
        result, account = _measured(backend, work)
        print(f"{result}\nwith its cache: {account}")
        print(f"{backend.name} cannot be asked to do without its cache: no comparison")
        return
    plain = backend.without_cache()
    bw.set_default_backend(plain)
    work()  # imports and grammars are paid for here, in neither measurement
    seconds: dict[str, list[float]] = {"with": [], "without": []}
    accounts = {}
    began = time.perf_counter()
    while len(seconds["with"]) < RUNS and (not seconds["with"] or time.perf_counter() - began < ENOUGH_SECONDS):
        for label, measured in (("without", plain), ("with", backend)):  # in turn, so that both see the same machine
            bw.set_default_backend(measured)
            bw.flush_cache()
            started = time.perf_counter()
            result, account = _measured(measured, work)
            seconds[label].append(time.perf_counter() - started)
            accounts.setdefault(label, account)
    print(result)
    for label in ("with", "without"):
        print(f"{label + ' the cache':>17}: {accounts[label]}")
    runs = len(seconds["with"])
    each = ", ".join(f"{median(seconds[label]):.2f} s {label} the cache" for label in ("with", "without"))
    print(f"time, median of {runs} run{'s' if runs > 1 else ''}: {each}")
    bw.set_default_backend(None)


def _measured(backend: object, work: Callable[[], str]) -> tuple[str, str]:
    """The result of ``work``, and its tokens: of a model this small, the times say less."""
    before = backend.usage.since(type(backend.usage)())
    result = work()
    used = backend.usage.since(before)
    return result, (
        f"{used.computed_tokens:,} prompt tokens computed, {used.cached_tokens:,} cached "
        f"of {used.prompt_tokens:,} read, {used.sent_tokens:,} sent, {used.requests} requests"
    )
