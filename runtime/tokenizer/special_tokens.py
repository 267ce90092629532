"""Special tokens that a folder's files declare beside ``tokenizer.json``, read as transformers' AutoTokenizer does."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec
from tokenizers import AddedToken

from ..errors import LoadError

_FLAGS = ("single_word", "lstrip", "rstrip", "normalized")


def load_tokenizer_config(folder: Path) -> dict[str, Any]:
    """``tokenizer_config.json``, or {}. Raises `LoadError` for a file that holds no JSON object.

    Without ``added_tokens_decoder`` in it, the older files ``special_tokens_map.json`` and ``added_tokens.json`` count
    as well.
    """
    config = _read_object(folder / "tokenizer_config.json")
    if "added_tokens_decoder" in config:
        return config
    config = config | _read_object(folder / "special_tokens_map.json")
    added = _read_object(folder / "added_tokens.json")
    if added:
        config["added_tokens_decoder"] = {str(id): {"content": name, "normalized": True} for name, id in added.items()}
    return config


def named_tokens(config: Mapping[str, Any]) -> dict[str, str]:
    """``{"bos_token": "<s>", …}``: tokens with a role, which chat templates may name."""
    named = {name: value for name, value in config.items() if name.endswith("_token")}
    extra = config.get("extra_special_tokens")
    found = {name: _content(value) for name, value in {**named, **(extra if isinstance(extra, dict) else {})}.items()}
    return {name: content for name, content in found.items() if content is not None}


def declared_tokens(
    config: Mapping[str, Any], named: Mapping[str, str], known: Mapping[str, AddedToken]
) -> list[AddedToken]:
    """Tokens to add to a tokenizer whose added tokens are ``known``, by content.

    New tokens in the order of their ids, and known ones with the flags that the config gives them. Tokens with a role
    are special whatever their flags say.
    """
    declared: dict[str, AddedToken] = {}
    decoder = config.get("added_tokens_decoder") or {}
    for _, entry in sorted(decoder.items(), key=lambda item: int(item[0])):
        content = _content(entry)
        if content is not None:
            flags = {name: bool(entry.get(name, False)) for name in _FLAGS}
            declared[content] = AddedToken(content, special=bool(entry.get("special", False)), **flags)
    for content in named.values():
        token = declared.get(content) or known.get(content)
        if token is None:
            declared[content] = AddedToken(content, special=True)
        elif not token.special:
            flags = {name: getattr(token, name) for name in _FLAGS}
            declared[content] = AddedToken(content, special=True, **flags)
    for key in ("additional_special_tokens", "extra_special_tokens"):
        for value in config.get(key) or () if isinstance(config.get(key), list) else ():
            content = _content(value)
            if content is not None and content not in known and content not in declared:
                declared[content] = AddedToken(content, special=True, normalized=False)
    return list(declared.values())


def eos_token_id(folder: Path) -> int | None:
    """The id of the tokenizer's ``eos_token``, without loading the tokenizer; None if the folder does not say.

    Raises `LoadError` for a file that cannot be read.
    """
    config = load_tokenizer_config(folder)
    content = _content(config.get("eos_token"))
    path = folder / "tokenizer.json"
    if content is None or not path.is_file():
        return None
    try:
        tokenizer = msgspec.json.decode(path.read_bytes(), type=_TokenizerFile)
        for token in tokenizer.added_tokens:
            if token.content == content:
                return token.id
        return msgspec.json.decode(tokenizer.model, type=_Vocabulary).vocab.get(content)
    except (msgspec.MsgspecError, UnicodeDecodeError):
        return None  # a vocabulary that is a list of scores, or a file that `Tokenizer.load` refuses


class _Added(msgspec.Struct):
    id: int
    content: str


class _TokenizerFile(msgspec.Struct):
    added_tokens: list[_Added] = []
    model: msgspec.Raw = msgspec.Raw(b"{}")


class _Vocabulary(msgspec.Struct):
    vocab: dict[str, int] = {}


def _read_object(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        value = msgspec.json.decode(path.read_bytes())
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise LoadError(f"cannot read {path}: {error}") from error
    if not isinstance(value, dict):
        raise LoadError(f"cannot read {path}: it must hold a JSON object")
    return value


def _content(value: Any) -> str | None:
    """A token in a config: its text, or an object that holds it."""
    if isinstance(value, dict):
        value = value.get("content")
    return value if isinstance(value, str) else None
