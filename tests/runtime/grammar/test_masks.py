"""What may come next, against every text there is; and what the sampler makes of it."""

from __future__ import annotations

import itertools
import json
import random
import re

import numpy as np
import pytest
import torch

from branchwise.kernels import sampling
from branchwise.runtime.constraint import Constraint, ConstraintError
from branchwise.runtime.grammar.llg import GrammarBackend
from branchwise.runtime.grammar.matcher import Grammar, compute_masks, suppress
from branchwise.runtime.tokenizer.tokenizer import Tokenizer

EOS, LONGEST = 0, 7
PATTERNS = ["abc", "a*", "(ab|c)+", "a{2,3}b?", "[ab]*ca", "(a|ab)(c|bcd?)", "c(abc)*", "b|", "(?:a|b|c){4}"]


def bits(mask):
    return set(np.flatnonzero(np.unpackbits(mask.view(np.uint8), bitorder="little")).tolist())


def compiled(backend, text, kind="regex"):
    constraint = Constraint(kind, text)
    return Grammar(backend, backend.compile(constraint))


@pytest.fixture(scope="module")
def backend(tiny_tokenizer):
    return GrammarBackend(tiny_tokenizer, tiny_tokenizer.vocab_size, (EOS,))


@pytest.mark.parametrize("pattern", PATTERNS)
def test_a_mask_holds_the_tokens_after_which_a_match_is_possible_and_no_others(backend, tiny_tokenizer, pattern):
    texts = ("".join(letters) for n in range(LONGEST + 5) for letters in itertools.product("abc", repeat=n))
    matches = {text for text in itertools.islice(texts, 200_000) if re.fullmatch(pattern, text)}
    prefixes = {text[:n] for text in matches for n in range(len(text) + 1)}
    words = [tiny_tokenizer.token_text(token) for token in range(tiny_tokenizer.vocab_size)]
    grammar = compiled(backend, pattern)
    for seed in range(20):
        draw, matcher, said = random.Random(seed), grammar.matcher(), ""
        while len(said) < LONGEST:
            allowed = {t for t in range(1, len(words)) if said + words[t] in prefixes}
            if said in matches:
                allowed.add(EOS)
            matcher.compute_mask()
            if matcher.finished:
                assert allowed == {EOS}
                break
            assert matcher.error is None
            if len({words[token][0] for token in allowed}) == 1:
                # What must follow is certain: llguidance may insist on the token that the tokenizer would write.
                assert bits(matcher.mask) and bits(matcher.mask) <= allowed, (pattern, said)
            else:
                assert bits(matcher.mask) == allowed, (pattern, said)
            token = draw.choice(sorted(bits(matcher.mask)))
            if token == EOS:
                break
            said += words[token]
            matcher.advance(token)
            if matcher.finished:
                assert said in matches and not any(said + word in prefixes for word in words[1:])
                break


def test_choices_may_begin_like_each_other_and_hold_anything(checkpoint):
    tokenizer = Tokenizer.load(checkpoint("llama-gqa"))
    backend = GrammarBackend(tokenizer, tokenizer.vocab_size, (1,))
    choices = ["no", "nob", 'a"b\\', "é\n🌳", "x/y", "$x %json", "a.*b", "x\x7f\x00"]
    grammar = compiled(backend, json.dumps(choices), "choices")
    for choice in choices:
        matcher = grammar.matcher()
        for token in tokenizer.encode(choice)[1:].tolist():  # without <bos>
            matcher.compute_mask()
            assert token in bits(matcher.mask)
            matcher.advance(token)
        matcher.compute_mask()
        assert matcher.finished or 1 in bits(matcher.mask)
    matcher = grammar.matcher()
    assert not bits(matcher.mask) & set(tokenizer.encode("q")[1:].tolist())


def test_a_forbidden_token_and_a_grammar_that_nothing_satisfies_are_errors(backend):
    matcher = compiled(backend, "ab").matcher()
    matcher.advance(3)
    assert matcher.error is not None and matcher.ended and not matcher.finished
    with pytest.raises(ConstraintError, match="cannot be satisfied"):
        compiled(backend, '{"$ref": "#"}', "json_schema")


def test_every_matcher_goes_its_own_way(backend):
    grammar = compiled(backend, "(ab|c)+")
    one, other = grammar.matcher(), grammar.matcher()
    one.advance(1)
    one.compute_mask()
    other.compute_mask()
    assert bits(one.mask) == {2, 5}  # b, bc
    assert bits(other.mask) == {1, 3, 4, 6, 7}  # a, c, ab, abc, ca


def test_suppress_takes_tokens_away_unless_nothing_else_is_left():
    mask = np.array([0b1011, 1 << 5], np.uint32)
    suppress(mask, frozenset({0, 37, 999}))
    assert bits(mask) == {1, 3}
    suppress(mask, frozenset({1, 3}))
    assert bits(mask) == {1, 3}


@pytest.mark.parametrize("vocab_size", [31, 32, 33, 100])
def test_forbid_reaches_the_tokens_and_the_rows_it_is_told_and_no_others(vocab_size):
    rng = np.random.default_rng(vocab_size)
    logits = torch.from_numpy(rng.standard_normal((4, vocab_size)).astype(np.float32))
    before = logits.clone()
    allowed = rng.random((2, vocab_size)) < 0.4
    padded = np.pad(allowed, ((0, 0), (0, -vocab_size % 32)), constant_values=True)
    words = torch.from_numpy(np.packbits(padded, axis=1, bitorder="little").view(np.int32))
    some = sampling.apply_bitmask(logits, torch.tensor([1, 3]), words)
    assert torch.equal(logits, before)
    assert torch.equal(some[[0, 2]], before[[0, 2]])
    expected = torch.where(torch.from_numpy(allowed), before[[1, 3]], float("-inf"))
    assert torch.equal(some[[1, 3]], expected)
    assert torch.equal(sampling.apply_bitmask(before[[1, 3]], torch.tensor([0, 1]), words), expected)


def test_masks_filled_together_are_those_filled_alone(backend):
    """In a batch of different grammars at different places, one of which goes beyond the limits."""
    texts = ["[ab]+c", "abc|bca", "(ab|ca){2,4}", "a{1,3}"]
    grammars = [Grammar(backend, backend.compile(Constraint("regex", text))) for text in texts]
    together, alone = ([grammar.matcher() for grammar in grammars for _ in range(3)] for _ in range(2))
    rng = np.random.default_rng(0)
    for _ in range(4):
        for mine, other in zip(together, alone, strict=True):
            if not mine.ended:
                allowed = np.flatnonzero(np.unpackbits(mine.mask.view(np.uint8), bitorder="little"))
                token = int(rng.choice(allowed))
                mine.advance(token)
                other.advance(token)
        blank = [one for one in together if one.needs_mask]
        if blank:
            compute_masks(blank)
        for mine, other in zip(together, alone, strict=True):
            other.compute_mask()
            assert (mine.finished, mine.forced, mine.error) == (other.finished, other.forced, other.error)
            assert mine.finished or np.array_equal(mine.mask, other.mask)
