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

import branchwise as bw


def show(title: str, work: Callable[[], str]) -> None:
    """Runs ``work`` with and without the cache; prints its result and how many prompt tokens were computed."""
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
        print(_measured("with its cache", backend, work))
        print(f"{backend.name} cannot be asked to do without its cache: no comparison")
        return
    bw.set_default_backend(backend.without_cache())
    work()  # imports and grammars are paid for here, in neither measurement
    without = _measured("without the cache", bw.default_backend(), lambda: work() and "")
    bw.set_default_backend(backend)
    bw.flush_cache()
    print(_measured("with the cache", backend, work))
    print(without)
    bw.set_default_backend(None)


def _measured(label: str, backend: object, work: Callable[[], str]) -> str:
    before, began = backend.usage.since(type(backend.usage)()), time.perf_counter()
    result = work()
    seconds, used = time.perf_counter() - began, backend.usage.since(before)
    if result:
        print(result)
    return (
        f"{label:>17}: {used.computed_tokens:,} prompt tokens computed, {used.cached_tokens:,} cached "
        f"of {used.prompt_tokens:,} read, {used.sent_tokens:,} sent, {used.requests} requests; {seconds:.2f} s"
    )
