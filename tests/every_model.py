"""Every causal language model of the installed transformers, as a tiny random checkpoint: who serves it, and does it
say what transformers says?

    python tests/every_model.py > verdicts.jsonl           # a line each; a quarter of an hour
    python tests/every_model.py phi gemma4_text            # some model types
    python tests/every_model.py --write docs/models.md < verdicts.jsonl

Each config class's defaults are made small, a model is initialized, saved, loaded with ``--model-impl auto``, and 16
greedy tokens after 40 are compared with transformers' ``generate``, cold and warm. Where no small model can be made,
the default config is asked whether it is refused. `test_every_model.py` runs a sample.
"""

from __future__ import annotations

import argparse
import re
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any, Literal

import msgspec
import torch
import transformers

from branchwise import Engine, LoadError, SamplingParams
from branchwise.runtime.config import EngineConfig
from branchwise.runtime.models.config import ModelConfig
from branchwise.runtime.models.implementation import load_model_config

sys.path.insert(0, str(Path(__file__).parent))
import checkpoints

LARGEST = 20_000_000  # weights of a checkpoint; most have 0.2 million
TOKENS = 16
PROMPT = [(37 * i) % 290 + 5 for i in range(40)]
LAYERS = 3
MARK = "every model"

# Small values by the names that configs give them. Only names that a config has are set.
SMALL: dict[str, Any] = {
    **dict.fromkeys(
        ["hidden_size", "n_embd", "d_model", "model_dim", "dim", "embedding_size", "word_embed_proj_dim"], 64
    ),
    **dict.fromkeys(["intermediate_size", "ffn_dim", "ffn_hidden_size", "n_inner", "d_ff"], 112),
    **dict.fromkeys(["num_hidden_layers", "n_layer", "num_layers", "n_layers", "decoder_layers"], LAYERS),
    **dict.fromkeys(["num_attention_heads", "n_head", "num_heads", "n_heads", "decoder_attention_heads"], 4),
    **dict.fromkeys(["num_key_value_heads", "num_kv_heads"], 2),
    **dict.fromkeys(["head_dim", "d_kv", "attention_head_dim"], 16),
    **dict.fromkeys(["max_position_embeddings", "n_positions", "max_seq_len", "max_sequence_length"], 512),
    **dict.fromkeys(["moe_intermediate_size", "shared_expert_intermediate_size", "expert_ffn_hidden_size"], 48),
    **dict.fromkeys(["num_experts", "n_routed_experts", "num_local_experts", "moe_num_experts"], 8),
    **dict.fromkeys(["num_experts_per_tok", "moe_k", "moe_topk", "num_experts_per_token"], 2),
    **dict.fromkeys(
        ["n_group", "topk_group", "first_k_dense_replace", "moe_num_shared_experts", "n_shared_experts"], 1
    ),
    **dict.fromkeys(["bos_token_id", "eos_token_id", "pad_token_id"], 0),
    "vocab_size": 0,  # that of the tokenizer
    "vocab_size_per_layer_input": 0,
    "q_lora_rank": 24,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "qk_head_dim": 24,
    "v_head_dim": 16,
    "rotary_dim": 8,
    "sliding_window": 24,
    "attention_window_size": 24,
    "initializer_range": 0.12,
    "hidden_size_per_layer_input": 16,
    "num_kv_shared_layers": 0,
    "shared_intermediate_size": 80,
    "max_window_layers": 1,
    "dim_model_base": 32,
    "num_global_key_value_heads": 2,
    "global_head_dim": 16,
}
# Of these, defaults may be None.
ALWAYS = {"head_dim", "num_key_value_heads", "n_routed_experts", "num_experts_per_tok", "n_shared_experts"}
LATENT = {"head_dim": 8, "num_key_value_heads": 4}  # of multi-head latent attention
# What a default config leaves out and published checkpoints have.
VALUES: dict[str, dict[str, Any]] = {
    "minimax_m3_vl_text": {"layer_types": ["full_attention", "minimax_m3_sparse", "minimax_m3_sparse"]},
}


