"""``branchwise chat``: talk to a model in the terminal. Every turn reuses all turns before it."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .config_flags import config_flags
from .console import EXIT_FAILED, err, escape, expected_failures, in_flags, out
from .options import ENGINE_FLAGS, ApiKey, MaxTokens, ModelFlag, Seed, Temperature, TopP, UrlFlag, is_address, one_of

if TYPE_CHECKING:
    from ...runtime.sampling_params import SamplingParams
    from .models import ChatTurn, Generated, Model

HELP = '''\
/reset  forget the conversation and start over
/help   this list
/exit   leave (or Ctrl-D)
"""     begin a message of several lines, and end it; a line that ends with \\ goes on too
Ctrl-C  cut an answer short'''
PROMPT = "\001\033[1;36m\002you >\001\033[0m\002 "  # \001 and \002: readline must not count the colours
MORE = "\001\033[36m\002  ... \001\033[0m\002 "
BLOCK = '"""'


@config_flags(*ENGINE_FLAGS)
def chat(
    model_or_url: Annotated[
        str, typer.Argument(metavar="MODEL|URL", help="As --model or --url.", show_default=False)
    ] = "",
    model: ModelFlag = "",
    url: UrlFlag = None,
    api_key: ApiKey = None,
    system: Annotated[str | None, typer.Option("--system", "-s", help="The system prompt.", show_default=False)] = None,
    max_tokens: MaxTokens = 512,
    temperature: Temperature = None,
    top_p: TopP = None,
    seed: Seed = None,
    **settings: Any,
) -> None:
    """Talk to a model in the terminal.

    Loads a model here, or asks a running server: **branchwise chat http://127.0.0.1:8000**. **/reset** starts over,
    **/help** lists the commands, **/exit** or Ctrl-D leaves, Ctrl-C cuts an answer short.
    """
    with expected_failures():
        from .models import open_model

        if is_address(model_or_url):
            url = one_of(model_or_url, url, "--url")
        else:
            model = one_of(model_or_url, model, "--model")
        with open_model(model, url, api_key, **settings) as asked:
            flags = {"max_tokens": max_tokens, "temperature": temperature, "top_p": top_p, "seed": seed}
            conversation = _Conversation(asked, asked.sampling(flags, temperature=0.7), system)
            for line in _lines(asked):
                if line == "/exit":
                    break
                if line == "/reset":
                    conversation.reset()
                elif line[0] == "/" and line[1:].isalpha():
                    if line != "/help":
                        err.print(f"no command is called {escape(line)}", style="yellow")
                    out.print(HELP, markup=False)
                else:
                    conversation.ask(line)
        if conversation.failed and not sys.stdin.isatty():  # for scripts; a person has read the errors
            raise SystemExit(EXIT_FAILED)


class _Conversation:
    """A turn that fails leaves it as it was before."""

    def __init__(self, model: Model, params: SamplingParams, system: str | None) -> None:
        self._model = model
        self._params = params
        self._opening: list[ChatTurn] = [{"role": "system", "content": system}] if system else []
        if not model.has_template:
            err.print("the model has no chat template: writing the conversation as plain text", style="yellow")
        self.failed = False
        self.reset()

    def reset(self) -> None:
        self._turns = list(self._opening)

    def ask(self, line: str) -> None:
        from ...runtime.errors import BranchwiseError, EngineDead

        turns = [*self._turns, {"role": "user", "content": line}]
        try:
            answer = self._answer(turns)
        except EngineDead:
            raise  # no further question can be answered
        except BranchwiseError as error:
            self.failed = True
            err.print(f"[bold red]error:[/] {escape(in_flags(error))}", soft_wrap=True)
            err.print("your last message was dropped; /reset starts over", style="dim")
            return
        self._turns = [*turns, {"role": "assistant", "content": answer}]

    def _answer(self, turns: list[ChatTurn]) -> str:
        """Prints an answer while it is generated; returns all of it, or what came before a Ctrl-C."""
        pieces: list[str] = []
        began = time.perf_counter()
        first = began

        def show(text: str) -> None:
            nonlocal first
            if not pieces:
                first = time.perf_counter()
            pieces.append(text)
            out.print(text, end="", markup=False, soft_wrap=True)

        generated: Generated | None = None
        try:
            generated = self._model.converse(turns, self._params, show)
        except KeyboardInterrupt:
            out.print(" […]", end="", style="dim")
        finally:
            if pieces:
                out.print()
        if generated is not None and sys.stdin.isatty():
            err.print(_account(generated, first - began, time.perf_counter() - first), style="dim")
        return "".join(pieces)


def _account(generated: Generated, waited: float, seconds: float) -> str:
    """One line about an answer. ``waited``: seconds until its first text; ``seconds``: from then on."""
    tokens = generated.completion_tokens
    speed = f", {(tokens - 1) / seconds:.1f} tokens/s" if tokens > 1 and seconds > 0 else ""
    return (
        f"{tokens} tokens{speed}, first after {waited:.2f} s; "
        f"{generated.cached_tokens} of {generated.prompt_tokens} prompt tokens were cached"
    )


def _lines(model: Model) -> Iterator[str]:
    """The messages that are typed, until end of file, without empty ones. A terminal gets a prompt, history and line
    editing."""
    interactive = sys.stdin.isatty()
    if interactive:
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401  (`input` uses it)
        out.print(f"talking to {model.name}: type a message, /help for commands, Ctrl-D to leave", style="dim")
    while True:
        try:
            message = _message(PROMPT if interactive else "", MORE if interactive else "")
        except EOFError:
            if interactive:
                out.print()
            return
        if message:
            yield message


def _message(prompt: str, more: str) -> str:
    """One message: a line, lines that end with a backslash and the one after them, or all between two \"\"\"."""
    line = input(prompt).strip()
    lines = []
    if line.startswith(BLOCK):
        line = line.removeprefix(BLOCK)
        while not line.endswith(BLOCK):
            lines.append(line)
            line = input(more).rstrip()
        line = line.removesuffix(BLOCK)
    while line.endswith("\\"):
        lines.append(line[:-1])
        line = input(more).rstrip()
    return "\n".join([*lines, line]).strip()
