"""The model that comes with the package, so that a first try needs no download.

Where a trained model ships as package data (``runtime/models/shipped/``) it is that. Otherwise a small Llama with
random weights and a real byte-level BPE tokenizer is built once, in about a second, into the user's cache folder: its
answers are gibberish, but every part that serves it is the real one. No torch: the scheduler need not be up to have it.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import LoadError

VERSION = "random-llama-1"  # part of the folder's name: a changed recipe never meets an old folder
VOCABULARY = 2048  # at most: merges end when the text has no more to teach
BOS, EOS, START, END = "<|bos|>", "<|eos|>", "<|im_start|>", "<|im_end|>"

CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 256,
    "intermediate_size": 768,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "attention_bias": False,
    "mlp_bias": False,
    "torch_dtype": "float32",
    "bos_token_id": 0,
    "eos_token_id": 1,
}

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def shipped_model() -> Path:
    """The folder of the shipped model; builds it on first use. `LoadError` if the cache folder cannot be written."""
    packaged = Path(__file__).parent / "shipped"
    if (packaged / "config.json").is_file():
        return packaged
    folder = _cache_home() / "branchwise" / "models" / VERSION
    if not (folder / "config.json").is_file():
        try:
            _build_atomically(folder)
        except OSError as error:
            raise LoadError(f"cannot build the shipped model in {folder}: {error}; set XDG_CACHE_HOME") from error
    return folder


def _cache_home() -> Path:
    configured = Path(os.environ.get("XDG_CACHE_HOME", ""))
    return configured if configured.is_absolute() else Path.home() / ".cache"


def _build_atomically(folder: Path) -> None:
    """Builds beside ``folder`` and renames: another process sees a whole model or none. The first to rename wins."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        build(scratch)
        scratch.chmod(0o755)
        scratch.rename(folder)
    except OSError:
        if not (folder / "config.json").is_file():
            raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def build(folder: Path) -> None:
    """Writes the random checkpoint into ``folder``: the same bytes every time."""
    from safetensors.numpy import save_file

    vocab_size = _write_tokenizer(folder)
    save_file(_random_weights(vocab_size), str(folder / "model.safetensors"), metadata={"format": "pt"})
    (folder / "generation_config.json").write_text(json.dumps({"bos_token_id": 0, "eos_token_id": [1, 3]}))
    (folder / "config.json").write_text(json.dumps(CONFIG | {"vocab_size": vocab_size}, indent=1))


def _random_weights(vocab_size: int) -> dict[str, np.ndarray]:
    """Normal weights of deviation 1/sqrt(fan-in) from a fixed seed, under the names `transformers` gives them."""
    rng = np.random.default_rng(20_261_123)
    hidden, inner, head = CONFIG["hidden_size"], CONFIG["intermediate_size"], CONFIG["head_dim"]
    queries, keys = CONFIG["num_attention_heads"] * head, CONFIG["num_key_value_heads"] * head

    def matrix(rows: int, columns: int) -> np.ndarray:
        return rng.standard_normal((rows, columns), dtype=np.float32) / np.float32(np.sqrt(columns))

    weights = {
        "model.embed_tokens.weight": matrix(vocab_size, hidden),
        "model.norm.weight": np.ones(hidden, np.float32),
        "lm_head.weight": matrix(vocab_size, hidden),
    }
    for layer in range(CONFIG["num_hidden_layers"]):
        shapes = {
            "self_attn.q_proj": (queries, hidden),
            "self_attn.k_proj": (keys, hidden),
            "self_attn.v_proj": (keys, hidden),
            "self_attn.o_proj": (hidden, queries),
            "mlp.gate_proj": (inner, hidden),
            "mlp.up_proj": (inner, hidden),
            "mlp.down_proj": (hidden, inner),
        }
        prefix = f"model.layers.{layer}."
        weights |= {f"{prefix}{name}.weight": matrix(*shape) for name, shape in shapes.items()}
        for norm in ("input_layernorm", "post_attention_layernorm"):
            weights[f"{prefix}{norm}.weight"] = np.ones(hidden, np.float32)
    return weights