class Verdict(msgspec.Struct, frozen=True):
    """What became of one model type.

    ``served``: by whom; None: it is refused, or ``untried``: transformers itself does not run it. ``reason``: of that;
    for a model that is served, the tokens where they are not transformers'.
    """

    kind: str
    name: str  # the model's class
    served: Literal["native", "transformers"] | None
    reason: str = ""
    untried: bool = False


def model_types() -> dict[str, str]:
    """Model type to the class of its causal language model, for each class once."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    found = {}
    for kind, names in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.items():
        found.setdefault(names if isinstance(names, str) else names[0], kind)
    return {kind: name for name, kind in found.items()}


def small(values: dict[str, Any], vocab_size: int) -> dict[str, Any]:
    """``values`` of a config with the sizes of `SMALL`, also in configs within it."""
    made: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, dict) and "model_type" in value:
            made[name] = small(value, vocab_size)
        elif name in ("vocab_size", "vocab_size_per_layer_input"):
            made[name] = vocab_size
        elif name in LATENT and "qk_rope_head_dim" in values:
            made[name] = LATENT[name]
        elif name in SMALL and (value is not None or name in ALWAYS) and not isinstance(value, list | bool):
            made[name] = SMALL[name]
        elif name in ("layer_types", "layers_block_type", "mlp_layer_types", "block_types") and isinstance(value, list):
            kinds = list(dict.fromkeys(value))  # each kind of layer, however many layers lie between
            made[name] = [*kinds, *[kinds[-1]] * LAYERS][:LAYERS]
        elif name == "per_layer_config" and value:
            made[name] = {LAYERS - 1: next(iter(value.values()))}
        elif isinstance(value, list) and len(value) == values.get("num_hidden_layers"):
            made[name] = value[:LAYERS]
        else:
            made[name] = value
    return made


def save(kind: str, folder: Path) -> str:
    """A checkpoint of model type ``kind``; returns the model's class. Raises what transformers raises."""
    vocab_size = checkpoints.write_tokenizer(folder)
    config_class = transformers.AutoConfig.for_model(kind).__class__
    config = config_class.from_dict({**small(config_class().to_dict(), vocab_size), **VALUES.get(kind, {})})
    with torch.device("meta"):
        count = sum(one.numel() for one in transformers.AutoModelForCausalLM.from_config(config).parameters())
    if count > LARGEST:
        raise ValueError(f"{count / 1e6:.0f} million weights remain")
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager", dtype=torch.float32)
    checkpoints.sharpen(model, seed=sum(kind.encode()))
    model.save_pretrained(folder)
    return type(model).__name__


def refusal(folder: Path) -> str | None:
    """Why config.json is not served."""
    try:
        load_model_config(EngineConfig(), folder)
    except LoadError as error:
        return reason(error, folder)
    return None


def reason(error: Exception, folder: Path) -> str:
    """One line of it, without the folder."""
    line = (str(error).splitlines() or [""])[0].replace(f"{folder}/config.json: ", "")
    return line if isinstance(error, LoadError) else f"{type(error).__name__}: {line[:120]}"


def expected_tokens(folder: Path) -> list[int]:
    """transformers' greedy continuation of `PROMPT`. Without its cache, which for some models is shorter than what
    their layers attend to (Moshi)."""
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    settings = {
        "do_sample": False,
        "eos_token_id": None,
        "pad_token_id": 0,
        "max_new_tokens": TOKENS,
        "use_cache": False,
    }
    with torch.no_grad():
        found: list[int] = model.generate(torch.tensor([PROMPT]), **settings)[0, len(PROMPT) :].tolist()
    return found


