"""Models that transformers computes with our attention, against transformers' own forward pass."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
import transformers

from branchwise import Engine, LoadError, SamplingParams
from branchwise.frontend.cli import checkup
from branchwise.kernels import ops
from branchwise.kernels.linear import linear_bytes
from branchwise.runtime.config import EngineConfig, check
from branchwise.runtime.models.config import ModelConfig
from branchwise.runtime.models.hf import library
from branchwise.runtime.models.hf.config import load_transformers_config
from branchwise.runtime.models.hf.norm import replace_norms
from branchwise.runtime.models.hf.survey import survey_listing
from branchwise.runtime.models.hf.trace import window_of
from branchwise.runtime.models.implementation import load_model_config

TOLERANCE = 1e-4
CPU = torch.device("cpu")
# Of `OTHERS` in checkpoints.py.
OTHERS = ["gpt2", "gpt-neox", "opt", "phi", "nemotron", "helium", "cwm", "vaultgemma"]
OTHERS += ["diffllama", "minicpm3", "afmoe", "granite-swa"]
PROMPT = np.random.default_rng(0).integers(4, 300, 40).tolist()
GREEDY = SamplingParams(temperature=0, max_tokens=64, ignore_eos=True)
SCHEMA = {"type": "object", "properties": {"city": {"enum": ["Paris", "Rome"]}}, "required": ["city"]}


def engine_of(folder: Path, **settings: Any) -> Engine:
    defaults = {"device": "cpu", "dtype": "float32", "kv_cache_tokens": 2048, "max_num_seqs": 8}
    return Engine(str(folder), **{**defaults, **settings})


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_the_table_is_the_recipes(checkpoints: Any) -> None:
    assert set(OTHERS) == set(checkpoints.OTHERS)


def continuation(model: Any, prompt: list[int], count: int) -> list[int]:
    """The greedy one of transformers."""
    settings = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0, "max_new_tokens": count}
    return model.generate(torch.tensor([prompt]), **settings)[0, len(prompt) :].tolist()


@pytest.mark.parametrize("family", [*OTHERS, "qwen3", "gemma2"])
def test_the_same_as_transformers(family: str, checkpoint: Callable[[str], Path]) -> None:
    """Logprobs of a prompt, 64 greedy tokens cold and warm, branches in one batch, and a grammar."""
    folder = checkpoint(family)
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    )
    with torch.no_grad():
        expected = torch.log_softmax(model(torch.tensor([PROMPT])).logits[0], -1)
        tokens = continuation(model, PROMPT, 64)
        branched = [[*PROMPT[:30], token, token + 1] for token in range(50, 54)]
        theirs = [continuation(model, one, 8) for one in branched]
    assert expected.std() > 0.3  # logits that say nothing would agree with anything
    with engine_of(folder, model_impl="transformers") as engine:
        scored = msgspec.structs.replace(GREEDY, max_tokens=1, prompt_logprobs=3)
        found = engine.generate(PROMPT, scored).prompt_logprobs
        for at in range(1, len(PROMPT)):
            assert abs(found[at].logprob - expected[at - 1, PROMPT[at]].item()) < TOLERANCE
            for token, logprob in found[at].top:
                assert abs(logprob - expected[at - 1, token].item()) < TOLERANCE
        for _ in range(2):
            assert list(engine.generate(PROMPT, GREEDY).token_ids) == tokens
        outputs = engine.generate(branched, msgspec.structs.replace(GREEDY, max_tokens=8))
        assert [list(output.token_ids) for output in outputs] == theirs
        with engine.branch(PROMPT) as branch:
            (fork,) = branch.fork()
            assert list(fork.generate(GREEDY).token_ids) == tokens
            fork.close()
        call = engine.generate(PROMPT, SamplingParams(temperature=1, seed=1, max_tokens=64, json_schema=SCHEMA))
        assert json.loads(call.text)["city"] in ("Paris", "Rome")
        engine.check()


def test_auto_takes_ours_where_it_can(
    checkpoint: Callable[[str], Path], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = EngineConfig()
    assert isinstance(load_model_config(config, checkpoint("qwen3")), ModelConfig)
    with caplog.at_level(logging.INFO):
        assert load_model_config(config, checkpoint("phi")).architecture == "PhiForCausalLM"
    (line,) = [record.getMessage() for record in caplog.records if "PhiForCausalLM" in record.getMessage()]
    assert "computed by transformers" in line
    with pytest.raises(LoadError, match="PhiForCausalLM is not supported natively"):
        load_model_config(EngineConfig(model_impl="native"), checkpoint("phi"))
    monkeypatch.setattr(library, "find_spec", lambda name: None)
    with pytest.raises(LoadError, match=r"PhiForCausalLM is not supported natively.*pip install 'transformers>=5.0'"):
        load_model_config(config, checkpoint("phi"))
    with pytest.raises(LoadError, match=r"pip install 'transformers>=5.0'"):
        load_model_config(EngineConfig(model_impl="transformers"), checkpoint("qwen3"))


def test_an_old_version_is_refused(checkpoint: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library.metadata, "version", lambda name: "4.57.1")
    with pytest.raises(LoadError, match=r"needs transformers 5.0 or newer, not 4.57.1"):
        load_model_config(EngineConfig(model_impl="transformers"), checkpoint("phi"))


def test_deterministic_is_refused(checkpoint: Callable[[str], Path]) -> None:
    with pytest.raises(LoadError, match="--deterministic cannot"):
        check(EngineConfig(model_impl="transformers", deterministic=True))
    with pytest.raises(LoadError, match="--deterministic: not with"):
        load_model_config(EngineConfig(deterministic=True), checkpoint("phi"))


_SMALL = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 300,
}


@pytest.mark.parametrize(
    ("config", "values", "reason"),
    [
        ("BertConfig", {}, "not causal"),
        ("Lfm2Config", {"layer_types": ["conv", "full_attention"]}, "layers of conv, and pages hold"),
        ("MambaConfig", {}, "layers of linear_attention, and pages hold"),
        ("FalconConfig", {"alibi": True}, "not marked in transformers as compatible"),
        ("Gemma4TextConfig", {"global_head_dim": 32, "head_dim": 16}, "its layers have different heads"),
        ("T5Config", {}, "no causal language model"),
        ("LlamaConfig", {"architectures": ["LlamaForSequenceClassification"]}, "is not what transformers makes of"),
        ("DogeConfig", {}, "cannot be traced without weights"),
        ("RwkvConfig", {}, "not marked in transformers"),
    ],
)
def test_what_is_refused_and_why(config: str, values: dict[str, Any], reason: str, tmp_path: Path) -> None:
    """Each in one line, without weights."""
    getattr(transformers, config)(**{**_SMALL, **values}).save_pretrained(tmp_path)
    with pytest.raises(LoadError, match=reason) as raised:
        load_transformers_config(tmp_path)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("sees", "window"),
    [
        (lambda b, h, q, kv: kv <= q, None),
        (lambda b, h, q, kv: (kv <= q) & (kv > q - 2), 2),
        (lambda b, h, q, kv: (kv <= q) & (kv > q - 4096), 4096),
        (lambda b, h, q, kv: (kv <= q) & (kv // 8192 == q // 8192), "in chunks"),
        (lambda b, h, q, kv: kv >= 0, "not causal"),
        (lambda b, h, q, kv: (kv <= q) & (kv % 2 == 0), "not causal"),
        (lambda b, h, q, kv: torch.zeros(1, 8)[b, q] > kv, "more than positions"),
    ],
)
def test_windows_are_read_from_masks(sees: Callable[..., Any], window: int | str | None) -> None:
    if isinstance(window, str):
        with pytest.raises(LoadError, match=window):
            window_of(library.MaskFunction(sees))
    else:
        assert window_of(library.MaskFunction(sees)) == window


def test_a_state_that_nothing_declares_is_found_at_load(
    checkpoint: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A step that mixes tokens by something else than attention gives other results for other chunks."""
    from transformers.models.llama import modeling_llama

    forward = modeling_llama.LlamaMLP.forward
    monkeypatch.setattr(modeling_llama.LlamaMLP, "forward", lambda self, x: forward(self, x.cumsum(1)))
    with pytest.raises(LoadError, match="depends on how its prompt is cut into steps"):
        engine_of(checkpoint("llama-gqa"), model_impl="transformers")


