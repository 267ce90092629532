"""Text to token ids and back, from a Hugging Face folder: the `tokenizers` package alone, imported in milliseconds."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from tokenizers import Encoding
from tokenizers import Tokenizer as Backend

from ..chat.special_text import GUARD, SpecialText
from ..chat.template import ChatTemplate
from ..errors import InvalidRequest, LoadError
from .special_tokens import declared_tokens, load_tokenizer_config, named_tokens

# Characters, or tokens. Longer texts are encoded as a batch of one: the library releases the GIL for batches only.
SHORT = 16_384


class Tokenizer:
    """A `tokenizers.Tokenizer` with what its ``tokenizer_config.json`` adds. Equal to Hugging Face's AutoTokenizer.

    Special tokens around a text come from ``tokenizer.json``'s post-processor, as in transformers 5: the config's
    ``add_bos_token`` is ignored if there is a ``tokenizer.json``.
    """

    def __init__(
        self,
        backend: Backend,
        config: Mapping[str, Any] | None = None,
        template: str | None = None,
        tool_template: str | None = None,
    ) -> None:
        """``template``: the chat template's source; ``tool_template``: of the one for requests with tools."""
        config = config or {}
        self.backend = backend
        backend.no_truncation()
        backend.no_padding()
        self.special_tokens = named_tokens(config)
        known = {token.content: token for token in backend.get_added_tokens_decoder().values()}
        backend.add_tokens(declared_tokens(config, self.special_tokens, known))
        added = backend.get_added_tokens_decoder()
        self.special_ids = frozenset(id for id, token in added.items() if token.special)
        self.vocab_size = max(backend.get_vocab_size(with_added_tokens=True), max(added, default=-1) + 1)
        kinds = _decoder_kinds(json.loads(backend.decoder.__getstate__()) if backend.decoder is not None else None)
        self.byte_level = kinds == ["ByteLevel"]  # every token is bytes on its own
        self.byte_token_ids = _byte_tokens(backend) if "ByteFallback" in kinds else frozenset()
        self._bytes: dict[int, bytes] = {}
        self._special_text = SpecialText(token.content for token in added.values() if token.special)
        self.chat_template = None
        if template is not None:
            self.chat_template = ChatTemplate(template, self.special_tokens, tool_template, self._special_text)

    @classmethod
    def load(cls, folder: str | Path) -> Tokenizer:
        """From ``tokenizer.json``, ``tokenizer_config.json`` and ``chat_template.jinja``; the last two may be absent.

        Raises `LoadError` if there is no tokenizer or a file of it cannot be read.
        """
        folder = Path(folder)
        path = folder / "tokenizer.json"
        if not path.is_file():
            raise LoadError(f"no tokenizer in {folder}: it needs a tokenizer.json")
        try:
            backend = Backend.from_file(str(path))
        except Exception as error:  # tokenizers raises plain Exception
            raise LoadError(f"cannot read {path}: {error}") from error
        config = load_tokenizer_config(folder)
        return cls(backend, config, *_find_templates(folder, config))

    def dump(self) -> dict[str, Any]:
        """The tokenizer and its chat templates as JSON, for `of_dump` on another machine."""
        template = self.chat_template
        return {
            "tokenizer": self.backend.to_str(),
            "special_tokens": self.special_tokens,
            "chat_template": None if template is None else template.source,
            "tool_template": None if template is None else template.tool_source,
        }

    @classmethod
    def of_dump(cls, dump: Any) -> Tokenizer:
        """The tokenizer of a `dump`. Raises `LoadError` for anything else."""
        try:
            backend, templates = Backend.from_str(dump["tokenizer"]), (dump["chat_template"], dump.get("tool_template"))
            return cls(backend, dict(dump["special_tokens"]), *templates)
        except Exception as error:  # tokenizers raises plain Exception
            raise LoadError(f"this is no tokenizer: {type(error).__name__}: {error}") from error

    def encode(self, text: str, add_special_tokens: bool = True) -> npt.NDArray[np.int32]:
        """Token ids int32 [n]. Without ``add_special_tokens`` the text may be a chat template's, with guards.

        Raises `InvalidRequest` for text that is not valid Unicode (lone surrogates).
        """
        if not add_special_tokens and GUARD in text:
            return self._encode_guarded(text, [])[0]
        return np.array(self._encoding(text, add_special_tokens).ids, np.int32)

    def encode_marked(
        self, text: str, marks: Sequence[int], add_special_tokens: bool = True
    ) -> tuple[npt.NDArray[np.int32], list[int]]:
        """`encode`, and how many leading tokens end at or before each of ``marks`` (positions in characters)."""
        if not marks:
            return self.encode(text, add_special_tokens), []
        if not add_special_tokens and GUARD in text:
            return self._encode_guarded(text, marks)
        encoding = self._encoding(text, add_special_tokens, offsets=True)
        ends = np.maximum.accumulate(np.array([end for _, end in encoding.offsets], np.int64))
        counts = np.searchsorted(ends, np.array(marks, np.int64), side="right").tolist()
        return np.array(encoding.ids, np.int32), counts

    def _encode_guarded(self, text: str, marks: Sequence[int]) -> tuple[npt.NDArray[np.int32], list[int]]:
        """`encode_marked` of a text with guards (`chat.special_text`): guarded spellings stay ordinary text."""
        ids: list[int] = []
        counts = [0] * len(marks)
        start = 0
        for piece in self._special_text.pieces(text):
            encode = self.encode_more if ids else self.encode_first
            new = encode(piece.text, not piece.literal).tolist()
            for i, mark in enumerate(marks):
                if mark >= piece.end:
                    counts[i] = len(ids) + len(new)
                elif mark > start and not piece.literal:
                    before = encode(piece.text[: mark - start], True).tolist()
                    same = (k for k, pair in enumerate(zip(before, new, strict=False)) if pair[0] != pair[1])
                    counts[i] = len(ids) + next(same, min(len(before), len(new)))
            ids += new
            start = piece.end
        return np.array(ids, np.int32), counts

    def _encoding(self, text: str, add_special_tokens: bool, *, offsets: bool = False) -> Encoding:
        try:
            if len(text) > SHORT:  # without offsets, freeing the result under the GIL is five times as fast
                batch = self.backend.encode_batch if offsets else self.backend.encode_batch_fast
                return batch([text], add_special_tokens=add_special_tokens)[0]
            return self.backend.encode(text, add_special_tokens=add_special_tokens)
        except TypeError as error:  # raised by tokenizers for a string that is not valid UTF-8
            if not isinstance(text, str):
                raise
            raise InvalidRequest("text", "must be valid Unicode, without lone surrogates") from error

    def encode_first(self, text: str, parse_special: bool = False) -> npt.NDArray[np.int32]:
        """Token ids int32 [n] of text at the start of a prompt, without the `opening` before it.

        Unless ``parse_special``, special tokens spelled out in it are ordinary text. Raises `InvalidRequest` as
        `encode` does.
        """
        return np.array(self._ids(text, parse_special), np.int32)

    def encode_more(self, text: str, parse_special: bool = False) -> npt.NDArray[np.int32]:
        """`encode_first` for text that follows other text: the tokenizer adds no space before it."""
        if not self.begins_with_space:
            return self.encode_first(text, parse_special)
        before, ids = self.anchor, self._ids("\n" + text, parse_special)
        if ids[: len(before)] != before:  # the anchor became one token with what follows it
            return self.encode_first(text, parse_special)
        return np.array(ids[len(before) :], np.int32)

    def _ids(self, text: str, parse_special: bool) -> list[int]:
        backend = self.backend if parse_special else self._literal
        try:
            return list(backend.encode(text, add_special_tokens=False).ids)
        except TypeError as error:
            raise InvalidRequest("text", "must be valid Unicode, without lone surrogates") from error

    def special_in(self, text: str) -> str | None:
        """The first special token that ``text`` spells out, or None."""
        return self._special_text.first_in(text)

    @cached_property
    def opening(self) -> npt.NDArray[np.int32]:
        """The special tokens that encoding puts before a text: <bos>, or none. int32 [n]."""
        bare = self.backend.encode("\n", add_special_tokens=False).ids
        whole = self.backend.encode("\n", add_special_tokens=True).ids
        found = next((i for i in range(len(whole)) if whole[i : i + len(bare)] == bare), 0)
        return np.array(whole[:found], np.int32)

    @cached_property
    def _literal(self) -> Backend:
        """The same tokenizer, except that it encodes special tokens as ordinary text."""
        copy = Backend.from_str(self.backend.to_str())
        copy.encode_special_tokens = True
        return copy

    @cached_property
    def longest_token(self) -> int | None:
        """Bytes of the longest token; None if a byte of a text may end up in no token, which makes it no bound."""
        greedy = any(token.lstrip or token.rstrip for token in self.backend.get_added_tokens_decoder().values())
        if not self.byte_level or self.backend.normalizer is not None or greedy:
            return None
        return max(len(token.encode()) for token in self.backend.get_vocab())

    @cached_property
    def anchor(self) -> list[int]:
        """The tokens of a line break: text put before other text that is not at the start, and then taken away."""
        return list(self.backend.encode("\n", add_special_tokens=False).ids)

    @cached_property
    def begins_with_space(self) -> bool:
        """Whether a text's first word is encoded as if a space stood before it (SentencePiece's dummy prefix)."""
        first = self.backend.encode("a", add_special_tokens=False).ids
        return bool(first) and self.token_text(first[0]).startswith(" ")

    def decode(self, ids: Iterable[int], skip_special_tokens: bool = True) -> str:
        """The text of ``ids`` as a whole. Ids outside the vocabulary have no text."""
        if isinstance(ids, np.ndarray):
            ids = ids.tolist()
        listed = list(ids)
        if len(listed) > SHORT:
            return self.backend.decode_batch([listed], skip_special_tokens=skip_special_tokens)[0]
        return self.backend.decode(listed, skip_special_tokens=skip_special_tokens)

    def token_text(self, id: int) -> str:
        """One token on its own, with its leading space, special or not. Bytes that are not UTF-8 become U+FFFD."""
        return self.token_bytes(id).decode("utf-8", "replace")

    def token_bytes(self, id: int) -> bytes:
        """The bytes of one token; b"" outside the vocabulary."""
        data = self._bytes.get(id)
        if data is None:
            data = self._bytes[id] = self._find_bytes(id)
        return data

    @property
    def bos_id(self) -> int | None:
        return self._named_id("bos_token")

    @property
    def eos_id(self) -> int | None:
        return self._named_id("eos_token")

    @property
    def required_template(self) -> ChatTemplate:
        """The chat template. Raises `InvalidRequest` if the model has none."""
        if self.chat_template is None:
            problem = "cannot be rendered: this model has no chat template; send a prompt instead (/v1/completions)"
            raise InvalidRequest("messages", problem)
        return self.chat_template

    def apply_chat_template(
        self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool = True, **variables: Any
    ) -> str:
        """The prompt text of a conversation. It holds its own special tokens: encode it without adding any.

        Raises `InvalidRequest` if the model has no chat template or the template refuses the messages.
        """
        return self.required_template.render(messages, add_generation_prompt, variables)

    def _named_id(self, name: str) -> int | None:
        token = self.special_tokens.get(name)
        return None if token is None else self.backend.token_to_id(token)

    def _find_bytes(self, id: int) -> bytes:
        token = self.backend.id_to_token(id)
        if token is None:
            return b""
        if self.byte_level:
            # As the ByteLevel decoder: a token with any character outside the byte alphabet stands for itself.
            table = self._byte_alphabet
            if all(character in table for character in token):
                return bytes(table[character] for character in token)
            return token.encode()
        if id in self.byte_token_ids:
            return bytes([int(token[3:5], 16)])
        return token.replace("▁", " ").encode()

    @cached_property
    def _byte_alphabet(self) -> dict[str, int]:
        """GPT-2's printable stand-in of each byte."""
        printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
        table = {chr(byte): byte for byte in printable}
        others = (byte for byte in range(256) if chr(byte) not in table)
        return table | {chr(256 + i): byte for i, byte in enumerate(others)}


