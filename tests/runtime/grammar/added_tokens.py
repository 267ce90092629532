"""Tokenizers with the added tokens of real models, and their flags: what is written ``<…>`` need not be special."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

# The added tokens of Qwen 2.5 and 3 (ids 151643 to 151668), and whether their tokenizer_config.json calls them special.
QWEN = {
    "<|endoftext|>": True,
    "<|object_ref_start|>": True,
    "<|vision_pad|>": True,
    "<tool_call>": False,
    "</tool_call>": False,
    "<|fim_prefix|>": False,
    "<|file_sep|>": False,
    "<tool_response>": False,
    "</tool_response>": False,
    "<think>": False,
    "</think>": False,
}
HTML = {"<table>": False, "</table>": False, "<b>": False, "</b>": False}  # of Gemma's

# A chat template like Qwen 3's, in short.
THINKING = r"""
{%- if tools %}
    {{- '<tools>' }}
    {%- for tool in tools %}
        {{- tool | tojson }}
    {%- endfor %}
    {{- '</tools>\n<tool_call>\n{"name": <function-name>, "arguments": <args-json-object>}\n</tool_call>' }}
{%- endif %}
{%- for message in messages %}
    {{- '<|im_start|>' + message.role + '\n' + message.content.split('</think>')[-1] + '<|im_end|>\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\n' }}
    {%- if enable_thinking is defined and not enable_thinking %}
        {{- '<think>\n\n</think>\n\n' }}
    {%- endif %}
{%- endif %}
"""


def add(folder: Path, flags: dict[str, bool], template: str | None = None) -> Path:
    """Adds tokens to a tokenizer's folder, each with its flag, and Qwen's normalizer (NFC)."""
    from tokenizers import AddedToken, Tokenizer, normalizers

    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.add_tokens([AddedToken(text, special=special, normalized=False) for text, special in flags.items()])
    tokenizer.save(str(folder / "tokenizer.json"))
    if template is not None:
        path = folder / "tokenizer_config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "chat_template": template}))
    return folder


def sentencepiece(folder: Path, flags: dict[str, bool]) -> Path:
    """A tokenizer like Gemma's: BPE over characters with ▁ for a space, raw bytes as a fallback, and added tokens."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers

    letters = ["▁", *map(chr, range(ord("!"), ord("~") + 1)), "\n"]
    special = ["<pad>", "<eos>", "<bos>"]
    vocab: dict[str, int] = {}
    for piece in [*special, *flags, *(f"<0x{byte:02X}>" for byte in range(256)), *letters, "ab", "▁a"]:
        vocab.setdefault(piece, len(vocab))
    tokenizer = Tokenizer(models.BPE(vocab, [("a", "b"), ("▁", "a")], byte_fallback=True))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    replace: Any = decoders.Replace("▁", " ")
    tokenizer.decoder = decoders.Sequence([replace, decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.add_special_tokens(special)
    tokenizer.add_tokens([AddedToken(text, special=special, normalized=False) for text, special in flags.items()])
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder
