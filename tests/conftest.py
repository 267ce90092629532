"""Fixtures every room's tests share."""

from __future__ import annotations

import asyncio
import functools
import importlib.util
import json
import os
import random
import sys
import threading
from collections.abc import Awaitable, Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis.internal.conjecture import providers

# `make test` draws the same examples in every run; `make fuzz` draws new ones. How long a draw takes is never an error:
# tests share the machine's cores.
settings.register_profile("same", derandomize=True, deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("new", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "same"))
if settings.get_current_profile_name() == "same":
    # Hypothesis also draws constants from the source of the modules imported so far. Which those are depends on the
    # tests that ran before in the same xdist worker.
    providers.is_local_module_file = lambda path: False  # type: ignore[attr-defined]

if not Path("/dev/nvidiactl").exists():
    # Without a GPU, Triton's kernels run in its interpreter. Read when Triton is first imported, by torch if not by us.
    os.environ.setdefault("TRITON_INTERPRET", "1")
# The compiled kernels of a CPU take over when they are there, which is at no fixed time: tests use them by a fixture.
os.environ.setdefault("BRANCHWISE_NATIVE", "off")


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Every test and its fixtures draw the same numbers, whatever ran before in the process."""
    random.seed(0)
    if (numpy := sys.modules.get("numpy")) is not None:
        numpy.random.seed(0)
    if (torch := sys.modules.get("torch")) is not None:
        torch.manual_seed(0)


@pytest.fixture
def turns_during() -> Callable[[Awaitable[object]], Awaitable[int]]:
    """``await turns_during(work)``: how often another task of the loop has its turn before the work is done."""

    async def count(work: Awaitable[object]) -> int:
        turns = 0

        async def other() -> None:
            nonlocal turns
            while True:
                turns += 1
                await asyncio.sleep(0)

        task = asyncio.create_task(other())
        await work
        task.cancel()
        return turns

    return count


@pytest.fixture
def threads_started() -> Callable[[], set[threading.Thread]]:
    """``threads_started()``: the threads that run now and did not when the test began. A count would be wrong where
    a thread of an earlier test ends meanwhile."""
    before = set(threading.enumerate())
    return lambda: set(threading.enumerate()) - before


@pytest.fixture(scope="session")
def _compiled(tmp_path_factory: pytest.TempPathFactory) -> Any:
    native = importlib.import_module("branchwise.kernels.native")
    if (problem := native.problem()) is not None:
        pytest.skip(problem)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        patch.setattr(native, "_NICENESS", 0)  # other tests keep the cores busy
        patch.setattr(native, "_COMPILE_SECONDS", 3600)
        return native.load()


@pytest.fixture
def compiled_kernels(_compiled: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The library of `kernels.native`, in use during the test. Skips where it cannot be compiled."""
    monkeypatch.setattr("branchwise.kernels.native._library", _compiled)
    return _compiled


@functools.cache
def _checkpoints() -> ModuleType:
    path = Path(__file__).parent / "checkpoints.py"
    spec = importlib.util.spec_from_file_location("branchwise_test_checkpoints", path)
    if spec is None or spec.loader is None:
        raise ImportError(f"{path} cannot be imported")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up while they are being made
    spec.loader.exec_module(module)
    return module


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A test with an argument ``family`` runs for every recipe of `tests/checkpoints.py` that its module does not name
    in ``FAMILIES_LEFT_OUT``, unless it chooses families itself."""
    chosen = any("family" in mark.args[0] for mark in metafunc.definition.iter_markers("parametrize"))
    if "family" in metafunc.fixturenames and not chosen:
        left_out = getattr(metafunc.module, "FAMILIES_LEFT_OUT", ())
        metafunc.parametrize("family", [name for name in _checkpoints().FAMILIES if name not in left_out])


@pytest.fixture(scope="session")
def checkpoints() -> ModuleType:
    """The module `tests/checkpoints.py`: ``FAMILIES``, ``build``, ``write_tokenizer``."""
    return _checkpoints()


@pytest.fixture(scope="session")
def checkpoint(checkpoints: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """``checkpoint(family)`` is the folder of a small random checkpoint, built at most once a session."""
    built: dict[str, Path] = {}

    def folder(family: str) -> Path:
        if family not in built:
            built[family] = checkpoints.build(family, tmp_path_factory.mktemp("checkpoints") / family)
        return built[family]

    return folder


@pytest.fixture(scope="session")
def checkpoint_wanting(
    checkpoint: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., Path]:
    """``checkpoint_wanting(temperature=0.9)``: a small checkpoint whose maker wants it sampled like that."""

    def folder(**wanted: Any) -> Path:
        made = tmp_path_factory.mktemp("wanting")
        for file in checkpoint("llama-gqa").iterdir():
            (made / file.name).symlink_to(file)
        own = made / "generation_config.json"
        values = {**json.loads(own.read_text()), **wanted}
        own.unlink()
        own.write_text(json.dumps(values))
        return made

    return folder