def _decoder_kinds(state: Any) -> list[str]:
    if state is None:
        return []
    if state["type"] == "Sequence":
        return [kind for part in state["decoders"] for kind in _decoder_kinds(part)]
    return [state["type"]]


def _byte_tokens(backend: Backend) -> frozenset[int]:
    """Ids of the raw bytes of a byte-fallback vocabulary, written ``<0x00>`` to ``<0xFF>``."""
    ids = (backend.token_to_id(f"<0x{byte:02X}>") for byte in range(256))
    return frozenset(id for id in ids if id is not None)


def _find_templates(folder: Path, config: Mapping[str, Any]) -> tuple[str | None, str | None]:
    """The chat template and the one for requests with tools (``tool_use``), if it is another. Files come before the
    config's entries: ``chat_template.jinja`` and ``additional_chat_templates/tool_use.jinja``."""
    named = config.get("chat_template")
    if isinstance(named, list):
        named = {entry.get("name"): entry.get("template") for entry in named if isinstance(entry, dict)}
    else:
        named = {"default": named}
    for name, file in (("default", "chat_template.jinja"), ("tool_use", "additional_chat_templates/tool_use.jinja")):
        path = folder / file
        if path.is_file():
            try:
                named[name] = path.read_text(encoding="utf-8")
            except UnicodeDecodeError as error:
                raise LoadError(f"cannot read {path}: {error}") from error
    found = [template if isinstance(template := named.get(name), str) else None for name in ("default", "tool_use")]
    return found[0] or found[1], found[1]
