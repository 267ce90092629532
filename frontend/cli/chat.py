"""``branchwise chat``: talk to a model in the terminal. Every turn reuses all turns before it."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated

import typer

from .console import EXIT_FAILED, err, escape, expected_failures, out
from .options import ApiKey, Device, DtypeFlag, MaxModelLen, MaxTokens, ModelFlag, Seed, Temperature, TopP, UrlFlag

if TYPE_CHECKING:
    from ...runtime.sampling_params import SamplingParams
    from .backends import Backend, Message

HELP = """\
/reset  forget the conversation and start over
/help   this list
/exit   leave (or Ctrl-D)
Ctrl-C  cut an answer short"""


def chat(
    model: ModelFlag = "",
    url: UrlFlag = None,
    api_key: ApiKey = None,
    system: Annotated[
        str | None, typer.Option("--system", "-s", help="What the model is told first.", show_default=False)
    ] = None,
    max_tokens: MaxTokens = 512,
    temperature: Temperature = None,
    top_p: TopP = None,
    seed: Seed = None,
    max_model_len: MaxModelLen = None,
    dtype: DtypeFlag = "auto",
    device: Device = "auto",
) -> None:
    """Talk to a model in the terminal.

    Loads a model here, or asks a running server with **--url**. **/reset** starts over, **/help** lists
    the commands, **/exit** or Ctrl-D leaves, Ctrl-C cuts an answer short.
    """
    with expected_failures():
        from .backends import open_backend, sampling

        engine = {"max_model_len": max_model_len, "dtype": dtype, "device": device}
        with open_backend(url, api_key, model, **engine) as backend:
            flags = {"max_tokens": max_tokens, "temperature": temperature, "top_p": top_p, "seed": seed}
            talk = _Talk(backend, sampling(backend, flags, temperature=0.7), system)
            for line in _lines():
                if line == "/exit":
                    break
                if line == "/reset":
                    talk.reset()
                elif line[0] == "/" and line[1:].isalpha():
                    if line != "/help":
                        err.print(f"no command is called {escape(line)}", style="yellow")
                    out.print(HELP, markup=False)
                else:
                    talk.turn(line)
        if talk.failed and not sys.stdin.isatty():  # a script looks at the exit code; a person has read the errors
            raise SystemExit(EXIT_FAILED)


class _Talk:
    """One conversation. A turn that fails leaves it as it was before."""

    def __init__(self, backend: Backend, params: SamplingParams, system: str | None) -> None:
        self._backend = backend
        self._params = params
        self._opening: list[Message] = [{"role": "system", "content": system}] if system else []
        if not backend.has_template:
            err.print("the model has no chat template: writing the conversation as plain text", style="yellow")
        self.failed = False
        self.reset()

    def reset(self) -> None:
        self._history = list(self._opening)

    def turn(self, line: str) -> None:
        from ...runtime.errors import BranchwiseError, EngineDead
        from .wording import in_flags

        asked = [*self._history, {"role": "user", "content": line}]
        try:
            answer = _answer(self._backend.converse(asked, self._params))
        except EngineDead:
            raise  # nothing can be asked of it any more
        except BranchwiseError as error:
            self.failed = True
            err.print(f"[bold red]error:[/] {escape(in_flags(error))}", soft_wrap=True)
            err.print("your last message was dropped; /reset starts over", style="dim")
            return
        self._history = [*asked, {"role": "assistant", "content": answer}]


def _lines() -> Iterator[str]:
    """What the person types, until end of file. Empty lines are passed over. A pipe is not prompted."""
    asking = sys.stdin.isatty()
    while True:
        try:
            line = (out.input("[bold cyan]you >[/] ") if asking else input()).strip()
        except EOFError:
            if asking:
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
    finally:
        if said:
            out.print()
    return "".join(said)
