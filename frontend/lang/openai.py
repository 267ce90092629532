"""Any OpenAI-compatible server as a backend: text completions, and chat where a program speaks in turns."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from .backend import Capabilities, Completion, GenerationRequest, Message, OnDelta, Piece, SharedTokens, Usage
from .errors import BackendError
from .http import Http

_SAME = ("temperature", "top_p", "frequency_penalty", "presence_penalty", "n", "seed")  # what everybody knows
# Fields beyond OpenAI's that vLLM, SGLang and others take. Sent only when said: a server that refuses them says so.
_MORE = ("top_k", "min_p", "repetition_penalty", "min_tokens", "ignore_eos", "stop_token_ids", "skip_special_tokens")


class OpenAIBackend:
    """``chat``: the server has chat completions only; by default plain text goes to completions and turns to chat."""

    def __init__(
        self, url: str, model: str, *, api_key: str | None = None, timeout: float = 600.0, chat: bool = False
    ) -> None:
        self.name = url
        self.usage = Usage()
        self.capabilities = Capabilities(constraints=frozenset({"json_schema"}), score=not chat)
        self.model = model
        self.http = Http(url, api_key, timeout, self.usage)
        self._chat = chat

    async def codec(self) -> None:
        return None

    async def create(self) -> SharedTokens:
        return SharedTokens()

    async def fork(self, handle: SharedTokens, n: int) -> list[SharedTokens]:
        return [handle.fork() for _ in range(n)]

    async def extend(self, handle: SharedTokens, piece: Piece) -> None:
        handle.extend([piece] if isinstance(piece, Message) else piece)

    async def generate(
        self, handle: SharedTokens, ask: GenerationRequest, on_delta: OnDelta | None = None
    ) -> list[Completion]:
        items = handle.tokens()
        chats = bool(items) and isinstance(items[0], Message)
        if not chats and self._chat:
            raise BackendError(f"{self.name} only chats: write the program in turns (system, user, assistant)")
        body = self._body(ask, chats)
        if chats:
            body |= _conversation(items, ask)
            self.usage.sent_tokens += sum(len(one.content) for one in items) // 4
        else:
            body["prompt"] = "".join(items)
            self.usage.sent_tokens += handle.length // 4
        path = "/v1/chat/completions" if chats else "/v1/completions"
        if on_delta is not None and ask.params.n == 1:
            choices, usage = await self._follow(path, body, chats, on_delta)
        else:
            reply = await self.http.post(path, body)
            choices, usage = reply.get("choices") or [], reply.get("usage") or {}
        done = [Completion(_text(one, chats), self._meta(one, usage)) for one in choices]
        if not done:
            raise BackendError(f"{self.name} answered without a choice")
        cached = (usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0
        self.usage.count(usage.get("prompt_tokens", 0), cached, usage.get("completion_tokens", 0))
        if not chats and ask.params.max_tokens != 0:
            handle.extend(done[0].text)
        return done

    def _body(self, ask: GenerationRequest, chats: bool) -> dict[str, Any]:
        params = ask.params
        body: dict[str, Any] = {"model": self.model}
        if params.max_tokens is not None:
            body["max_tokens"] = params.max_tokens
        for name in (*_SAME, *_MORE):
            if (value := ask.options.get(name)) is not None:
                body[name] = value
        if params.stop:
            body["stop"] = list(params.stop)
        if params.logit_bias:
            body["logit_bias"] = {str(id): bias for id, bias in params.logit_bias.items()}
        if params.logprobs is not None:
            body |= {"logprobs": True, "top_logprobs": params.logprobs} if chats else {"logprobs": params.logprobs}
        if ask.constraint:
            if not chats:
                raise BackendError(f"{self.name} takes a json_schema only in chat: write the program in turns")
            schema = {"name": "answer", "schema": json.loads(ask.constraint["json_schema"]), "strict": True}
            body["response_format"] = {"type": "json_schema", "json_schema": schema}
        return body

    async def _follow(
        self, path: str, body: Mapping[str, Any], chats: bool, on_delta: OnDelta
    ) -> tuple[list[dict[str, Any]], dict[str, Any]]:
        text, finish = "", None
        usage: dict[str, Any] = {}
        calls: dict[int, dict[str, Any]] = {}
        streamed = {**body, "stream": True, "stream_options": {"include_usage": True}}
        async for event in self.http.events(path, streamed):
            usage = event.get("usage") or usage
            for choice in event.get("choices") or ():
                piece = (choice.get("delta") or {}).get("content") or "" if chats else choice.get("text") or ""
                finish = choice.get("finish_reason") or finish
                text += piece
                if piece:
                    on_delta(piece)
                for more in (choice.get("delta") or {}).get("tool_calls") or ():
                    call = calls.setdefault(more.get("index", 0), {"name": "", "arguments": ""})
                    call |= {name: call[name] + (more["function"].get(name) or "") for name in call}
        made = [{"function": call} for call in calls.values()]
        whole: dict[str, Any] = {"finish_reason": finish, "text": text}
        whole["message"] = {"content": text, "tool_calls": made}
        if made:
            on_delta(_text(whole, chats)[len(text) :])
        return [whole], usage

    def _meta(self, choice: Mapping[str, Any], usage: Mapping[str, Any]) -> dict[str, Any]:
        meta: dict[str, Any] = {
            "finish_reason": {"type": choice.get("finish_reason"), "matched": choice.get("stop_reason")},
            "prompt_tokens": usage.get("prompt_tokens", 0),
            "completion_tokens": usage.get("completion_tokens", 0),
            "cached_tokens": (usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0,
        }
        logprobs = choice.get("logprobs") or {}
        if "token_logprobs" in logprobs:
            rows = zip(logprobs["token_logprobs"], logprobs["tokens"], strict=True)
            meta["output_token_logprobs"] = [[value, None, token] for value, token in rows]
        elif "content" in logprobs:
            meta["output_token_logprobs"] = [[row["logprob"], None, row["token"]] for row in logprobs["content"] or ()]
        return meta

    async def score(self, handle: SharedTokens, continuations: Sequence[Piece]) -> list[list[tuple[int | str, float]]]:
        """Through ``echo`` with logprobs. The first token of a choice is the one that holds its first character."""
        prompt = handle.text()
        wholes = [prompt + str(piece) for piece in continuations]
        self.usage.sent_tokens += sum(map(len, wholes)) // 4
        body = {"model": self.model, "prompt": wholes, "max_tokens": 0, "echo": True, "logprobs": 0, "temperature": 0}
        reply = await self.http.post("/v1/completions", body)
        usage = reply.get("usage") or {}
        cached = (usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0
        self.usage.count(usage.get("prompt_tokens", 0), cached, 0)
        rows: list[list[tuple[int | str, float]]] = []
        for choice in sorted(reply["choices"], key=lambda one: one["index"]):
            told = choice.get("logprobs") or {}
            if not told.get("tokens"):
                raise BackendError(f"{self.name} gives no logprobs of a prompt: select and choices need them")
            ends = [*told["text_offset"][1:], len(choice["text"])]
            rows.append(
                [
                    (token, 0.0 if value is None else value)
                    for token, value, end in zip(told["tokens"], told["token_logprobs"], ends, strict=True)
                    if end > len(prompt)
                ]
            )
        return rows

    async def close(self, handle: SharedTokens) -> None:
        pass

    async def flush_cache(self) -> None:
        raise BackendError(f"{self.name} has no cache to flush that we know of")


def _conversation(items: Sequence[Message], ask: GenerationRequest) -> dict[str, Any]:
    if not ask.tools:
        return {"messages": [{"role": one.role, "content": one.content} for one in items]}
    from .openai_tools import conversation

    return {"messages": conversation(items), "tools": list(ask.tools)}


def _text(choice: Mapping[str, Any], chats: bool) -> str:
    if not chats:
        return choice.get("text") or ""
    message = choice.get("message") or {}
    if not message.get("tool_calls"):
        return message.get("content") or ""
    from .openai_tools import written

    return written(message.get("content") or "", message["tool_calls"])
