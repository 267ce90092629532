"""The tokenizer: byte-level BPE whose tokens never straddle the border between a word and what surrounds it.

Runs of letters, single digits, single line ends, and runs of everything else are cut apart first. So a name is the same
tokens after a space, a quote or a bracket, and copying it from a sentence into JSON is copying ids: what a small model can
learn well. And an answer is the same tokens wherever it begins: a line end never merges with what follows it.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from .conversation import START, STOP, TEXT_END, render, split_marks
from .draw import Draw
from .mixture import stream

VOCABULARY = 4096
SPECIAL = [TEXT_END, START, STOP]
_BORDERS = r"\p{L}+|\p{N}|\n|[^\p{L}\p{N}\n]+"


def texts(seed: int, characters: int) -> Iterable[str]:
    draw = Draw(seed, level=0.3)
    for conversation, count in stream(draw):
        text, _ = split_marks(render(conversation))
        count(len(text) // 3)
        characters -= len(text)
        for special in SPECIAL:
            text = text.replace(special, "\n")
        yield text
        if characters < 0:
            return


def train(seed: int = 1, characters: int = 6_000_000) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_BORDERS), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[AddedToken(token, special=True) for token in SPECIAL],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        max_token_length=24,
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts(seed, characters), trainer)
    return tokenizer


def save(tokenizer: Tokenizer, folder: Path, context: int) -> None:
    """``tokenizer.json`` and ``tokenizer_config.json`` with the chat template."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"), pretty=False)
    template = (Path(__file__).parent / "chat_template.jinja").read_text(encoding="utf-8")
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": STOP,
        "pad_token": TEXT_END,
        "model_max_length": context,
        "clean_up_tokenization_spaces": False,
        "chat_template": template,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")
