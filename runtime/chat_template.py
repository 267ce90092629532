"""A model's own chat template: Jinja in a sandbox, with the extensions Hugging Face gives it.

A template comes with the checkpoint, so it is code from a stranger: it runs in Jinja's immutable sandbox and sees only
JSON values. Clients never send templates.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import cached_property
from typing import TYPE_CHECKING, Any

from .errors import InvalidRequest, LoadError

if TYPE_CHECKING:
    from jinja2 import Template


class ChatTemplate:
    """Renders conversations. Compiled when first used, so a server that is never asked to chat pays nothing."""

    def __init__(self, source: str, special_tokens: Mapping[str, str]) -> None:
        self._source = source
        self._special_tokens = dict(special_tokens)

    def render(
        self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool, variables: Mapping[str, Any]
    ) -> str:
        """The prompt's text; ``variables`` are extra names the template may use (such as ``tools``).

        Raises `InvalidRequest` if the template refuses or cannot cope with the messages, `LoadError` if it is not a
        valid template.
        """
        template = self._template
        names = {"tools": None, "documents": None, **self._special_tokens, **variables}
        names |= {"messages": [dict(message) for message in messages], "add_generation_prompt": add_generation_prompt}
        try:
            return template.render(names)
        except Exception as error:  # a template can raise whatever an expression can
            raise InvalidRequest(f"the chat template refused the messages: {error}", field="messages") from error

    @cached_property
    def _template(self) -> Template:
        from jinja2 import TemplateSyntaxError, nodes
        from jinja2.exceptions import TemplateError
        from jinja2.ext import Extension, loopcontrols
        from jinja2.parser import Parser
        from jinja2.sandbox import ImmutableSandboxedEnvironment

        class Generation(Extension):
            """``{% generation %}``: marks the assistant's share for training masks; means nothing here."""

            tags = {"generation"}  # noqa: RUF012 - Jinja's own protocol

            def parse(self, parser: Parser) -> nodes.Node:
                line = next(parser.stream).lineno
                return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)

        def raise_exception(message: str) -> None:
            raise TemplateError(message)

        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
        )
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = raise_exception
        environment.globals["strftime_now"] = _strftime_now
        try:
            return environment.from_string(self._source)
        except TemplateSyntaxError as error:
            raise LoadError(f"the model's chat template is not valid: line {error.lineno}: {error.message}") from error


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Jinja's own filter would escape HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _strftime_now(format: str) -> str:
    return datetime.now().strftime(format)
