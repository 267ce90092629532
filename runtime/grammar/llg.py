"""The only file that uses llguidance: compiles constraints within limits, and fills token masks."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any, cast

import numpy as np
from llguidance import LLExecutor, LLMatcher, LLParserLimits, LLTokenizer, regex_to_lark
from llguidance.gbnf_to_lark import any_to_lark

from ..constraint import Constraint, ConstraintError
from ..step import TokenBitmask
from . import schema
from .finite_rules import check_rules
from .vocabulary import Vocabulary

if TYPE_CHECKING:
    from ..tokenizer.tokenizer import Tokenizer

# Compilation takes milliseconds and a mask fractions of one. These limits bound the worst case: about 50 ms a step on
# this project's machine, for grammars written to be slow. A lexer state takes 1 to 2 KB of memory.
_LIMITS = LLParserLimits(
    max_items_in_row=5000,
    initial_lexer_fuel=500_000,
    step_lexer_fuel=50_000,
    step_max_items=50_000,
    max_lexer_states=20_000,
    max_grammar_size=200_000,
    verbose_errors=False,
)
_MAX_THREADS = 8  # of one parallel mask fill
_MAX_BRACKETS = 200  # nested brackets in an EBNF grammar: llguidance's converter is recursive
_MAX_RULES_LENGTH = 20_000_000  # rules × characters: the converter scans the text once a rule, 30 ns a character


class GrammarBackend:
    """llguidance for one model's tokenizer. ``eos_ids``: tokens that may end an output.

    Takes about 5 ms for every thousand tokens, holding the GIL. Raises `ConstraintError` if llguidance cannot use the
    tokenizer.
    """

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, eos_ids: Sequence[int]) -> None:
        try:
            vocabulary = Vocabulary(tokenizer, vocab_size, eos_ids)
            self._tokenizer = LLTokenizer(cast("Any", vocabulary), eos_token=sorted(eos_ids) or None)
            self._tokenizer.tokenize_str("a")  # what the tokenizer builds at its first use
        except Exception as error:  # llguidance raises plain ValueError and more
            raise ConstraintError(f"cannot be enforced with this model's tokenizer: {_one_line(str(error))}") from error
        self.eos_ids = frozenset(self._tokenizer.eos_tokens)
        self.mask_words = -(-vocab_size // 32)
        self._executor = LLExecutor(min(_MAX_THREADS, os.cpu_count() or 1))

    def compile(self, constraint: Constraint) -> LLMatcher:
        """A matcher at the grammar's start. Releases the GIL. Raises `ConstraintError` for what it cannot compile."""
        try:
            grammar = _grammar(constraint)
        except RecursionError as error:
            raise ConstraintError("is nested too deeply") from error
        matcher = LLMatcher(self._tokenizer, grammar, log_level=0, limits=_LIMITS)
        self.check(matcher)
        return matcher

    def fill_mask(self, matcher: LLMatcher, mask: TokenBitmask) -> None:
        """Overwrite ``mask`` [mask_words] with the tokens allowed next. Releases the GIL.

        Raises `ConstraintError` beyond the limits.
        """
        matcher.unsafe_compute_mask_ptr(mask.ctypes.data, mask.nbytes)
        self.check(matcher)

    def fill_masks(self, matchers: Sequence[LLMatcher]) -> TokenBitmask:
        """Masks of several matchers, uint32 [len(matchers), mask_words], in parallel and without the GIL.

        `check` each matcher afterwards: the mask of one that went beyond the limits is undefined.
        """
        masks = np.empty((len(matchers), self.mask_words), np.uint32)
        places = [(matcher, i) for i, matcher in enumerate(matchers)]
        self._executor.unsafe_compute_mask_ptr(places, masks.ctypes.data, masks.strides[0], len(matchers))
        return masks

    def check(self, matcher: LLMatcher) -> None:
        """Raise `ConstraintError` if the matcher has gone beyond the limits."""
        if matcher.is_error():
            raise ConstraintError(_reason(matcher.get_error()))

    def forced_tokens(self, matcher: LLMatcher) -> list[int]:
        """The tokens that must come next, up to the first choice: if there are any, the mask allows exactly the first.

        Text that several token sequences could spell is left out.
        """
        return list(matcher.compute_ff_tokens())