def _write_tokenizer(folder: Path) -> int:
    """Returns the size of its vocabulary: every id the model can draw has a text."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    special = [BOS, EOS, START, END]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{BOS} $A", special_tokens=[(BOS, 0)])
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[AddedToken(token, special=True) for token in special],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_TEXT.splitlines(), trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(
        json.dumps(
            {
                "tokenizer_class": "PreTrainedTokenizerFast",
                "bos_token": BOS,
                "eos_token": EOS,
                "model_max_length": CONFIG["max_position_embeddings"],
                "clean_up_tokenization_spaces": False,
                "chat_template": CHAT_TEMPLATE,
            },
            indent=1,
        )
    )
    return int(tokenizer.get_vocab_size())


# What the tokenizer learns its merges from.
_TEXT = """\
A tree begins with one trunk and ends in many leaves, and what the trunk has grown the leaves need not grow again.
You are a helpful assistant. Answer the question in a few plain sentences, and say so when you do not know.
The question is short, the answer is shorter, and the document they share is long.
What is the capital of France? The capital of France is Paris. What is the largest planet? The largest planet is
Jupiter.
Why is the sky blue? Because air scatters short waves of light more than long ones, and blue light is short.
How many legs has a spider? Eight. How many days are in a week? Seven. How many months are in a year? Twelve.
Write a short poem about the sea. The sea is wide, the sea is deep; it keeps the secrets sailors keep.
Once upon a time there was a small river that wanted to be a lake. It ran down the hill, past the mill and the old
stone bridge, until it found a valley that would hold it. There it stayed, and fish came, and then birds, and then
people.
The people built houses of wood and boats of reed. In the morning they went out on the water; in the evening they told
stories.
Every story began in the same way, and every story ended differently, depending on who was listening.
A program calls a model, reads what it says, chooses what to ask next, and calls it again. Each call repeats
everything
that was said before and adds a little. A server that remembers the beginning has only the little to compute.
The user asks: translate this sentence into German. The assistant says: Dieser Satz ist kurz. The user asks: and into
French?
Explain the difference between a list and a tuple. A list can be changed after it is made; a tuple cannot.
def add(first, second): return first + second
for number in range(10): print(number, number * number)
class Stack: it has a push method, a pop method and a size, and raises an error when you pop from an empty stack.
{"name": "search", "arguments": {"query": "weather in London tomorrow", "limit": 5}}
{"role": "user", "content": "Summarize the following text."}, {"role": "assistant", "content": "The text says that"}
First think about the problem step by step. Then write down the result. Finally check the result against the question.
If a train leaves at nine and travels for three hours at eighty kilometres an hour, it goes two hundred and forty
kilometres.
Water boils at one hundred degrees and freezes at zero. Iron is heavier than wood, gold is heavier than iron.
Dear customer, thank you for your message. Your order was sent on Monday and should arrive before the end of the week.
The government said on Tuesday that it would publish new rules for schools, hospitals and public transport next year.
Scientists have found that plants grow toward the light because one side of the stem grows faster than the other.
Music, painting, theatre and dance are older than writing; mathematics, medicine and law came with the first cities.
In the beginning of the century most people lived in the country; at its end most of them lived in towns.
Memory is limited, so what was not used for the longest time is forgotten first, and what is in use is never
forgotten.
Attention looks back at every earlier token: its key says where to look, its value says what is found there.
The first token takes the longest because the whole prompt must be read; after that each token takes the same short
time.
Which of these is correct? Choose one answer: A, B, C or D, and give the reason for your choice in one line.
Good morning, how are you today? I am very well, thank you. And you? It has been raining here since yesterday.
She opened the door, looked at the empty street, and decided that it would be better to stay at home and read.
He said that nothing was impossible, only that some things would take more time, more money or more people than
others.
We the people hold these truths to be simple: that work should be done once, that it should be done well, and shared.
Compare the two plans, list the advantages and disadvantages of each, and recommend the better one to the manager.
The recipe needs two eggs, a cup of flour, half a cup of milk, a little butter, sugar and a pinch of salt. Mix
everything,
wait for ten minutes, then bake it in the oven for half an hour until the top is golden brown.
Question: who wrote the book? Context: the book was written by an unknown author. Answer: the author is unknown.
Please rewrite the paragraph so that a child can understand it. Use small words, short sentences and one example.
The quick brown fox jumps over the lazy dog, while five boxing wizards jump quickly and pack my box with liquor jugs.
0 1 2 3 4 5 6 7 8 9 10 11 12 20 50 100 1000 2024 2025 2026, Monday, Tuesday, Wednesday, Thursday, Friday, January,
December.
It is not only what you say but how, when, where and to whom you say it; otherwise nobody would ever need to listen.
Security means that no stranger can read what you wrote, change what you meant or stop what you started.
Someone must decide, everyone must understand, and anyone may ask why; that is how a small group becomes a large one.
"""
