"""The sandbox chat templates run in: Jinja's immutable one, with Hugging Face's extensions, and bounded.

A template comes with a checkpoint, so it is untrusted code. Jinja's sandbox keeps it away from Python's internals but
does not bound its time or memory. Here every loop iteration and every call checks a deadline, and operations that turn
short values into long texts or large numbers check the size of their result first.
"""

from __future__ import annotations

import functools
import json
import re
import time
from collections.abc import Callable, Iterable, Iterator
from contextvars import ContextVar
from datetime import datetime
from typing import Any

from jinja2 import Template, meta, nodes
from jinja2.exceptions import SecurityError, TemplateError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace
from jinja2.visitor import NodeTransformer

MAX_INTEGER_BITS = 4096  # of a product or a power
MAX_WIDTH = 100_000  # of any integer argument of a filter or a method: widths, counts, indentation
_WIDTHS = re.compile(r"\d{6,}|\*")  # in a %-format


class Exhausted(Exception):
    """The template exceeded the budget of one rendering."""


class Budget:
    """Time and characters that one rendering may use."""

    __slots__ = ("_deadline", "_seconds", "characters")

    def __init__(self, seconds: float, characters: int) -> None:
        self._seconds = seconds
        self._deadline = time.monotonic() + seconds
        self.characters = characters

    def tick(self) -> None:
        if time.monotonic() > self._deadline:
            raise Exhausted(f"it took longer than {self._seconds:g} s")

    def text(self, length: int) -> None:
        if length > self.characters:
            raise Exhausted(f"it makes texts of more than {self.characters} characters")


_COMPILING = Budget(float("inf"), MAX_WIDTH)  # compiling folds constants
_budget: ContextVar[Budget] = ContextVar("budget", default=_COMPILING)


class Sandbox(ImmutableSandboxedEnvironment):
    intercepted_binops = frozenset({"+", "*", "**", "%"})  # these are not folded while compiling either

    def __init__(self) -> None:
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols])
        self.filters["tojson"] = _to_json
        self.filters = {name: _guarded(name, function) for name, function in self.filters.items()}
        self.filters[_ITERATIONS], self.filters[_JOINED] = _iterations, _joined
        del self.globals["lipsum"]  # its output has no bound
        self.globals |= {
            "raise_exception": _raise_exception,
            "strftime_now": _strftime_now,
            "dict": _Dict(),
            "namespace": _Namespace,
        }

    def compiled(self, source: str) -> tuple[Template, frozenset[str]]:
        """The template and the variables it reads but does not set. Raises `TemplateSyntaxError`."""
        return self.from_string(source), frozenset(meta.find_undeclared_variables(self.parse(source)))

    def run(self, template: Template, names: dict[str, Any], budget: Budget) -> str:
        """Renders. Raises `Exhausted`, or any exception that an expression of the template raises."""
        token = _budget.set(budget)
        try:
            pieces: list[str] = []
            length = 0
            for piece in template.generate(names):
                length += len(piece)
                budget.text(length)
                pieces.append(piece)
            return "".join(pieces)
        finally:
            _budget.reset(token)

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        tree: nodes.Template = _Watched().visit(super()._parse(source, name, filename))
        return tree

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        budget = _budget.get()
        budget.tick()
        if operator == "*":
            _check_product(budget, left, right)
        elif operator == "**":
            _check_power(left, right)
        elif operator == "%" and isinstance(left, str):
            _check_format(left)
        result = super().call_binop(context, operator, left, right)
        if isinstance(result, (str, list, tuple)):
            budget.text(len(result))
        return result

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        budget = _budget.get()
        budget.tick()
        owner = getattr(__obj, "__self__", None)
        if isinstance(owner, str):
            _check_arguments(__obj.__name__, (owner, *args), kwargs)
        result = super().call(__context, __obj, *args, **kwargs)
        if isinstance(result, str):
            budget.text(len(result))
        return result

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        """``str.format``, with the widths in its pattern and its arguments checked."""
        safe = super().wrap_str_format(value)
        if safe is None:
            return None

        def bounded(*args: Any, **kwargs: Any) -> str:
            _check_format(value.__self__)
            _check_arguments("format", (value.__self__, *args), kwargs)
            return safe(*args, **kwargs)

        return bounded

    @staticmethod
    def concat(pieces: Iterable[str]) -> str:
        """Joins the output of a macro or a ``{% set %}`` block."""
        pieces = list(pieces)
        _budget.get().text(sum(map(len, pieces)))
        return "".join(pieces)