def _grammar(constraint: Constraint) -> str:
    kind, text = constraint
    if kind == "json_schema":
        return LLMatcher.grammar_from_json_schema(json.dumps(schema.parse(text)))
    if kind == "regex":
        # \d means [0-9], as in most regex users' minds; Unicode digits would surprise the output's reader.
        return LLMatcher.grammar_from_lark(f"start: /{regex_to_lark(text, use_ascii='d')}/")
    if kind == "choices":
        choices = " | ".join(json.dumps(choice, ensure_ascii=False) for choice in json.loads(text))
        choices = choices.replace("\x7f", "\\u007f")  # Lark's strings hold every other character that JSON's do
        return LLMatcher.grammar_from_lark(f"start: {choices}")
    if _depth(text) > _MAX_BRACKETS:
        raise ConstraintError(f"must have at most {_MAX_BRACKETS} nested brackets")
    rules = text.count("::=")
    if rules * len(text) > _MAX_RULES_LENGTH:
        raise ConstraintError(
            f"has {rules} rules in {len(text)} characters, of which the product must be at most {_MAX_RULES_LENGTH}"
        )
    try:
        lark = _with_rewritten_schemas(any_to_lark(text))
        check_rules(lark)
        return LLMatcher.grammar_from_lark(lark)
    except (RecursionError, ConstraintError):
        raise
    except Exception as error:
        raise ConstraintError(f"is not a grammar: {_one_line(str(error))}") from error


def _with_rewritten_schemas(lark: str) -> str:
    """The grammar with each ``%json {…}`` as `schema.parse` writes it, unless it has been there."""
    pieces, at = [], 0
    for match in re.finditer(r"%json\s*(?=\{)", lark):
        if match.start() >= at:
            value, end = json.JSONDecoder().raw_decode(lark, match.end())
            if "x-guidance" not in value:
                pieces += [lark[at : match.end()], json.dumps(schema.parse(json.dumps(value)))]
                at = end
    return "".join([*pieces, lark[at:]])


def _depth(text: str) -> int:
    depth = deepest = 0
    for bracket in re.findall(r"[()]", text):
        depth += 1 if bracket == "(" else -1
        deepest = max(deepest, depth)
    return deepest


def _reason(error: str) -> str:
    """llguidance's message in one line, without its state dump, as the end of a sentence about the field."""
    error = error.split("<state>")[0].split("<non-verbose/>")[0].strip()
    if match := re.match(r"Unimplemented keys: \[(.*)\]", error):
        names = match[1].replace('"', "")
        return f"uses {names}, which cannot be enforced" if names else error
    if error.startswith("NoExtension"):
        return "cannot be satisfied by any output"
    if error.startswith("oneOf constraints are not supported"):
        return "uses oneOf with branches that are not plainly exclusive, which cannot be enforced: use anyOf"
    if "Current row has" in error or "lexer error: too many" in error or "fuel" in error or "limit" in error:
        return f"is too complex to be enforced: {_one_line(error)}"
    return f"cannot be enforced: {_one_line(error)}"


def _one_line(error: str) -> str:
    """A multi-line message without its source excerpt and markers."""
    if "regex parse error:" in error and "\nerror: " in error:
        return f"bad regular expression: {error.rsplit('error: ', 1)[1].splitlines()[0]}"
    lines = [line.strip() for line in error.splitlines()]
    said = [line for line in lines if line and not re.fullmatch(r"[\^~ ]+|\d+ \|.*|\|.*", line)]
    said = [line for previous, line in pairwise(["", *said]) if line != previous]
    return " ".join(said)[:400]
