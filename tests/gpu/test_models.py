"""Every family on the device against transformers, in bfloat16: as close to float32 as transformers itself comes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from branchwise import Engine, SamplingParams

FAMILIES_LEFT_OUT = {"llama-linear", "llama-sharded"}  # no other computation than those beside them
PROMPT = np.random.default_rng(0).integers(2, 300, 150).tolist()


def logprobs_of_transformers(folder: Path, dtype: torch.dtype) -> torch.Tensor:
    import transformers

    model: Any = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation="eager")
    with torch.no_grad():
        logits = model.cuda().eval()(torch.tensor([PROMPT]).cuda()).logits[0].float()
    return torch.log_softmax(logits, -1).cpu()


@pytest.mark.parametrize("graphs", [True, False])
@pytest.mark.parametrize("backend", ["flashinfer", "triton", "torch"])
def test_logprobs(family: str, backend: str, graphs: bool, gpu_checkpoint: Callable[[str], Path]) -> None:
    if backend == "flashinfer":
        pytest.importorskip("flashinfer")
    if backend == "torch" and graphs:
        pytest.skip("attention in torch is not captured")
    compare(gpu_checkpoint(family), attention_backend=backend, cuda_graphs=graphs)


@pytest.mark.parametrize(("family", "graphs"), [("cwm", True), ("afmoe", True), ("qwen3", False)])
def test_logprobs_of_what_transformers_computes(
    family: str,
    graphs: bool,
    gpu_checkpoint: Callable[[str], Path],
    caplog: pytest.LogCaptureFixture,
) -> None:
    """With windows, with experts, and a family of ours; all of them can be captured."""
    compare(gpu_checkpoint(family), model_impl="transformers", cuda_graphs=graphs)
    assert "run eagerly" not in caplog.text


def compare(folder: Path, **settings: Any) -> None:
    """Logprobs of tokens cold and warm, as close to float32 as transformers in bfloat16 comes."""
    exact = logprobs_of_transformers(folder, torch.float32)
    theirs = logprobs_of_transformers(folder, torch.bfloat16)
    with Engine(
        str(folder), device="cuda", dtype="bfloat16", kv_cache_tokens=4096, max_num_seqs=8, **settings
    ) as engine:
        # One request a position: what the step that samples (captured, where there are graphs) says of its last token.
        lengths = list(range(2, len(PROMPT), 7))
        params = SamplingParams(temperature=0, max_tokens=1, logprobs=5, ignore_eos=True)
        cold = [output.outputs[0] for output in engine.generate([PROMPT[:n] for n in lengths], params)]
        warm = [output.outputs[0] for output in engine.generate([PROMPT[:n] for n in lengths], params)]
        engine.check()
    rows = torch.tensor([n - 1 for n in lengths])
    allowed = 2.0 * (theirs[rows] - exact[rows]).abs().max().item() + 0.02
    for outputs in (cold, warm):
        for n, output in zip(lengths, outputs, strict=True):
            for token, logprob in output.logprobs[0].top:
                assert abs(logprob - exact[n - 1, token].item()) <= allowed, (n, token, allowed)
