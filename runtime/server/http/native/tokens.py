"""The tokenizer: ``POST /tokenize`` and ``/detokenize``, ``GET /tokenizer_info`` in vLLM's shapes, and ``GET
/tokenizer``, a dump for clients that tokenize themselves."""

from __future__ import annotations

import asyncio
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt
from fastapi import Request, Response
from pydantic import Field

from ....errors import InvalidRequest
from ....limits import check_token_ids
from ..fields.parse import Prompts, Strict, parse
from ..openai.chat.request import chat_text
from ..plumbing.body import read_json_object
from ..plumbing.routes import Routes
from ..plumbing.sse import json_response
from ..state import AppState

MAX_IDS = 1_000_000  # of one request to /detokenize
INLINE = 16_384  # characters tokenized on the event loop; more would block it


class TokenizeRequest(Strict):
    """A ``prompt``, or ``messages`` with the chat fields that shape its prompt."""

    prompt: str | None = None
    messages: list[Any] | None = None
    model: str | None = None
    add_special_tokens: bool | None = Field(None, description="null: for a prompt, not for messages.")
    return_token_strs: bool = False


class DetokenizeRequest(Strict):
    tokens: Prompts = Field(description="A list of token ids.")
    model: str | None = None


def routes(state: AppState) -> Routes:
    routes = Routes("models")

    @routes.add("POST", "/tokenize", body=TokenizeRequest)
    async def tokenize(request: Request) -> Response:
        """The tokens of a prompt, or of the prompt that a conversation becomes."""
        raw = await read_json_object(request)
        body = parse(TokenizeRequest, raw, unsupported=frozenset())
        asked = body.add_special_tokens
        state.check_model(body.model)
        limits = state.client.limits
        if (body.prompt is None) == (raw.get("messages") is None):
            raise InvalidRequest("prompt", "or messages is required: give exactly one")
        if body.prompt is not None:
            text, special = body.prompt, asked is not False
        else:
            raw.pop("add_special_tokens", None)  # a chat has another field of this name
            text, _ = await chat_text(state, raw)
            special = bool(asked)
        tokens = (await token_ids(state, text, special=special)).tolist()
        named = await _texts(state, tokens) if body.return_token_strs else None
        answer = {"count": len(tokens), "max_model_len": limits.max_model_len, "tokens": tokens, "token_strs": named}
        return json_response(answer)

    @routes.add("POST", "/detokenize", body=DetokenizeRequest)
    async def detokenize(request: Request) -> Response:
        """The text of tokens, special ones spelled out."""
        body = parse(DetokenizeRequest, await read_json_object(request))
        state.check_model(body.model)
        vocab_size = state.client.limits.vocab_size
        if not isinstance(body.tokens, (list, np.ndarray)):
            raise InvalidRequest("tokens", f"must be a list, got {type(body.tokens).__name__}")
        if len(body.tokens) > MAX_IDS:
            raise InvalidRequest("tokens", f"must have at most {MAX_IDS} entries, got {len(body.tokens)}")
        if len(body.tokens):
            check_token_ids(body.tokens, vocab_size, "tokens")
        if len(body.tokens) > INLINE:
            text = await asyncio.to_thread(state.tokenizer.decode, body.tokens, False)
        else:
            text = state.tokenizer.decode(body.tokens, skip_special_tokens=False)
        return json_response({"prompt": text})

    @routes.add("GET", "/tokenizer_info")
    async def tokenizer_info() -> Response:
        """The tokenizer: its size, its special tokens, its chat template."""
        limits = state.client.limits
        tokenizer = state.tokenizer
        template = tokenizer.chat_template
        return json_response(
            {
                "tokenizer_class": "PreTrainedTokenizerFast",
                "vocab_size": tokenizer.vocab_size,
                "model_max_length": limits.max_model_len,
                **tokenizer.special_tokens,
                "bos_token_id": tokenizer.bos_id,
                "eos_token_id": tokenizer.eos_id,
                "special_tokens": {tokenizer.token_text(id): id for id in sorted(tokenizer.special_ids)},
                "chat_template": None if template is None else template.source,
            }
        )

    dump: list[bytes] = []  # megabytes, encoded once

    @routes.add("GET", "/tokenizer")
    async def tokenizer() -> Response:
        """The whole tokenizer, as `Tokenizer.dump` gives it."""
        _ = state.client.limits  # raises until there is a tokenizer
        if not dump:
            dump.append(await asyncio.to_thread(lambda: msgspec.json.encode(state.tokenizer.dump())))
        return Response(dump[0], media_type="application/json")

    return routes


async def token_ids(state: AppState, text: str, *, special: bool) -> npt.NDArray[np.int32]:
    """int32 [n]. ``special``: with the tokens that the tokenizer puts around a text."""
    encode = state.tokenizer.encode
    if len(text) <= INLINE:
        return encode(text, special)
    async with state.long_texts.of(state.namespaces.of(None)[0]):
        return await asyncio.to_thread(encode, text, special)


async def _texts(state: AppState, tokens: list[int]) -> list[str]:
    def texts() -> list[str]:
        return [state.tokenizer.token_text(id) for id in tokens]

    return texts() if len(tokens) <= INLINE else await asyncio.to_thread(texts)
