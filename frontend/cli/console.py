"""What all commands share on the terminal: where they print, and how an expected failure ends."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.markup import escape as escape

from ...runtime.errors import BranchwiseError
from .wording import in_flags

EXIT_FAILED = 1
EXIT_UNUSABLE = 2  # a model or a setting that cannot be loaded

# In a pipe there is no width to fit: one wide enough for the tables.
_PIPE_WIDTH = 140


def _console(stderr: bool) -> Console:
    piped = not (sys.stderr if stderr else sys.stdout).isatty()
    return Console(stderr=stderr, highlight=False, width=_PIPE_WIDTH if piped else None)


out = _console(stderr=False)
err = _console(stderr=True)


def fail(message: str, code: int = EXIT_FAILED) -> None:
    """Prints one line on stderr and leaves."""
    err.print(f"[bold red]error:[/] {escape(message)}", soft_wrap=True)
    raise SystemExit(code)


@contextmanager
def expected_failures() -> Iterator[None]:
    """Turns failures people can mend into one line on stderr: `LoadError` exits 2, the others 1, Ctrl-C 130.

    Errors about a request name flags instead of fields.
    """
    from ...runtime.errors import LoadError

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
        # The reader of a pipe left (`| head`). Keep the interpreter from complaining when it flushes at exit.
        sys.stderr.close()
        raise SystemExit(EXIT_FAILED) from None
