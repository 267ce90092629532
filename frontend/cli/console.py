"""The terminal: where all commands print, and how an expected failure ends."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.markup import escape as escape

from ...runtime.errors import BranchwiseError, InvalidRequest, LoadError, why
from ..errors import BackendError

EXIT_FAILED = 1
EXIT_UNUSABLE = 2  # a model or a setting that cannot be loaded

_PIPE_WIDTH = 140  # of output that is not a terminal: wide enough for the tables

_FLAGS = {
    "max_tokens": "--max-tokens",
    "max_new_tokens": "--max-tokens",
    "temperature": "--temperature",
    "top_p": "--top-p",
    "top_k": "--top-k",
    "seed": "--seed",
    "sampling_seed": "--seed",
    "stop": "--stop",
}
_NAMES = {
    **_FLAGS,
    **{f"sampling_params{index}.{field}": flag for field, flag in _FLAGS.items() for index in ("", "[]")},
    "text": "prompt",
    "input_ids": "prompt",
}


def _console(stderr: bool) -> Console:
    stream = sys.stderr if stderr else sys.stdout
    piped = stream is None or not stream.isatty()  # None: closed, as a supervisor may start the command
    return Console(stderr=stderr, highlight=False, width=_PIPE_WIDTH if piped else None)


out = _console(stderr=False)
err = _console(stderr=True)


def in_flags(error: BranchwiseError) -> str:
    """The error's message, with flags instead of our own names of the fields and those of ``/generate``."""
    if isinstance(error, BackendError) and error.invalid is not None:
        reason = re.sub(r"\b(text|input_ids)(?= \d)", "prompt", str(error.invalid.renamed(_NAMES)))
        return str(error).removesuffix(error.reason) + reason
    return str(error.renamed(_NAMES) if isinstance(error, InvalidRequest) else error)


def fail(message: str, code: int = EXIT_FAILED) -> None:
    """Prints one line on stderr and exits."""
    err.print(f"[bold red]error:[/] {escape(message)}", soft_wrap=True)
    raise SystemExit(code)


def check_writable(file: Path) -> None:
    """Raises `LoadError` if a file cannot be made: before work whose result it is to hold."""
    try:
        file.touch()
    except OSError as error:
        raise LoadError(f"{file} cannot be written: {why(error, file)}") from error


@contextmanager
def expected_failures() -> Iterator[None]:
    """Turns failures that users can fix into one line on stderr: `LoadError` exits 2, the others 1, Ctrl-C 130."""
    try:
        yield
    except LoadError as error:
        fail(str(error), EXIT_UNUSABLE)
    except BranchwiseError as error:
        fail(in_flags(error))
    except KeyboardInterrupt:
        err.print()
        raise SystemExit(130) from None
    except BrokenPipeError:
        # The reader of a pipe left (`| head`). Without this the interpreter complains when it flushes at exit.
        sys.stderr.close()
        raise SystemExit(EXIT_FAILED) from None
