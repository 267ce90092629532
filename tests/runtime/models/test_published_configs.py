"""config.json of the best-known checkpoint of each architecture, as it is published: it loads, and has as many weights.

``weights``: parameters that transformers 5.23 makes of the same config (routers' score biases included, which are
buffers there). ``context``: tokens. ``refused``: what is said of a model that is not served. The factors of LongRoPE
are not the published ones.
"""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from branchwise.frontend.cli import checkup
from branchwise.runtime.config import EngineConfig
from branchwise.runtime.errors import LoadError
from branchwise.runtime.executor.memory import kv_layout
from branchwise.runtime.models.config import UnsupportedArchitecture, load_config
from branchwise.runtime.models.folder import SHIPPED
from branchwise.runtime.models.hf.config import load_transformers_config
from branchwise.runtime.models.registry import ALIASES, ARCHITECTURES
from branchwise.runtime.models.weights import weight_specs

LINES = Path(__file__).with_name("published_configs.jsonl").read_text(encoding="utf-8").splitlines()
PUBLISHED: dict[str, dict[str, Any]] = {one["id"]: one for one in map(json.loads, LINES)}


@pytest.fixture(params=PUBLISHED)
def published(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[dict[str, Any], Path]:
    found = PUBLISHED[request.param]
    (tmp_path / "config.json").write_text(json.dumps(found["config"]))
    return found, tmp_path


def test_it_loads_with_as_many_weights(published: tuple[dict[str, Any], Path]) -> None:
    found, folder = published
    if found["context"] is None:
        pytest.skip("not ours: see the next test")
    config = load_config(folder)
    assert config.max_model_len == found["context"]
    weights = sum(math.prod(spec.shape) for spec in weight_specs(config) if spec.kind != "scale")
    assert found["weights"] is None or weights == found["weights"]


def test_doctor_has_a_line_for_it(published: tuple[dict[str, Any], Path]) -> None:
    """What it says may be that the model does not fit here, or is refused: never a traceback."""
    found, folder = published
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(SHIPPED / name, folder)
    config = EngineConfig(model=str(folder), device="cpu", load_format="dummy", kv_cache_tokens=64, max_model_len=64)
    findings = {one.what: one for one in checkup.model(config)}
    model = findings["model"]
    if found["context"] is None:
        assert model.state == "broken" and found["refused"] in model.found
    elif model.state == "broken":
        assert "memory" in model.found
    assert all("\n" not in one.found for one in findings.values())


def test_an_embedding_model_is_refused(tmp_path: Path) -> None:
    """EmbeddingGemma: its architectures name Gemma 3's base model, and its attention is bidirectional."""
    config = PUBLISHED["google/gemma-3-270m-it"]["config"] | {"architectures": ["Gemma3TextModel"]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert load_config(tmp_path).architecture == "Gemma3ForCausalLM"
    (tmp_path / "config.json").write_text(json.dumps(config | {"use_bidirectional_attention": True}))
    with pytest.raises(LoadError, match="its attention is not causal: an embedding model cannot generate text"):
        load_config(tmp_path)


def test_a_model_with_code_of_its_own_names_the_flag_that_runs_it(tmp_path: Path) -> None:
    """Llama Nemotron Super, EXAONE 3.5, MiniCPM 4, Kimi K2 and others."""
    config = {"model_type": "nemotron-nas", "auto_map": {"AutoConfig": "configuration_decilm.DeciLMConfig"}}
    (tmp_path / "config.json").write_text(json.dumps(config | {"architectures": ["DeciLMForCausalLM"]}))
    with pytest.raises(LoadError, match="it needs the code in its folder, which runs with --trust-remote-code"):
        load_transformers_config(tmp_path)


def test_yarn_with_the_temperature_of_its_authors_code(tmp_path: Path) -> None:
    """DeepSeek-R1-0528-Qwen3-8B undoes the temperature of transformers, 0.1 ln 4 + 1, by another key."""
    config = PUBLISHED["deepseek-ai/DeepSeek-R1-0528-Qwen3-8B"]["config"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    (rope,) = load_config(tmp_path).ropes
    assert (rope.kind, rope.factor, rope.attention_factor) == ("yarn", 4.0, pytest.approx(1.0))


def test_granite_4_with_mamba_layers_is_left_to_transformers(tmp_path: Path) -> None:
    config = PUBLISHED["ibm-granite/granite-4.0-micro"]["config"]
    for changes in ({"layer_types": ["mamba"] * 39 + ["attention"]}, {"layer_types": None}, {"num_local_experts": 62}):
        (tmp_path / "config.json").write_text(json.dumps(config | changes))
        with pytest.raises(UnsupportedArchitecture, match="not supported natively"):
            load_config(tmp_path)


def test_latent_attention_stores_the_keys_and_values_of_every_head(tmp_path: Path) -> None:
    """The figures of docs/models.md: DeepSeek V3's bytes of a token in bfloat16, and what its latents would take."""
    config = {key: value for key, value in PUBLISHED["deepseek-ai/DeepSeek-V3"]["config"].items() if key != "auto_map"}
    del config["quantization_config"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    model = load_transformers_config(tmp_path)
    layout = kv_layout(EngineConfig(), model, torch.bfloat16, None)
    assert (model.num_kv_heads, model.head_dim, model.value_dim) == (128, 192, 128)
    assert layout.token_bytes == 61 * 128 * 2 * 192 * 2 and f"{layout.token_bytes / 2**20:.1f}" == "5.7"
    assert f"{61 * (config['kv_lora_rank'] + config['qk_rope_head_dim']) * 2 / 1024:.0f}" == "69"


def test_every_architecture_is_there() -> None:
    names = {one["config"]["architectures"][0] for one in PUBLISHED.values()}
    assert {ALIASES.get(name, name) for name in names} >= set(ARCHITECTURES) - _UNPUBLISHED


# No checkpoint of the first is well known; Ministral 3 is published inside Mistral3ForConditionalGeneration.
_UNPUBLISHED = {"GraniteMoeSharedForCausalLM", "Ministral3ForCausalLM"}
