"""The tokenizer and chat templates against transformers, on real BPE vocabularies built here."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import AddedToken, decoders, models, pre_tokenizers, processors, trainers
from tokenizers import Tokenizer as Backend

from branchwise.runtime.errors import InvalidRequest, LoadError
from branchwise.runtime.tokenizer.special_tokens import eos_token_id
from branchwise.runtime.tokenizer.tokenizer import SHORT, Tokenizer

CORPUS = [
    "The quick brown fox jumps over the lazy dog. A tree of tokens grows a branch for every question.",
    "Zwölf Boxkämpfer jagen Viktor quer über den großen Sylter Deich. 东京 is a city; 🌳 is a tree.",
    'def fork(n): return [{"name": "lookup"} for _ in range(n)]\n\n    # four spaces',
]
TEXTS = ["", "The quick fox", " leading", "two  spaces\n\n\ttab", "你好 🙂🏽 naïve", "<s>not a bos?</s>", *CORPUS]

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
LLAMA3 = """{{- bos_token }}
{%- if not date_string is defined %}
    {%- set date_string = strftime_now("%Y") %}
{%- endif %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system = messages[0]['content']|trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system = "" %}
{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\\n\\nToday: " + date_string + "\\n" + system + "<|eot_id|>" }}
{%- for tool in tools or [] %}
    {{- tool | tojson(indent=2) }}
{%- endfor %}
{%- for message in messages %}
    {%- if message.role not in ['user', 'assistant'] %}
        {{- raise_exception('unknown role: ' + message.role) }}
    {%- endif %}
    {%- if message.skip %}{% continue %}{% endif %}
    {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' }}
    {%- generation %}{{- message['content'] | trim + '<|eot_id|>' }}{%- endgeneration %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}
"""
CONVERSATION = [
    {"role": "system", "content": " You are terse. "},
    {"role": "user", "content": "<b>Hi</b> & \"hello\" 'there' 你好"},
    {"role": "assistant", "content": "Yes?\n"},
    {"role": "user", "content": "Name a tree."},
]


def byte_level() -> Backend:
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.train_from_iterator(
        CORPUS,
        trainers.BpeTrainer(
            vocab_size=420,
            special_tokens=["<s>", "</s>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    backend.add_tokens([AddedToken("<tool>", special=False), AddedToken("é東", special=False)])
    return backend


def sentencepiece_like() -> Backend:
    bytes_ = [f"<0x{byte:02X}>" for byte in range(256)]
    backend = Backend(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="first", split=False)
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=480, special_tokens=["<unk>", "<s>", "</s>", *bytes_], limit_alphabet=60, show_progress=False
    )
    backend.train_from_iterator(CORPUS, trainer)
    state = json.loads(backend.to_str())
    for token in state["added_tokens"]:  # the trainer makes every initial token special; bytes are not
        token["special"] = not token["content"].startswith("<0x")
    return Backend.from_str(json.dumps(state))


def template_processing(backend: Backend, single: str) -> None:
    ids = [(token, backend.token_to_id(token)) for token in ("<s>", "</s>") if token in single]
    backend.post_processor = processors.TemplateProcessing(single=single, special_tokens=ids)


def save(folder: Path, backend: Backend, **config: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    backend.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>", **config}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="module")
def oracle() -> Callable[[Path], Any]:
    from transformers import AutoTokenizer

    return lambda folder: AutoTokenizer.from_pretrained(folder)


def test_a_long_text_is_encoded_as_any_other(checkpoint: Callable[[str], Path]) -> None:
    tokenizer = Tokenizer.load(checkpoint("llama-gqa"))
    text = " ".join(CORPUS) * (SHORT // len(" ".join(CORPUS)) + 2)
    assert len(text) > SHORT
    for special in (True, False):
        expected = tokenizer.backend.encode(text, add_special_tokens=special)
        assert tokenizer.encode(text, special).tolist() == expected.ids
    with pytest.raises(InvalidRequest, match="lone surrogates"):
        tokenizer.encode(text + "\ud800")


@pytest.mark.parametrize("make", [byte_level, sentencepiece_like])
@pytest.mark.parametrize("single", [None, "<s> $A", "<s> $A </s>"])
@pytest.mark.parametrize("config", [{}, {"add_bos_token": True}, {"add_bos_token": False, "add_eos_token": True}])
def test_encoding_is_that_of_auto_tokenizer(
    oracle: Callable[[Path], Any],
    tmp_path: Path,
    make: Callable[[], Backend],
    single: str | None,
    config: dict[str, Any],
) -> None:
    backend = make()
    if single:
        template_processing(backend, single)
    folder = save(tmp_path / "model", backend, **config)
    ours, theirs = Tokenizer.load(folder), oracle(folder)
    for text in TEXTS:
        ids = ours.encode(text)
        assert ids.dtype == np.int32
        assert ids.tolist() == theirs(text)["input_ids"]
        assert (
            ours.encode(text, add_special_tokens=False).tolist() == theirs(text, add_special_tokens=False)["input_ids"]
        )
        for skip in (True, False):
            expected = theirs.decode(ids, skip_special_tokens=skip, clean_up_tokenization_spaces=False)
            assert ours.decode(ids, skip_special_tokens=skip) == expected
    assert (ours.bos_id, ours.eos_id) == (theirs.bos_token_id, theirs.eos_token_id)
    assert ours.special_ids == set(theirs.all_special_ids) | {
        id for id, token in theirs.added_tokens_decoder.items() if token.special
    }


def test_a_checkpoint_of_every_kind_of_config(checkpoint: Callable[[str], Path], oracle: Callable[[Path], Any]) -> None:
    folder = checkpoint("llama-gqa")
    ours, theirs = Tokenizer.load(folder), oracle(folder)
    for text in TEXTS:
        assert ours.encode(text).tolist() == theirs(text)["input_ids"]
    assert ours.vocab_size == len(theirs)


def test_saved_truncation_and_padding_do_not_apply(oracle: Callable[[Path], Any], tmp_path: Path) -> None:
    backend = byte_level()
    backend.enable_truncation(4)
    backend.enable_padding(length=64, pad_id=0, pad_token="<s>")
    folder = save(tmp_path / "model", backend)
    text = "A tree of tokens grows a branch"
    assert Tokenizer.load(folder).encode(text).tolist() == oracle(folder)(text)["input_ids"]


def test_tokens_that_only_the_config_knows_are_added(oracle: Callable[[Path], Any], tmp_path: Path) -> None:
    backend = byte_level()
    at = backend.get_vocab_size()
    entry = {"lstrip": False, "rstrip": False, "normalized": False, "single_word": False}
    added = {
        str(at + 1): {"content": "<b>", "special": False, **entry},
        str(at): {"content": "<a>", "special": True, **entry},
    }
    pad = {"__type": "AddedToken", "content": "<pad>", **entry}
    folder = save(tmp_path / "model", backend, added_tokens_decoder=added, pad_token=pad)
    ours, theirs = Tokenizer.load(folder), oracle(folder)
    text = "x<a>y<b>z<pad>"
    assert ours.encode(text).tolist() == theirs(text)["input_ids"]
    assert ours.decode(ours.encode(text)) == "xy<b>z"
    assert ours.special_tokens["pad_token"] == "<pad>"


PLAIN = {"lstrip": False, "rstrip": False, "normalized": False, "single_word": False}


@pytest.mark.parametrize(
    ("config", "files"),
    [
        ({"added_tokens_decoder": {"417": {"content": "<tool>", "special": True, **PLAIN}}}, {}),
        ({"added_tokens_decoder": {"417": {"content": "<tool>", "special": True, **PLAIN, "lstrip": True}}}, {}),
        ({"added_tokens_decoder": {"0": {"content": "<s>", "special": False, **PLAIN}}, "bos_token": None}, {}),
        ({"added_tokens_decoder": {"1": {"content": "</s>", "special": False, **PLAIN}}}, {}),
        ({"additional_special_tokens": ["<tool>", "<x>"]}, {}),
        ({"extra_special_tokens": ["<tool>", "<x>"]}, {}),
        ({"extra_special_tokens": {"image_token": "<tool>"}}, {}),
        ({"eos_token": "<tool>"}, {}),
        ({"eos_token": "e"}, {}),
        ({}, {"special_tokens_map.json": {"eos_token": "<tool>", "additional_special_tokens": ["<x>"]}}),
        ({}, {"added_tokens.json": {"<x>": 419}}),
        (
            {"added_tokens_decoder": {"417": {"content": "<tool>", "special": False, **PLAIN}}},
            {"special_tokens_map.json": {"eos_token": "<tool>"}},
        ),
    ],
)
def test_special_flags_are_read_as_by_auto_tokenizer(
    oracle: Callable[[Path], Any], tmp_path: Path, config: dict[str, Any], files: dict[str, Any]
) -> None:
    folder = save(tmp_path / "model", byte_level(), **config)
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content))
    ours, theirs = Tokenizer.load(folder), oracle(folder)
    added = theirs.added_tokens_decoder
    assert ours.special_ids == {id for id, token in added.items() if token.special}
    text = "a <tool> é東 b<x><s>c</s>"
    ids = ours.encode(text)
    assert ids.tolist() == theirs(text)["input_ids"]
    assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    assert (ours.bos_id, ours.eos_id) == (theirs.bos_token_id, theirs.eos_token_id)
    assert eos_token_id(folder) == ours.eos_id


@pytest.mark.parametrize("make", [byte_level, sentencepiece_like])
@pytest.mark.parametrize("single", [None, "<s> $A"])
def test_a_dump_is_the_whole_tokenizer(tmp_path: Path, make: Callable[[], Backend], single: str | None) -> None:
    backend = make()
    if single:
        template_processing(backend, single)
    entry = {"content": "<a>", "special": True, "lstrip": True, "normalized": False}
    added = {str(backend.get_vocab_size()): entry}
    here = Tokenizer.load(save(tmp_path / "model", backend, added_tokens_decoder=added, chat_template=CHATML))
    there = Tokenizer.of_dump(json.loads(json.dumps(here.dump())))
    for text in (*TEXTS, "x <a>y"):
        for encode in (Tokenizer.encode, Tokenizer.encode_first, Tokenizer.encode_more):
            assert encode(here, text).tolist() == encode(there, text).tolist()
        ids = here.encode(text)
        assert here.decode(ids) == there.decode(ids) and here.decode(ids, False) == there.decode(ids, False)
    assert here.apply_chat_template(CONVERSATION) == there.apply_chat_template(CONVERSATION)
    for name in ("special_tokens", "special_ids", "vocab_size", "byte_level", "bos_id", "eos_id"):
        assert getattr(here, name) == getattr(there, name)
    assert here.opening.tolist() == there.opening.tolist()


@pytest.mark.parametrize("dump", [None, {}, {"tokenizer": "{", "special_tokens": {}, "chat_template": None}])
def test_what_is_no_dump_is_refused(dump: Any) -> None:
    with pytest.raises(LoadError, match="this is no tokenizer"):
        Tokenizer.of_dump(dump)


@pytest.mark.parametrize("make", [byte_level, sentencepiece_like])
def test_token_bytes_joined_are_the_text(make: Callable[[], Backend]) -> None:
    tokenizer = Tokenizer(make())
    for text in (*TEXTS, "<tool>é東 x"):
        ids = tokenizer.encode(text, add_special_tokens=False).tolist()
        joined = b"".join(tokenizer.token_bytes(id) for id in ids).decode()
        assert joined.removeprefix("" if tokenizer.byte_level else " ") == tokenizer.decode(ids, False)
    assert tokenizer.token_bytes(10**6) == b"" and tokenizer.token_text(10**6) == ""
    assert tokenizer.token_text(tokenizer.backend.token_to_id("</s>")) == "</s>"


def test_byte_tokens_are_known_as_such() -> None:
    tokenizer = Tokenizer(sentencepiece_like())
    byte = tokenizer.backend.token_to_id("<0xE4>")
    assert byte in tokenizer.byte_token_ids and len(tokenizer.byte_token_ids) == 256
    assert tokenizer.token_bytes(byte) == b"\xe4"
    assert tokenizer.token_text(byte) == "\ufffd"
    assert not Tokenizer(byte_level()).byte_token_ids


@pytest.mark.parametrize(
    ("files", "says"),
    [
        ({}, "needs a tokenizer.json"),
        ({"tokenizer.json": b"{"}, "tokenizer.json"),
        ({"tokenizer.json": b"\xff\xfe"}, "tokenizer.json"),
        ({"tokenizer.json": None, "tokenizer_config.json": b"{nope"}, "tokenizer_config.json"),
        ({"tokenizer.json": None, "tokenizer_config.json": b"[1]"}, "JSON object"),
        ({"tokenizer.json": None, "chat_template.jinja": b"\xff"}, "chat_template.jinja"),
    ],
)
def test_folders_that_cannot_be_loaded(tmp_path: Path, files: dict[str, bytes | None], says: str) -> None:
    for name, content in files.items():
        (tmp_path / name).write_bytes(byte_level().to_str().encode() if content is None else content)
    with pytest.raises(LoadError, match=says) as caught:
        Tokenizer.load(tmp_path)
    assert "\n" not in str(caught.value)


def test_text_that_is_not_unicode_is_refused() -> None:
    with pytest.raises(InvalidRequest, match="Unicode"):
        Tokenizer(byte_level()).encode("a\ud800b")


@pytest.mark.parametrize("template", [CHATML, LLAMA3])
@pytest.mark.parametrize("where", ["config", "file", "named"])
def test_chat_templates_render_as_in_transformers(
    oracle: Callable[[Path], Any], tmp_path: Path, template: str, where: str
) -> None:
    config: dict[str, Any] = {}
    if where == "config":
        config["chat_template"] = template
    elif where == "named":
        config["chat_template"] = [{"name": "x", "template": "wrong"}, {"name": "default", "template": template}]
    folder = save(tmp_path / "model", byte_level(), **config)
    if where == "file":
        (folder / "chat_template.jinja").write_text(template)
    ours, theirs = Tokenizer.load(folder), oracle(folder)
    tools = [{"type": "function", "function": {"name": "f", "description": "<é> & 'x'"}}]
    for messages in (CONVERSATION, CONVERSATION[1:], [*CONVERSATION, {"role": "user", "content": "!", "skip": True}]):
        for add in (True, False):
            for extra in ({}, {"tools": tools}, {"date_string": "1999"}):
                text = ours.apply_chat_template(messages, add_generation_prompt=add, **extra)
                expected = theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=add, **extra)
                assert text == expected
                assert text
    ids = ours.encode(ours.apply_chat_template(CONVERSATION), add_special_tokens=False)
    assert ids.tolist() == list(theirs.apply_chat_template(CONVERSATION, add_generation_prompt=True)["input_ids"])


@pytest.mark.parametrize(
    ("template", "error", "says"),
    [
        (None, InvalidRequest, "no chat template"),
        ("{% for %}", LoadError, "line 1"),
        ("{{ raise_exception('roles must alternate') }}", InvalidRequest, "roles must alternate"),
        ("{{ messages[99].content.upper() }}", InvalidRequest, "refused"),
        ("{{ 1 // 0 }}", InvalidRequest, "refused"),
        ("{{ messages.append(1) }}", InvalidRequest, "refused"),
        ("{{ ''.__class__.__mro__[1].__subclasses__() }}", InvalidRequest, "refused"),
    ],
)
def test_chat_templates_that_fail(template: str | None, error: type[Exception], says: str) -> None:
    tokenizer = Tokenizer(byte_level(), {}, template)
    with pytest.raises(error, match=says):
        tokenizer.apply_chat_template(CONVERSATION)


def test_other_threads_run_while_a_long_text_is_tokenized() -> None:
    """A thread of its own was no help while the library kept the interpreter: a server stood still for a minute."""
    tokenizer = Tokenizer(byte_level())
    text = "a word or two, " * 60_000
    with ThreadPoolExecutor(1) as pool:
        work = pool.submit(tokenizer.encode, text)
        turns = 0
        while not work.done():
            time.sleep(0.001)
            turns += 1
    assert turns > 5  # about a hundred; 1 if it keeps the interpreter to the end
    ids = work.result()
    assert ids[:3000].tolist() == tokenizer.encode(text[:10_000], True)[:3000].tolist()
    assert tokenizer.decode(ids) == text
    with pytest.raises(InvalidRequest, match="lone surrogates"):
        tokenizer.encode("\ud800" * 20_000)


def test_it_needs_neither_transformers_nor_torch() -> None:
    code = (
        "import sys, branchwise.runtime.tokenizer.detokenizer, branchwise.runtime.tokenizer.tokenizer;"
        "print([m for m in ('transformers', 'torch', 'jinja2') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
