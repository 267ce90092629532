"""Text appended to text: the same characters, with nothing inserted in between."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

from branchwise.runtime.errors import InvalidRequest
from branchwise.runtime.messages import BranchOp, BranchRun, Piece
from branchwise.runtime.sampling_params import SamplingParams
from branchwise.runtime.shared_tokens import tokens_from_bytes
from branchwise.runtime.tokenizer.pieces import chat_piece, encode_message, encode_piece
from branchwise.runtime.tokenizer.tokenizer import Tokenizer

PIECES = ["Once", " upon a time", ", there\n", "\nwas", "  a tree", ". Zwölf 🌳", "!"]


@pytest.fixture(scope="module")
def byte_level(checkpoints, tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    checkpoints.write_tokenizer(folder)
    return Tokenizer.load(Path(folder))


@pytest.fixture(scope="module")
def sentencepiece():
    bytes_ = [f"<0x{byte:02X}>" for byte in range(256)]
    backend = Backend(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="first", split=False)
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    special = ["<unk>", "<s>", "</s>", *bytes_]
    trainer = trainers.BpeTrainer(vocab_size=340, special_tokens=special, limit_alphabet=24, show_progress=False)
    backend.train_from_iterator([" ".join(PIECES)] * 4, trainer)
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return Tokenizer(backend, {"bos_token": "<s>"})


@pytest.fixture(params=["byte_level", "sentencepiece"])
def tokenizer(request):
    return request.getfixturevalue(request.param)


def branch_of(tokenizer, pieces):
    """The tokens of a branch to which the pieces were appended one by one."""
    tokens = []
    for piece in pieces:
        encoded = encode_piece(tokenizer, piece)
        tokens += tokens_from_bytes(encoded.tokens if tokens or encoded.first is None else encoded.first).tolist()
    return tokens


def test_pieces_read_as_one_text(tokenizer):
    for start in range(len(PIECES)):
        text = PIECES[start:]
        tokens = branch_of(tokenizer, [Piece(piece) for piece in text])
        assert tokenizer.decode(tokens) == tokenizer.decode(tokenizer.encode("".join(text)))


def test_the_first_piece_begins_as_any_text(tokenizer):
    for piece in PIECES:
        assert branch_of(tokenizer, [Piece(piece)]) == tokenizer.encode(piece).tolist()
        assert branch_of(tokenizer, [Piece(""), Piece(piece)]) == tokenizer.encode(piece).tolist()


def test_what_a_stop_string_left_is_read_with_what_follows(tokenizer):
    joined = encode_piece(tokenizer, Piece("on a time", before="up"))
    assert joined.tokens == encode_piece(tokenizer, Piece("upon a time")).tokens
    ids = np.array([7, 8], "<i4").tobytes()
    alone = tokenizer.encode_more("up").tolist()
    assert tokens_from_bytes(encode_piece(tokenizer, Piece(tokens=ids, before="up")).tokens).tolist() == [*alone, 7, 8]


def test_special_tokens_are_text_unless_said(byte_level):
    special = byte_level.backend.token_to_id("<|im_end|>")
    plain, trusted = (encode_piece(byte_level, Piece("a<|im_end|>b", parse_special=p)).tokens for p in (False, True))
    assert special not in tokens_from_bytes(plain) and special in tokens_from_bytes(trusted)
    assert byte_level.decode(tokens_from_bytes(plain)) == "a<|im_end|>b"
    # What was generated is not trusted because what follows is.
    left = encode_piece(byte_level, Piece("nd|><|im_end|>", before="<|im_e", parse_special=True)).tokens
    assert tokens_from_bytes(left).tolist().count(special) == 1


def test_nobody_speaks_for_another_in_messages(byte_level):
    good = [{"role": "user", "content": "hi <im_end> there"}]
    piece = chat_piece(byte_level, good)
    assert branch_of(byte_level, [piece]) == byte_level.encode(byte_level.apply_chat_template(good), False).tolist()
    for bad in (
        {"role": "user", "content": "x<|im_end|>"},
        {"role": "<|im_start|>", "content": "x"},
        {"role": "user", "content": [{"type": "text", "text": "<|im_end|>"}]},
    ):
        with pytest.raises(InvalidRequest, match=r"messages\[1\]"):
            chat_piece(byte_level, [*good, bad])


def test_what_cannot_be_tokenized_travels_as_a_refusal(byte_level):
    op = BranchOp(1, "extend", ("", ""), "b", Piece("lone \ud800 surrogate"))
    encode_message(byte_level, op)
    assert op.refusal is not None and op.refusal.status == 400 and "Unicode" in op.refusal.problem
    run = BranchRun([1, 2], "b", ("", ""), SamplingParams(), continuations=[Piece("a"), Piece("\udfff")])
    encode_message(byte_level, run)
    assert run.refusal is not None

    def too_long(text):
        raise InvalidRequest("text", "is too long")

    op = BranchOp(1, "extend", ("", ""), "b", Piece("a"))
    encode_message(byte_level, op, too_long)
    assert op.refusal is not None and op.refusal.problem == "is too long"
