"""The checks of `branchwise doctor`. Each returns findings, and does not raise for what it checks."""

from __future__ import annotations

import os
import socket
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from importlib.util import cache_from_source, find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from ...runtime.config import step_budget
from ...runtime.errors import HubUnreachable, LoadError

if TYPE_CHECKING:
    from packaging.requirements import Requirement

    from ...runtime.config import EngineConfig


@dataclass(frozen=True)
class Finding:
    """One result. ``fix``: the command that fixes it. ``broken``: serving cannot work."""

    what: str
    found: str
    state: Literal["ok", "note", "broken"] = "ok"
    fix: str = ""


def libraries() -> Iterator[Finding]:
    """Python and the run-time requirements: installed versions against the declared ranges."""
    yield Finding("python", ".".join(map(str, sys.version_info[:3])))
    within: list[str] = []
    for requirement, installed in _requirements():
        if installed is not None and requirement.specifier.contains(installed, prereleases=True):
            within.append(f"{requirement.name} {installed}")
        else:
            found = f"{installed} is outside {requirement.specifier}" if installed is not None else "not installed"
            yield Finding(requirement.name, found, "broken", _pip(str(requirement)))
    yield Finding("libraries", ", ".join(within))


def bytecode() -> Iterator[Finding]:
    """A finding if Python compiles torch's sources at each start, because it does not keep the result."""
    torch = find_spec("torch")
    if torch is None or torch.origin is None or not sys.dont_write_bytecode:
        return
    if not Path(cache_from_source(torch.origin)).exists():
        found = "torch has none and PYTHONDONTWRITEBYTECODE is set: each start compiles its sources, for seconds"
        yield Finding("bytecode", found, "note", f"{sys.executable} -m compileall -q {Path(torch.origin).parents[1]}")


def _requirements(extra: str = "") -> Iterator[tuple[Requirement, str | None]]:
    """The package's requirements, or those of one of its extras, each with the installed version."""
    from packaging.requirements import Requirement

    for requirement in map(Requirement, metadata.requires("branchwise") or []):
        marker = requirement.marker
        always = marker is None or marker.evaluate({"extra": ""})
        of_extra = marker is not None and not always and marker.evaluate({"extra": extra})
        if of_extra if extra else always:
            try:
                yield requirement, metadata.version(requirement.name)
            except metadata.PackageNotFoundError:
                yield requirement, None


def _pip(requirement: str) -> str:
    return f"{sys.executable} -m pip install '{requirement}'"


def devices() -> Iterator[Finding]:
    """The CPU, and the GPUs torch can use."""
    try:
        import torch
    except (ImportError, OSError) as error:  # OSError: one of its shared libraries is missing or of another build
        yield Finding("torch", f"cannot be imported: {error}", "broken", _pip("torch>=2.11,<2.15"))
        return
    from ...runtime.executor.memory import device_memory, human_bytes

    free, total = device_memory(torch.device("cpu"))
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    cpu = f"{cores} cores, {torch.get_num_threads()} torch threads, {human_bytes(free)} of {human_bytes(total)} free"
    yield Finding("cpu", cpu)
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            free, total = device_memory(torch.device("cuda", index))
            name = torch.cuda.get_device_name(index)
            yield Finding(f"cuda:{index}", f"{name}, {human_bytes(free)} of {human_bytes(total)} free")
        yield from _peer_access(list(range(torch.cuda.device_count())))
        for requirement, installed in _requirements("gpu"):
            if installed is None:
                fix = _pip(f"{requirement.name}{requirement.specifier}")
                yield Finding(requirement.name, "not installed: the fast GPU kernels need it", "note", fix)
    elif Path("/dev/nvidiactl").exists():
        found = f"an NVIDIA device is here, but torch {torch.__version__} cannot use it"
        yield Finding("cuda", found, "note", f"{_pip('torch>=2.11,<2.15')} --force-reinstall")
    else:
        yield Finding("cuda", "no NVIDIA device; the CPU will serve")


def _peer_access(devices: list[int]) -> Iterator[Finding]:
    """Whether GPUs reach each other's memory, by which the ranks of a model exchange tensors fastest."""
    from ...runtime.parallel.devices import without_peer_access

    if len(devices) > 1:
        missing = without_peer_access(devices)
        if not missing:
            yield Finding("peer access", f"the {len(devices)} GPUs reach each other's memory")
            return
        pairs = ", ".join(f"cuda:{a} to cuda:{b}" for a, b in missing[:4]) + (", …" if len(missing) > 4 else "")
        found = f"none from {pairs}: --tensor-parallel-size then exchanges tensors through NCCL, which is slower"
        yield Finding("peer access", found, "note", "nvidia-smi topo -p2p n    (what the driver allows, and why not)")