_ITERATIONS, _JOINED = "branchwise iterations", "branchwise joined"  # no template can write these names


class _Watched(NodeTransformer):
    """Routes loops and ``~`` through filters: the code that Jinja compiles them to has no hook for the budget."""

    def visit_For(self, node: nodes.For) -> nodes.For:
        self.generic_visit(node)
        node.iter = nodes.Filter(node.iter, _ITERATIONS, [], [], None, None, lineno=node.lineno)
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Filter:
        self.generic_visit(node)
        return nodes.Filter(nodes.Tuple(node.nodes, "load"), _JOINED, [], [], None, None, lineno=node.lineno)


def _iterations(values: Iterable[Any]) -> Iterator[Any]:
    tick = _budget.get().tick
    for value in values:
        tick()
        yield value


def _joined(values: Iterable[Any]) -> str:
    return Sandbox.concat(map(str, values))


def _guarded(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)  # its marks say what Jinja passes to it
    def guarded(*args: Any, **kwargs: Any) -> Any:
        budget = _budget.get()
        budget.tick()
        given = args[1:] if hasattr(function, "jinja_pass_arg") else args
        _check_arguments(name, given, kwargs)
        result = function(*args, **kwargs)
        if isinstance(result, str):
            budget.text(len(result))
        return result

    return guarded


def _check_arguments(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Checks a call of a filter or string method, whose subject is ``args[0]``, against the budget."""
    for value in (*args[1:], *kwargs.values()):
        if isinstance(value, int) and abs(value) > MAX_WIDTH:
            raise Exhausted(f"{name} was given a number larger than {MAX_WIDTH}")
    budget, subject = _budget.get(), args[0]
    if name == "replace" and len(args) >= 3 and isinstance(subject, str):
        budget.text(subject.count(str(args[1])) * len(str(args[2])))
    elif name == "join" and isinstance(subject, (list, tuple)):
        between = len(str(args[1])) if len(args) > 1 else len(str(kwargs.get("d", "")))
        budget.text(sum(between + (len(item) if isinstance(item, str) else 0) for item in subject))
    elif name == "join" and isinstance(subject, str) and len(args) > 1 and isinstance(args[1], (list, tuple)):
        budget.text(sum(len(subject) + (len(item) if isinstance(item, str) else 0) for item in args[1]))
    elif name == "format" and isinstance(subject, str):
        _check_format(subject)


def _check_product(budget: Budget, left: Any, right: Any) -> None:
    if isinstance(left, int) and isinstance(right, int):
        if left.bit_length() + right.bit_length() > MAX_INTEGER_BITS:
            raise Exhausted("it makes numbers that are too large")
    elif isinstance(left, int) and hasattr(right, "__len__"):
        budget.text(left * len(right))
    elif isinstance(right, int) and hasattr(left, "__len__"):
        budget.text(right * len(left))


def _check_power(base: Any, exponent: Any) -> None:
    if isinstance(base, int) and isinstance(exponent, int) and base.bit_length() * exponent > MAX_INTEGER_BITS:
        raise Exhausted("it makes numbers that are too large")


def _check_format(pattern: str) -> None:
    if _WIDTHS.search(pattern):
        raise Exhausted(f"it formats to a width of more than {MAX_WIDTH}")


# -- Hugging Face's extensions (transformers.utils.chat_template_utils), which templates are written against -----------


class _Generation(Extension):
    """``{% generation %}`` marks the assistant's text for training masks; rendering ignores it."""

    tags = {"generation"}  # noqa: RUF012 - Jinja's own protocol

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)


class _Dict:
    """``dict(...)`` without the class's attributes."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)

    def fromkeys(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict.fromkeys(*args, **kwargs)


class _Namespace(Namespace):
    """Refuses names that begin with an underscore."""

    def __init__(*args: Any, **kwargs: Any) -> None:  # no ``self``: a template may use the name
        self, *rest = args
        values = dict(*rest, **kwargs)
        for name in values:
            _check_name(name)
        Namespace.__init__(self, values)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        super().__setitem__(name, value)


def _check_name(name: Any) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise SecurityError(f"a namespace takes no name that begins with an underscore, got {name!r}")


def _raise_exception(message: str) -> None:
    raise TemplateError(message)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Replaces Jinja's own filter, which escapes HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _strftime_now(format: str) -> str:
    return datetime.now().strftime(format)
