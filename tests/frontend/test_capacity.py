"""``branchwise doctor --device-memory``: the capacity of a model on GPUs that are not here."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from branchwise.frontend.cli.capacity import fitting_requests, lines
from branchwise.runtime.config import EngineConfig, parse_bytes
from branchwise.runtime.errors import LoadError

LLAMA_70B = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 128256,
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
}


@pytest.mark.parametrize(
    ("text", "count"), [("80GiB", 80 << 30), (" 80 GB", 80 * 10**9), ("1.5gib", 3 << 29), ("7", 7)]
)
def test_sizes(text: str, count: int) -> None:
    assert parse_bytes(text, "--device-memory") == count


@pytest.mark.parametrize("text", ["", "80 gigs", "-1GiB", "GiB", "1e9"])
def test_a_size_that_is_none(text: str) -> None:
    with pytest.raises(LoadError, match=r"--device-memory .* is not a size: write it like"):
        parse_bytes(text, "--device-memory")


def test_requests_share_what_they_share() -> None:
    assert fitting_requests(10_000, 1000, 0) == 10
    assert fitting_requests(10_000, 1000, 500) == 19
    assert fitting_requests(400, 1000, 500) == 0
    with pytest.raises(LoadError, match="must be less than the 1000 tokens"):
        fitting_requests(10_000, 1000, 1000)


def test_a_model_of_70_billion_parameters_on_two_gpus(tmp_path: Path) -> None:
    """The claim that FP8 keys and values double the requests: (pool - shared) / (request - shared)."""
    (tmp_path / "config.json").write_text(json.dumps(LLAMA_70B))
    found = {}
    for choice in ("auto", "fp8", "int4"):
        config = EngineConfig(
            model=str(tmp_path),
            quantization="fp8",
            kv_cache_dtype=choice,  # type: ignore[arg-type]
            tensor_parallel_size=2,
            max_model_len=8192,
            gpu_memory_utilization=0.94,
        )
        text = "\n".join(lines(config, "80GiB", 8192, 6144))
        tokens = int(re.search(r"KV tokens\s+([\d,]+)", text)[1].replace(",", ""))  # type: ignore[index]
        requests = int(re.search(r"^(\d+) requests of 8,192 tokens, 6,144 of them shared", text, re.MULTILINE)[1])  # type: ignore[index]
        assert requests == (tokens - 6144) // 2048 and "2 GPUs" in text
        found[choice] = tokens, requests
    assert 1.96 < found["fp8"][0] / found["auto"][0] < 1.98 and found["int4"][0] / found["auto"][0] > 3.5
    assert found["auto"][1] > 110 and found["fp8"][1] > 220