def port(host: str, number: int) -> Finding:
    """Whether a server could listen here."""
    try:
        family = socket.getaddrinfo(host, number, type=socket.SOCK_STREAM)[0][0]
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((host, number))
    except OSError as error:
        fix = f"branchwise serve --port {number + 1 if number < 65535 else 8000}"
        return Finding("port", f"cannot listen on {host}:{number}: {error.strerror or error}", "note", fix)
    return Finding("port", f"{host}:{number} is free")


def sockets() -> Finding:
    """Whether a private folder with sockets can be made, over which the processes of a server communicate."""
    try:
        with tempfile.TemporaryDirectory(prefix="branchwise-doctor-") as folder, socket.socket(socket.AF_UNIX) as probe:
            probe.bind(str(Path(folder) / "probe.sock"))
    except OSError as error:
        found = f"no socket can be made under {tempfile.gettempdir()}: {error}"
        return Finding("sockets", found, "broken", "export TMPDIR=/tmp")
    return Finding("sockets", f"can be made under {tempfile.gettempdir()}")


def is_hub_id(model: str) -> bool:
    """Whether the files of ``model`` are downloaded, rather than in a folder."""
    return bool(model) and not Path(model).expanduser().is_dir()


def model(config: EngineConfig) -> Iterator[Finding]:
    """The memory plan of a model on this machine. Loads no weights."""
    name = config.model or "the shipped model"
    try:
        from ...runtime.executor.backends import describe_attention, describe_small_steps
        from ...runtime.executor.device import apply_quantization, pick_device, pick_dtype
        from ...runtime.executor.executor import max_model_len
        from ...runtime.executor.memory import human_bytes, plan_memory
        from ...runtime.models.checkpoint import check_files
        from ...runtime.models.folder import model_folder
        from ...runtime.models.implementation import implementation_name, load_model_config
        from ...runtime.models.sampling_defaults import sampling_defaults
        from ...runtime.tokenizer.tokenizer import Tokenizer
    except (ImportError, OSError) as error:
        yield Finding("model", f"{name} was not checked: {error}", "broken", _pip("torch>=2.11,<2.15"))
        return
    try:
        folder = model_folder(config.model, weights=False, code=config.trust_remote_code)
        device = pick_device(config)
        shape = apply_quantization(config, load_model_config(config, folder), device)
        sampling_defaults(config, folder)
        longest = max_model_len(config, shape)
        batched = step_budget(config, gpu=device.type == "cuda")
        plan = plan_memory(config, shape, pick_dtype(config, shape, device), device, longest, batched)
        Tokenizer.load(folder)
        if config.load_format != "dummy" and not is_hub_id(config.model):
            check_files(folder)
    except HubUnreachable as error:
        yield Finding("model", str(error), "broken", f"branchwise pull {config.model}    (with a network)")
        return
    except LoadError as error:
        ours = "choose another model: branchwise doctor    (checks the one that ships with the package)"
        fix = ours if config.model else "install branchwise again: files of its model are missing or damaged"
        yield Finding("model", str(error), "broken", fix)
        return
    yield Finding("model", f"{name}: {shape.architecture}, {implementation_name(shape)}, in {folder}")
    yield Finding("attention", describe_attention(config, shape, device))
    if device.type == "cpu":
        yield Finding("compiled kernels", describe_small_steps(config))
    each = f", on each of {config.tensor_parallel_size} ranks" if config.tensor_parallel_size > 1 else ""
    yield Finding(
        "weights", f"{human_bytes(plan.weight_bytes)} of {human_bytes(plan.free_bytes)} free on {plan.device}{each}"
    )
    for what, size, how in plan.rows():
        if what.startswith("KV"):
            yield Finding(what, f"{size} = {how}" if what != "KV tokens" else f"{size} ({how})")
    whole = plan.kv_tokens // longest
    state: Literal["ok", "note"] = "ok" if whole else "note"
    fix = "" if whole else f"branchwise serve {config.model} --max-model-len {plan.kv_tokens}"
    yield Finding("context", f"{longest:,} tokens; {whole:,} requests of that length fit unshared", state, fix)