def test_a_missing_tensor_and_a_damaged_one_are_refused(checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = tmp_path / "phi"
    shutil.copytree(checkpoint("phi"), folder)
    tensors = load_file(folder / "model.safetensors")
    name = "model.layers.1.mlp.fc1.weight"
    save_file(
        {**tensors, name: torch.full_like(tensors[name], torch.nan)}, folder / "model.safetensors", {"format": "pt"}
    )
    with pytest.raises(LoadError, match=f"tensor {name} holds NaN"):
        engine_of(folder)
    del tensors[name]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(LoadError, match=f"no {name}: it is incomplete"):
        engine_of(folder)


def test_quantized_checkpoints_are_refused(checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    raw = json.loads((checkpoint("phi") / "config.json").read_text())
    quantized = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}
    (tmp_path / "config.json").write_text(json.dumps({**raw, "quantization_config": quantized}))
    with pytest.raises(LoadError, match="quantized checkpoints are not read with --model-impl transformers"):
        load_transformers_config(tmp_path)


def test_weights_are_quantized_and_counted(checkpoint: Callable[[str], Path]) -> None:
    folder = checkpoint("phi")
    config = load_transformers_config(folder)
    gpu = torch.device("cuda")
    loaded = sum(one.numel() for one in transformers.AutoModelForCausalLM.from_pretrained(folder).parameters())
    plain = config.weight_bytes(torch.bfloat16, gpu, int8=False, fp8=False)
    assert plain == 2 * loaded
    int8 = config.weight_bytes(torch.bfloat16, gpu, int8=True, fp8=False)
    linears = [one.shape for one in config.parameters if one.linear]
    assert int8 == plain + sum(
        linear_bytes(gpu, shape, torch.bfloat16, int8=True) - 2 * shape[0] * shape[1] for shape in linears
    )
    halves = load_transformers_config(folder, 2)
    assert halves.weight_bytes(torch.bfloat16, gpu, int8=False, fp8=False) < 0.75 * plain
    exact = engine_of(folder).generate(PROMPT, msgspec.structs.replace(GREEDY, max_tokens=1, prompt_logprobs=0))
    for quantization in ("fp8", "int8"):
        if quantization == "int8" and not torch.cpu._is_vnni_supported():
            continue
        with engine_of(folder, quantization=quantization) as engine:
            found = engine.generate(PROMPT, msgspec.structs.replace(GREEDY, max_tokens=1, prompt_logprobs=0))
        pairs = [(exact.prompt_logprobs[at], found.prompt_logprobs[at]) for at in range(1, len(PROMPT))]
        errors = [abs(a.logprob - b.logprob) for a, b in pairs]
        assert max(errors) > 1e-4 and np.mean(errors) < 0.3, quantization


def test_dummy_weights_are_the_same_for_the_same_seed(checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        shutil.copy(checkpoint("gpt2") / name, tmp_path)
    outputs = []
    for seed in (1, 1, 2):
        with engine_of(tmp_path, load_format="dummy", seed=seed) as engine:
            outputs.append(list(engine.generate(PROMPT, GREEDY).token_ids))
    assert outputs[0] == outputs[1] != outputs[2]


def test_longrope_keeps_its_short_factors(checkpoint: Callable[[str], Path]) -> None:
    """Otherwise the keys of a whole context would change as it grows."""
    assert load_transformers_config(checkpoint("phi3")).max_model_len == 256


@pytest.mark.parametrize(
    ("family", "replaced"),
    [("qwen3", 13), ("gemma2", 13), ("helium", 7), ("vaultgemma", 7), ("phi", 0), ("gpt2", 0)],  # 0: LayerNorm
)
def test_norms_that_are_ours_are_replaced(family: str, replaced: int, checkpoint: Callable[[str], Path]) -> None:
    """With and without Gemma's offset; what is another computation stays: `test_the_same_as_transformers`."""
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(checkpoint(family), dtype=torch.float32)
    with torch.inference_mode():
        assert replace_norms(model, ops) == replaced


def test_a_norm_that_computes_something_else_stays(checkpoint: Callable[[str], Path]) -> None:
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(checkpoint("qwen3"), dtype=torch.float32)
    kind = type(model.model.norm)
    model.model.norm.__class__ = type("OtherRMSNorm", (kind,), {"forward": lambda self, x: 2 * kind.forward(self, x)})
    with torch.inference_mode():
        assert replace_norms(model, ops) == 12


def test_the_survey_says_of_each_why_not(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.models.auto import modeling_auto

    some = {"phi": "PhiForCausalLM", "bert": "BertLMHeadModel", "llama": "LlamaForCausalLM", "rwkv": "RwkvForCausalLM"}
    monkeypatch.setattr(modeling_auto, "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES", some)
    lines = survey_listing().splitlines()
    assert lines[0] == "- Computed by transformers: Phi"
    assert any("not causal" in line and line.endswith(": BertLMHeadModel") for line in lines)
    assert any("not marked in transformers" in line and line.endswith(": Rwkv") for line in lines)
    assert len(lines) == 3  # Llama is ours


def test_code_of_a_model_runs_only_when_it_is_trusted(checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(checkpoint("llama-gqa"), folder)
    ran = tmp_path / "ran"
    (folder / "configuration_twin.py").write_text(
        f"import pathlib\npathlib.Path({str(ran)!r}).touch()\n"
        "from transformers import LlamaConfig\nclass TwinConfig(LlamaConfig):\n    model_type = 'twin'\n"
    )
    (folder / "modeling_twin.py").write_text(
        "from transformers import LlamaForCausalLM\nfrom .configuration_twin import TwinConfig\n"
        "class TwinForCausalLM(LlamaForCausalLM):\n    config_class = TwinConfig\n"
    )
    raw = json.loads((folder / "config.json").read_text())
    code = {"AutoConfig": "configuration_twin.TwinConfig", "AutoModelForCausalLM": "modeling_twin.TwinForCausalLM"}
    raw |= {"model_type": "twin", "architectures": ["TwinForCausalLM"], "auto_map": code}
    (folder / "config.json").write_text(json.dumps(raw))
    with pytest.raises(LoadError, match=r"it needs the code in its folder.*--trust-remote-code") as raised:
        engine_of(folder)
    assert "\n" not in str(raised.value) and not ran.exists()
    with engine_of(checkpoint("llama-gqa")) as engine:
        expected = engine.generate(PROMPT, GREEDY).token_ids
    with engine_of(folder, trust_remote_code=True) as engine:
        assert engine.generate(PROMPT, GREEDY).token_ids == expected
    assert ran.exists()


def test_doctor_names_who_computes(checkpoint: Callable[[str], Path]) -> None:
    for family, said in (("phi", "computed by transformers"), ("qwen3", "served natively")):
        found = {one.what: one for one in checkup.model(EngineConfig(model=str(checkpoint(family)), device="cpu"))}
        assert said in found["model"].found and not any(one.state == "broken" for one in found.values())
