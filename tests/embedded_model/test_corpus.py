"""The generator: training and test never meet, texts are what the chat template makes, answers are right."""

from __future__ import annotations

import itertools
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from branchwise.runtime.tokenizer.tokenizer import Tokenizer
from corpus import extraction, fewshot, lookup, mixture, puzzle, recall, tools
from corpus import tokenizer as corpus_tokenizer
from corpus.conversation import Conversation, clean, render, split_marks
from corpus.draw import Draw, is_held_out

EXAMPLE = Path(corpus_tokenizer.__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    corpus_tokenizer.save(corpus_tokenizer.train(characters=300_000), folder, 4352)
    return folder


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> Tokenizer:
    return Tokenizer.load(folder)


def conversations(seed: int, n: int, **options: object) -> list[Conversation]:
    found = []
    for conversation, count in itertools.islice(mixture.stream(Draw(seed, **options)), n):  # type: ignore[arg-type]
        count(len(render(conversation)))
        found.append(conversation)
    return found


def test_the_same_seed_draws_the_same_texts() -> None:
    assert [render(c) for c in conversations(3, 60)] == [render(c) for c in conversations(3, 60)]
    assert [render(c) for c in conversations(3, 60)] != [render(c) for c in conversations(4, 60)]


def test_the_same_seed_draws_the_same_texts_in_another_process() -> None:
    """Where a set of strings is iterated, the order hangs on the process's hash seed."""
    code = (
        "import itertools, zlib; from corpus import mixture; from corpus.conversation import render\n"
        "from corpus.draw import Draw\nfor c, count in itertools.islice(mixture.stream(Draw(3, level=0.5)), 300):\n"
        "    count(len(render(c))); print(c.family, zlib.crc32(render(c).encode()))"
    )
    drawn = [
        subprocess.check_output([sys.executable, "-c", code], text=True, cwd=EXAMPLE, env={"PYTHONHASHSEED": seed})
        for seed in ("1", "2")
    ]
    assert drawn[0] == drawn[1] and drawn[0].count("\n") == 300


def test_invented_words_and_codes_of_training_and_test_never_meet() -> None:
    sides: list[set[str]] = []
    for held_out in (False, True):
        draw = Draw(1, held_out)
        sides.append({draw.word() for _ in range(3000)} | {draw.code() for _ in range(3000)})
    assert not sides[0] & sides[1]
    assert all(is_held_out(text) for text in sides[1]) and not any(is_held_out(text) for text in sides[0])


def test_puzzles_of_training_and_test_never_meet() -> None:
    sides = [{puzzle.instance(Draw(seed, held_out)) for seed in range(150)} for held_out in (False, True)]
    assert not sides[0] & sides[1]


def test_tool_names_and_labels_of_a_held_out_draw_are_held_out() -> None:
    for seed in range(40):
        for tool in tools.make(Draw(seed, held_out=True)).tools:
            assert is_held_out(tool["function"]["name"])
    label = fewshot._classify(Draw(5, held_out=True), 2, lambda c: str(c))[-1][1]
    assert is_held_out(label)


def test_the_chat_template_renders_what_was_trained_on(tokenizer: Tokenizer) -> None:
    for conversation in conversations(11, 250, level=0.7):
        if conversation.plain:
            continue
        text = clean(render(conversation)).removesuffix("<|endoftext|>")
        prompt = tokenizer.apply_chat_template(conversation.prompt_messages, tools=conversation.tools or None)
        assert text == prompt + conversation.reference + "<|im_end|>\n"


def test_the_chat_template_is_the_same_in_transformers(folder: Path, tokenizer: Tokenizer) -> None:
    transformers = pytest.importorskip("transformers")
    theirs = transformers.PreTrainedTokenizerFast.from_pretrained(folder)
    for conversation in [tools.make(Draw(seed)) for seed in range(20)] + [
        recall.make(Draw(seed)) for seed in range(20)
    ]:
        messages, listed = conversation.prompt_messages, conversation.tools or None
        expected = theirs.apply_chat_template(messages, tools=listed, tokenize=False, add_generation_prompt=True)
        assert tokenizer.apply_chat_template(messages, tools=listed) == expected


def test_arguments_given_as_json_text_render_as_those_given_as_objects(tokenizer: Tokenizer) -> None:
    call = {"type": "function", "function": {"name": "f", "arguments": {"a": 1, "b": "x"}}}
    as_text = {"type": "function", "function": {"name": "f", "arguments": json.dumps({"a": 1, "b": "x"})}}
    texts = {
        tokenizer.apply_chat_template(
            [{"role": "user", "content": "do"}, {"role": "assistant", "content": None, "tool_calls": [one]}]
        )
        for one in (call, as_text)
    }
    assert len(texts) == 1
    assert '<tool_call>\n{"name": "f", "arguments": {"a": 1, "b": "x"}}\n</tool_call><|im_end|>' in texts.pop()


def test_a_name_is_the_same_tokens_wherever_it_stands(tokenizer: Tokenizer) -> None:
    draw = Draw(2, held_out=True)
    for name in [draw.name() for _ in range(100)] + [draw.code() for _ in range(100)]:
        alone = tokenizer.encode(name).tolist()
        for before, after in ((" ", "."), ('{"name": "', '"}'), ("(", ")"), ("\n", "\n"), ("", " -> x")):
            ids = tokenizer.encode(before + name + after).tolist()
            first = len(tokenizer.encode(before))
            assert ids[first : first + len(alone)] == alone


def test_a_prompt_and_its_answer_are_the_tokens_of_the_whole(tokenizer: Tokenizer) -> None:
    """Otherwise the model would be asked to go on from tokens it never saw."""
    for conversation in conversations(8, 200, level=0.5):
        if conversation.plain:
            continue
        prompt = tokenizer.apply_chat_template(conversation.prompt_messages, tools=conversation.tools or None)
        parts = tokenizer.encode(prompt).tolist() + tokenizer.encode(conversation.reference).tolist()
        assert tokenizer.encode(prompt + conversation.reference).tolist() == parts


def test_marks_are_removed_and_cover_the_answers() -> None:
    for conversation in conversations(21, 200):
        text, edges = split_marks(render(conversation))
        assert not re.search("[\x02\x03]", text) and len(edges) % 2 == 0 and edges == sorted(edges)
        if conversation.messages:
            last = text[edges[-2] : edges[-1]]
            assert last == conversation.reference + "<|im_end|>"


def test_answers_are_right_by_other_means() -> None:
    for seed in range(100):
        asked = lookup.make(Draw(seed, level=0.3))
        assert asked.reference in asked.messages[0]["content"]
        fields = json.loads(extraction.make(Draw(seed)).reference)
        assert fields
        call = tools.make(Draw(seed))
        for message in call.messages:
            for made in message.get("tool_calls", ()):
                listed = {tool["function"]["name"]: tool["function"]["parameters"] for tool in call.tools}
                schema = listed[made["function"]["name"]]
                assert set(schema["required"]) <= set(made["function"]["arguments"]) <= set(schema["properties"])


def test_puzzle_answers_follow_the_rules() -> None:
    for seed in range(60):
        draw = Draw(seed)
        numbers, target = puzzle.instance(draw)
        left, lines = numbers, []
        while len(left) > 1:
            line, left = draw.pick(puzzle.winning(left, target))
            lines.append(line)
        assert puzzle.solves(numbers, target, "\n".join(lines))
        assert not puzzle.solves(numbers, target + 1, "\n".join(lines))
        assert not puzzle.solves(numbers, target, "\n".join(lines[:-1]))


@pytest.mark.parametrize("line", ["3 + 4 = 8", "3 + 5 = 8", "7 / 1 = 7", "3 - 4 = -1", "nonsense", ""])
def test_illegal_steps_are_refused(line: str) -> None:
    assert puzzle.apply((3, 4, 9), line) is None
    assert puzzle.apply((3, 4, 9), "9 - 4 = 5 (left: 1 2 3)") == (3, 5)  # what is left is worked out, not believed


def test_batches_depend_on_their_number_alone(folder: Path) -> None:
    from tokenizers import Tokenizer as Backend

    from corpus.batches import Batches, make_batch

    text = (folder / "tokenizer.json").read_text(encoding="utf-8")
    batches = Batches(text, seed=5, first=1, total=4, rows=2, length=1024, workers=2)
    try:
        made = list(batches)
    finally:
        batches.close()
    assert len(made) == 3
    for k, batch in enumerate(made, start=1):
        alone = make_batch(Backend.from_str(text), 5, k, k / 4, 2, 1024)
        assert (alone.tokens == batch.tokens).all() and (alone.starts == batch.starts).all()
        filled = batch.weights > 0
        assert filled.mean() > 0.7
        assert (batch.starts <= range(1024)).all()
