"""Only the first process that needs FlashInfer's kernels compiles them; without a compiler, Triton serves."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("flashinfer")

# Stands for nvcc and for the linker: says that it ran, makes an empty library in no time, and lists what it read.
COMPILER = """#!/usr/bin/env python3
import subprocess, sys
from pathlib import Path

arguments = sys.argv[1:]
after = lambda flag: arguments[arguments.index(flag) + 1] if flag in arguments else None
out, source, dependencies = after("-o"), after("-c"), after("-MF")
with open(Path(__file__).parent / "runs", "a") as runs:
    print(out, file=runs)
name = "x" + "".join(filter(str.isalnum, Path(out).name))
subprocess.run(["cc", "-shared", "-fPIC", "-x", "c", "-", "-o", out], input=f"int {name};", text=True, check=True)
if dependencies:
    Path(dependencies).write_text(f"{out}: {source}\\n")
"""

PROGRAM = """
import torch
from branchwise.kernels.attention.flashinfer_module import Variant, _load, build

variants = [Variant("fa2", torch.bfloat16, 64), Variant("fa2", torch.bfloat16, 64, softcap=True)]
build(variants)
for variant in variants:
    _load(variant)
"""


def test_a_second_process_compiles_nothing(tmp_path: Path) -> None:
    """`build_jit_specs` and `build_and_load` run ninja in different folders, and each considers the other's output
    stale: a server that used both compiled everything twice at every start."""
    compiler, runs = tmp_path / "compiler", tmp_path / "runs"
    compiler.write_text(COMPILER)
    compiler.chmod(0o755)
    environment = os.environ | {
        "FLASHINFER_WORKSPACE_BASE": str(tmp_path),
        "FLASHINFER_NVCC": str(compiler),
        "CXX": str(compiler),
    }
    counts, told = [], []
    for _ in range(3):
        runs.write_text("")
        command = [sys.executable, "-c", PROGRAM]
        said = subprocess.run(command, env=environment, stderr=subprocess.PIPE, text=True, check=True, timeout=240)
        told.append("compiling FlashInfer's attention kernels" in said.stderr)
        outputs = runs.read_text().splitlines()
        assert len(outputs) == len(set(outputs)), "something was compiled twice"
        counts.append(len(outputs))
    assert counts[0] > 10
    assert counts[1:] == [0, 0]
    assert told == [True, False, False], "who waits for a compiler should know"


def test_no_compiler_is_a_reason_not_a_crash(tmp_path: Path) -> None:
    """Most machines have PyTorch's CUDA libraries and no nvcc: there Triton serves."""
    program = f"""
from branchwise.kernels.attention.flashinfer_module import Unavailable
try:
    {PROGRAM.strip().replace(chr(10), chr(10) + "    ")}
except Unavailable as error:
    print(error)
"""
    environment = os.environ | {"FLASHINFER_WORKSPACE_BASE": str(tmp_path), "FLASHINFER_NVCC": str(tmp_path / "nvcc")}
    said = subprocess.run(
        [sys.executable, "-c", program], env=environment, stdout=subprocess.PIPE, text=True, check=True
    )
    assert "needs CUDA's nvcc" in said.stdout
    assert str(tmp_path / "nvcc") in said.stdout, "and what the shell said"
