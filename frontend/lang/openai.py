"""Any OpenAI-compatible server as a backend: text completions, and chat completions where a program uses turns."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from ..client import TIMEOUT, AsyncClient
from ..errors import BackendError
from .backend import Capabilities, Completion, GenerationRequest, OnDelta, Piece, TokenScores, Turn, Usage
from .server import RETRY_SECONDS

# Sampling fields of OpenAI's API, then those that vLLM, SGLang and others add. A field is sent only if the program sets
# it, so that a server without it reports an error.
_FIELDS = (
    *("temperature", "top_p", "frequency_penalty", "presence_penalty", "n", "seed"),
    *("top_k", "min_p", "repetition_penalty", "min_tokens", "ignore_eos", "stop_token_ids", "skip_special_tokens"),
)


class TextPrompt:
    """A handle: the text or the turns so far. Sent whole with each request."""

    __slots__ = ("text", "turns")

    def __init__(self, text: str = "", turns: tuple[Turn, ...] = ()) -> None:
        self.text = text
        self.turns = turns

    @property
    def length(self) -> int:
        """In turns, or in characters if there are none."""
        return len(self.turns) or len(self.text)

    def extend(self, piece: Piece) -> None:
        if isinstance(piece, Turn):
            self.turns += (piece,)
        else:
            self.text += str(piece)

    def fork(self) -> TextPrompt:
        return TextPrompt(self.text, self.turns)


class OpenAIBackend:
    """``chat``: the server has only chat completions. Otherwise text goes to completions and turns to chat."""

    def __init__(
        self, url: str, model: str, *, api_key: str | None = None, timeout: float = TIMEOUT, chat: bool = False
    ) -> None:
        self.name = url
        self.usage = Usage()
        self.capabilities = Capabilities(constraints=frozenset({"json_schema"}), score=not chat)
        self.model = model
        self.http = AsyncClient(url, api_key, timeout=timeout, retry_seconds=RETRY_SECONDS, traffic=self.usage)
        self._chat = chat

    async def codec(self) -> None:
        return None

    async def create(self) -> TextPrompt:
        return TextPrompt()

    async def fork(self, handle: TextPrompt, n: int) -> list[TextPrompt]:
        return [handle.fork() for _ in range(n)]

    async def extend(self, handle: TextPrompt, piece: Piece) -> None:
        handle.extend(piece)

    async def close(self, handle: TextPrompt) -> None:
        pass

    async def flush_cache(self) -> None:
        raise BackendError(f"{self.name} has no known route to flush its cache")

    async def generate(
        self, handle: TextPrompt, request: GenerationRequest, on_delta: OnDelta | None = None
    ) -> list[Completion]:
        chats = bool(handle.turns)
        if not chats and self._chat:
            raise BackendError(f"{self.name} only chats: write the program in turns (system, user, assistant)")
        body = self._body(request, chats)
        if chats:
            body |= _conversation(handle.turns, request)
            self.usage.sent_tokens += sum(len(turn.content) for turn in handle.turns) // 4
        else:
            body["prompt"] = handle.text
            self.usage.sent_tokens += len(handle.text) // 4
        path = "/v1/chat/completions" if chats else "/v1/completions"
        if on_delta is not None and request.params.n == 1:
            choices, usage = await self._stream(path, body, chats, on_delta)
        else:
            reply = await self.http.post(path, body)
            choices, usage = reply.get("choices") or [], reply.get("usage") or {}
        completions = [Completion(_text(one, chats), _meta(one, usage)) for one in choices]
        if not completions:
            raise BackendError(f"{self.name} answered without a choice")
        self.usage.count(usage.get("prompt_tokens", 0), _cached(usage), usage.get("completion_tokens", 0))
        if not chats and request.params.max_tokens != 0:
            handle.extend(completions[0].text)
        return completions

    def _body(self, request: GenerationRequest, chats: bool) -> dict[str, Any]:
        params = request.params
        body: dict[str, Any] = {"model": self.model}
        if params.max_tokens is not None:
            body["max_tokens"] = params.max_tokens
        for name in _FIELDS:
            if (value := request.options.get(name)) is not None:
                body[name] = value
        if params.stop:
            body["stop"] = list(params.stop)
        if params.logit_bias:
            body["logit_bias"] = {str(id): bias for id, bias in params.logit_bias.items()}
        if params.logprobs is not None:
            body |= {"logprobs": True, "top_logprobs": params.logprobs} if chats else {"logprobs": params.logprobs}
        if request.constraint:
            if not chats:
                raise BackendError(f"{self.name} takes a json_schema only in chat: write the program in turns")
            schema = {"name": "answer", "schema": json.loads(request.constraint["json_schema"]), "strict": True}
            body["response_format"] = {"type": "json_schema", "json_schema": schema}
        return body

    async def _stream(
        self, path: str, body: Mapping[str, Any], chats: bool, on_delta: OnDelta
    ) -> tuple[list[dict[str, Any]], dict[str, Any]]:
        text, finish = "", None
        usage: dict[str, Any] = {}
        calls: dict[int, dict[str, Any]] = {}
        async for event in self.http.events(path, {**body, "stream": True, "stream_options": {"include_usage": True}}):
            usage = event.get("usage") or usage
            for choice in event.get("choices") or ():
                delta = choice.get("delta") or {}
                piece = (delta.get("content") if chats else choice.get("text")) or ""
                finish = choice.get("finish_reason") or finish
                text += piece
                if piece:
                    on_delta(piece)
                for more in delta.get("tool_calls") or ():
                    call = calls.setdefault(more.get("index", 0), {"name": "", "arguments": ""})
                    call |= {name: call[name] + (more["function"].get(name) or "") for name in call}
        tool_calls = [{"function": call} for call in calls.values()]
        message = {"content": text, "tool_calls": tool_calls}
        streamed: dict[str, Any] = {"finish_reason": finish, "text": text, "message": message}
        if tool_calls:
            on_delta(_text(streamed, chats)[len(text) :])
        return [streamed], usage

    async def score(self, handle: TextPrompt, continuations: Sequence[Piece]) -> list[TokenScores]:
        """Through ``echo`` with logprobs."""
        prompts = [handle.text + str(piece) for piece in continuations]
        self.usage.sent_tokens += sum(map(len, prompts)) // 4
        body = {"model": self.model, "prompt": prompts, "max_tokens": 0, "echo": True, "logprobs": 0, "temperature": 0}
        reply = await self.http.post("/v1/completions", body)
        usage = reply.get("usage") or {}
        self.usage.count(usage.get("prompt_tokens", 0), _cached(usage), 0)
        scores: list[TokenScores] = []
        for choice in sorted(reply["choices"], key=lambda one: one["index"]):
            logprobs = choice.get("logprobs") or {}
            if not logprobs.get("tokens"):
                raise BackendError(f"{self.name} gives no logprobs of a prompt: select and choices need them")
            ends = [*logprobs["text_offset"][1:], len(choice["text"])]
            rows = zip(logprobs["tokens"], logprobs["token_logprobs"], ends, strict=True)
            scores.append(
                [(token, 0.0 if value is None else value) for token, value, end in rows if end > len(handle.text)]
            )
        return scores


def _conversation(turns: Sequence[Turn], request: GenerationRequest) -> dict[str, Any]:
    if not request.tools:
        return {"messages": [{"role": one.role, "content": one.content} for one in turns]}
    from .openai_tools import conversation

    return {"messages": conversation(turns), "tools": list(request.tools)}


def _text(choice: Mapping[str, Any], chats: bool) -> str:
    if not chats:
        return choice.get("text") or ""
    message = choice.get("message") or {}
    if not message.get("tool_calls"):
        return message.get("content") or ""
    from .openai_tools import written

    return written(message.get("content") or "", message["tool_calls"])


def _cached(usage: Mapping[str, Any]) -> int:
    return (usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0


def _meta(choice: Mapping[str, Any], usage: Mapping[str, Any]) -> dict[str, Any]:
    meta: dict[str, Any] = {
        "finish_reason": {"type": choice.get("finish_reason"), "matched": choice.get("stop_reason")},
        "prompt_tokens": usage.get("prompt_tokens", 0),
        "completion_tokens": usage.get("completion_tokens", 0),
        "cached_tokens": _cached(usage),
    }
    logprobs = choice.get("logprobs") or {}
    if "token_logprobs" in logprobs:
        rows = zip(logprobs["token_logprobs"], logprobs["tokens"], strict=True)
        meta["output_token_logprobs"] = [[value, None, token] for value, token in rows]
    elif "content" in logprobs:
        meta["output_token_logprobs"] = [[row["logprob"], None, row["token"]] for row in logprobs["content"] or ()]
    return meta