def verdict(kind: str, name: str) -> Verdict:
    """Makes, serves and compares one model type."""
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        try:
            name = save(kind, folder)
            expected = expected_tokens(folder)
        except Exception as error:
            problem = reason(error, folder)
            if not (folder / "config.json").is_file():  # a config of other sizes is at fault: are the defaults refused?
                try:
                    transformers.AutoConfig.for_model(kind, architectures=[name]).save_pretrained(folder)
                except Exception as other:
                    return Verdict(kind, name, None, reason(other, folder), True)
            refused = refusal(folder)
            return Verdict(kind, name, None, refused or problem, refused is None)
        if (refused := refusal(folder)) is not None:
            return Verdict(kind, name, None, refused)
        config = load_model_config(EngineConfig(), folder)
        served: Any = "native" if isinstance(config, ModelConfig) else "transformers"
        try:
            with Engine(folder, device="cpu", dtype="float32", kv_cache_tokens=1024, max_num_seqs=2) as engine:
                params = SamplingParams(temperature=0, max_tokens=TOKENS, ignore_eos=True)
                found = [list(engine.generate(PROMPT, params).token_ids) for _ in range(2)]
        except LoadError as error:
            return Verdict(kind, name, None, reason(error, folder))
        return Verdict(kind, name, served, "" if found == [expected] * 2 else f"other tokens: {found} for {expected}")


def listing(verdicts: list[Verdict]) -> str:
    """The verdicts as lines of Markdown."""

    def names(chosen: list[Verdict]) -> str:
        return ", ".join(sorted({one.name.removesuffix("ForCausalLM") for one in chosen}))

    served = {who: [one for one in verdicts if one.served == who] for who in ("native", "transformers")}
    lines = [
        f"- The same tokens, by our decoder: {names(served['native'])}",
        f"- The same tokens, computed by transformers: {names(served['transformers'])}",
    ]
    groups: dict[str, list[Verdict]] = {}
    for one in verdicts:
        if one.served is None and not one.untried:
            groups.setdefault(_shared_reason(one), []).append(one)
    for why, chosen in sorted(groups.items(), key=lambda group: (-len(group[1]), group[0])):
        lines.append(f"- Refused, {why}: {names(chosen)}")
    if untried := [one for one in verdicts if one.untried]:
        lines.append(f"- Not tried, since transformers does not run the model that its defaults make: {names(untried)}")
    wrong = [one.kind for one in verdicts if one.served and one.reason]
    if wrong:
        raise ValueError(f"other tokens than transformers': {', '.join(wrong)}")
    return "\n".join(lines)


def _shared_reason(verdict: Verdict) -> str:
    """The reason without what is of this model alone."""
    why = verdict.reason.partition(f"{transformers.__version__}: ")[2] or verdict.reason.replace(
        verdict.name, "its class"
    )
    for pattern, kept in _SHARED:
        if re.search(pattern, why):
            return kept
    return why


_SHARED = [
    ("it has layers of .*, and pages", "its layers keep another state than keys and values, or select among them"),
    ("^it keeps a recurrent state", "its layers keep another state than keys and values, or select among them"),
    ("^its layers have different heads", "its layers have different heads, and a page has the same in all layers"),
    ("^transformers has no causal language model", "transformers has no causal language model of its config"),
    ("^its attention is not causal", "its attention is not causal"),
    ("cannot be traced without weights", "its forward pass cannot be traced without weights"),
    ("cannot build the model|cannot read it", "transformers cannot build the model of its own defaults"),
]


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kinds", nargs="*", metavar="MODEL_TYPE")
    parser.add_argument("--write", type=Path, metavar="PAGE", help="write the verdicts of the input to a page")
    args = parser.parse_args()
    if args.write:
        verdicts = [msgspec.json.decode(line, type=Verdict) for line in sys.stdin.buffer]
        begin, end = f"<!-- figures: {MARK} -->\n", "\n<!-- /figures -->"
        before, rest = args.write.read_text(encoding="utf-8").split(begin)
        after = rest[rest.index(end) :]
        args.write.write_text(before + begin + listing(verdicts) + after, encoding="utf-8")
        return
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    every = model_types()
    for kind in args.kinds or every:
        print(msgspec.json.encode(verdict(kind, every.get(kind, kind))).decode(), flush=True)


if __name__ == "__main__":
    main()
