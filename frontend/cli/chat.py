"""``branchwise chat``: talk to a model in the terminal. Every turn reuses all turns before it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .console import err, expected_failures, out
from .options import ApiKey, Device, DtypeFlag, MaxModelLen, MaxTokens, ModelFlag, Seed, Temperature, TopP, UrlFlag

if TYPE_CHECKING:
    from ...runtime.tokenizer import Tokenizer
    from .backends import InProcess, Prompt, Remote

Message = dict[str, str]


def chat(
    model: ModelFlag = "",
    url: UrlFlag = None,
    api_key: ApiKey = None,
    system: Annotated[
        str | None, typer.Option("--system", "-s", help="What the model is told first.", show_default=False)
    ] = None,
    max_tokens: MaxTokens = 512,
    temperature: Temperature = 0.7,
    top_p: TopP = 1.0,
    seed: Seed = None,
    max_model_len: MaxModelLen = None,
    dtype: DtypeFlag = "auto",
    device: Device = "auto",
) -> None:
    """Talk to a model in the terminal.

    Loads a model here, or asks a running server with **--url**. **/reset** starts over, **/exit** or
    Ctrl-D leaves, Ctrl-C cuts an answer short.
    """
    with expected_failures():
        from ...runtime.sampling_params import SamplingParams
        from .backends import open_backend

        params = SamplingParams(max_tokens=max_tokens, temperature=temperature, top_p=top_p, seed=seed)
        engine = {"max_model_len": max_model_len, "dtype": dtype, "device": device}
        with open_backend(url, api_key, model, **engine) as backend:
            tokenizer = _tokenizer(backend)
            if tokenizer is None:
                err.print("no chat template within reach: writing the conversation as plain text", style="yellow")
            opening: list[Message] = [{"role": "system", "content": system}] if system else []
            history = list(opening)
            for line in _lines():
                if line == "/exit":
                    return
                if line == "/reset":
                    history = list(opening)
                    continue
                history.append({"role": "user", "content": line})
                answer = _answer(backend.stream(_prompt(tokenizer, history), params))
                history.append({"role": "assistant", "content": answer})


def _lines() -> Iterator[str]:
    """What the person types, until end of file. Empty lines are passed over."""
    while True:
        try:
            line = out.input("[bold cyan]you >[/] ").strip()
        except EOFError:
            out.print()
            return
        if line:
            yield line


def _answer(pieces: Iterator[str]) -> str:
    """Prints an answer as it comes; returns what came, all of it or up to a Ctrl-C."""
    said: list[str] = []
    try:
        for piece in pieces:
            said.append(piece)
            out.print(piece, end="", markup=False, soft_wrap=True)
    except KeyboardInterrupt:
        out.print(" […]", end="", style="dim")
    out.print()
    return "".join(said)


def _tokenizer(backend: InProcess | Remote) -> Tokenizer | None:
    """The model's tokenizer with its chat template: the engine's, or a server's if its folder is on this machine."""
    from .backends import InProcess

    if isinstance(backend, InProcess):
        tokenizer = backend.engine.tokenizer
    else:
        from ...runtime.tokenizer import Tokenizer

        folder = Path(backend.client.get("/get_server_info")["config"]["engine"]["model"])
        if not (folder / "tokenizer.json").is_file():
            return None
        tokenizer = Tokenizer.load(folder)
    return tokenizer if tokenizer.chat_template else None


def _prompt(tokenizer: Tokenizer | None, history: list[Message]) -> Prompt:
    if tokenizer is None:
        return "".join(f"{message['role'].capitalize()}: {message['content']}\n" for message in history) + "Assistant:"
    text = tokenizer.apply_chat_template(history, add_generation_prompt=True)
    return [int(token) for token in tokenizer.encode(text, add_special_tokens=False)]
