"""Measures the embedded model on held-out tasks, through Branchwise's own engine.

python evaluate.py [--model FOLDER] [--n 200] [--out results]   # writes results.md and results.json
python compare.py REFERENCE.json OTHER.json ...                 # the same items in two formats

Every name, label, tool, key and puzzle here is one that training never draws (see corpus/draw.py). Greedy unless said.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from fnmatch import fnmatch
from functools import partial
from pathlib import Path
from typing import Any
from zlib import crc32

from branchwise import Engine, RequestOutput, SamplingParams
from corpus import arithmetic, dialogue, extraction, fewshot, lookup, puzzle, recall, tools
from corpus.conversation import Conversation
from corpus.draw import Draw

HERE = Path(__file__).resolve().parent
Judge = Callable[[Conversation, str], bool]  # whether an answer is right
CONTEXT = 4352  # tokens
_CALL = re.compile(r"<tool_call>\n(.*)\n</tool_call>", re.DOTALL)


@dataclass(slots=True)
class Row:
    """One line of the table. ``right`` of ``asked``; ``items``: 1 or 0 for each, in order."""

    task: str
    right: int
    asked: int
    bar: float | None = None
    note: str = ""
    misses: list[dict[str, str]] = field(default_factory=list)
    items: str = ""

    @property
    def share(self) -> float:
        return self.right / self.asked if self.asked else math.nan

    @property
    def interval(self) -> tuple[float, float]:
        """95 %, after Wilson."""
        n, p, z = self.asked, self.share, 1.96
        middle, spread = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
        return (middle - spread) / (1 + z * z / n), (middle + spread) / (1 + z * z / n)


class Subject:
    """The model under test: conversations in, texts out."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine

    def prompt(self, messages: Sequence[dict[str, Any]], tool_list: list[dict[str, Any]] | None = None) -> list[int]:
        tokenizer = self.engine.tokenizer
        text = tokenizer.apply_chat_template(messages, tools=tool_list or None)
        return tokenizer.encode(text, add_special_tokens=False).tolist()

    def ask(self, text: str) -> list[int]:
        return self.prompt([{"role": "user", "content": text}])

    def answers(self, conversations: Sequence[Conversation]) -> list[str]:
        prompts = [self.prompt(c.prompt_messages, c.tools) for c in conversations]
        params = [SamplingParams(temperature=0, max_tokens=min(300, CONTEXT - len(prompt))) for prompt in prompts]
        return [output.text for output in self.engine.generate(prompts, params)]


def equal(conversation: Conversation, answer: str) -> bool:
    """The reference, or, where the conversation says so, everything that was expected."""
    if conversation.expect:
        return all(part in answer for part in conversation.expect)
    return answer.strip() == conversation.reference.strip()


def same_json(conversation: Conversation, answer: str) -> bool:
    try:
        return bool(json.loads(answer) == json.loads(conversation.reference))
    except ValueError:
        return False


def calls(conversation: Conversation, answer: str) -> bool:
    """The right tool with exactly the right arguments."""
    return called(answer) == called(conversation.reference) is not None


def called(answer: str) -> Any:
    match = _CALL.fullmatch(answer.strip())
    try:
        return None if match is None else json.loads(match[1])
    except ValueError:
        return None


def collect(make: Callable[[Draw], Conversation], families: str, n: int, seed: int) -> list[Conversation]:
    """The first ``n`` held-out conversations of a family; ``x*``: of every family whose name begins with ``x``."""
    draw, found = Draw(seed, held_out=True), list[Conversation]()
    while len(found) < n:
        conversation = make(draw)
        if fnmatch(conversation.family, families) and not conversation.plain:
            found.append(conversation)
    return found


def measure(
    subject: Subject,
    task: str,
    conversations: list[Conversation],
    right: Judge = equal,
    bar: float | None = None,
) -> Row:
    answers = subject.answers(conversations)
    row = Row(task, 0, len(answers), bar)
    for conversation, answer in zip(conversations, answers, strict=True):
        correct = right(conversation, answer)
        row.right += correct
        row.items += str(int(correct))
        if not correct and len(row.misses) < 5:
            asked = str(conversation.prompt_messages[-1]["content"])
            row.misses.append({"asked": asked[-300:], "answer": answer, "reference": conversation.reference})
    return row


# -- the puzzle ------------------------------------------------------------------------------------------------------------

Instance = tuple[puzzle.Numbers, int]
TRIES = 16  # whole answers sampled
BRANCHES = (32, 10, 10)  # steps proposed from each kept state: from four numbers, from three, from two
WIDTH = 8  # states kept of each puzzle


def one_answer(subject: Subject, instances: list[Instance]) -> tuple[list[bool], int]:
    """Whether the greedy answer is right, and the tokens generated for all puzzles."""
    return _answers(subject, instances, temperature=0, max_tokens=120)


def many_answers(subject: Subject, instances: list[Instance]) -> tuple[list[bool], int]:
    """Whether any of `TRIES` whole answers is right: what sampling without a tree gives."""
    return _answers(subject, instances, temperature=1.0, max_tokens=120, n=TRIES)


def sampled(subject: Subject, texts: list[str], **fields: Any) -> list[RequestOutput]:
    """Answers to each text. Each has its own random numbers: with equal ones the texts would not be independent."""
    params = [SamplingParams(seed=crc32(text.encode()) * 256, **fields) for text in texts]
    return subject.engine.generate([subject.ask(text) for text in texts], params)


def _answers(subject: Subject, instances: list[Instance], **fields: Any) -> tuple[list[bool], int]:
    outputs = sampled(subject, [puzzle.solve_prompt(*instance) for instance in instances], **fields)
    solved = [
        any(puzzle.solves(*instance, sample.text) for sample in output.outputs)
        for instance, output in zip(instances, outputs, strict=True)
    ]
    return solved, sum(sample.completion_tokens for output in outputs for sample in output.outputs)


def tree_search(subject: Subject, instances: list[Instance], judged: bool = True) -> tuple[list[bool], int]:
    """Breadth first: each kept state proposes steps by sampling, the rules throw out what is illegal, the evaluate prompt
    ranks what is left (``judged=False``: chance does), and `WIDTH` states go on. Solved: legal steps down to the target.
    """
    kept: list[list[puzzle.Numbers]] = [[numbers] for numbers, _ in instances]
    tokens = 0
    for depth, branches in enumerate(BRANCHES):
        jobs = [(i, state) for i, states in enumerate(kept) for state in states]
        texts = [puzzle.propose_prompt(state, instances[i][1]) for i, state in jobs]
        outputs = sampled(subject, texts, temperature=1.2, max_tokens=40, n=branches)
        children: list[set[puzzle.Numbers]] = [set() for _ in instances]
        for (i, state), output in zip(jobs, outputs, strict=True):
            tokens += sum(sample.completion_tokens for sample in output.outputs)
            children[i] |= {left for sample in output.outputs if (left := puzzle.apply(state, sample.text.strip()))}
        found = [(i, state) for i, states in enumerate(children) for state in sorted(states)]
        if depth == len(BRANCHES) - 1:
            break
        values = judge(subject, instances, found) if judged else [crc32(f"{depth} {i} {s}".encode()) for i, s in found]
        tokens += len(found) if judged else 0
        kept = [[] for _ in instances]
        for _, (i, state) in sorted(zip(values, found, strict=True), reverse=True):
            kept[i] += [state] if len(kept[i]) < WIDTH else []
    return [(target,) in states for (_, target), states in zip(instances, children, strict=True)], tokens


def judge(subject: Subject, instances: list[Instance], states: list[tuple[int, puzzle.Numbers]]) -> list[float]:
    """How likely the model thinks it that each state can still reach its puzzle's target: log P("yes")."""
    prompts = [subject.ask(puzzle.evaluate_prompt(state, instances[i][1])) for i, state in states]
    outputs = subject.engine.generate(prompts, SamplingParams(temperature=0, max_tokens=1, logprobs=5))
    yes = int(subject.engine.tokenizer.encode("yes", add_special_tokens=False)[0])
    return [dict(output.outputs[0].logprobs[0].top).get(yes, -99.0) for output in outputs]


def draw_puzzles(n: int) -> list[Instance]:
    """The first ``n`` different held-out puzzles."""
    draw, found = Draw(42, held_out=True), dict[Instance, None]()
    while len(found) < n:
        found[puzzle.instance(draw)] = None
    return list(found)


METHODS: dict[str, Callable[[Subject, list[Instance]], tuple[list[bool], int]]] = {
    "puzzle: one greedy answer": one_answer,
    "puzzle: tree search": tree_search,
    "puzzle: the same tree, states kept by chance": partial(tree_search, judged=False),
    f"puzzle: any of {TRIES} sampled answers": many_answers,
}


def solve(subject: Subject, method: str, instances: list[Instance]) -> Row:
    solved, tokens = METHODS[method](subject, instances)
    items = "".join(str(int(each)) for each in solved)
    return Row(method, sum(solved), len(items), note=f"{tokens / len(items):,.0f} tokens each", items=items)


# -- everything ------------------------------------------------------------------------------------------------------------


def lookups(subject: Subject, tokens: int, n: int, seed: int) -> list[Conversation]:
    """Held-out registers whose prompts are within 5 % of ``tokens`` long."""
    draw, found = Draw(seed, held_out=True), list[Conversation]()
    while len(found) < n:
        conversation = lookup.make(draw, int(tokens * (0.7 + 0.4 * draw.random())))
        if abs(len(subject.prompt(conversation.prompt_messages)) - tokens) <= 0.05 * tokens:
            found.append(conversation)
    return found


def tasks(subject: Subject, n: int) -> Iterator[tuple[str, Callable[[], list[Conversation]], Judge, float | None]]:
    """Rows with one answer for each item: the task, how its items are drawn, what is right, and the bar."""

    def drawn(make: Callable[[Draw], Conversation], families: str, seed: int) -> Callable[[], list[Conversation]]:
        return partial(collect, make, families, n, seed)

    for kind in ("words", "sentences", "glossary", "rule"):
        yield f"few-shot mapping: {kind}", drawn(fewshot.make, f"fewshot_{kind}", 11), equal, None
    yield "few-shot mapping, as mixed in training", drawn(fewshot.make, "fewshot*", 12), equal, 0.90
    asked = drawn(tools.make, "tools_call", 21)
    yield "tool call: right name, exact arguments", asked, calls, 0.90
    yield "tool call: valid JSON", asked, lambda _, answer: called(answer) is not None, 0.98
    yield "answer that uses the tool's result", drawn(tools.make, "tools_answer", 22), equal, 0.90
    yield "recall of an earlier fact: conversation", drawn(recall.make, "recall", 31), equal, 0.95
    yield "recall: facts about people in a text", drawn(recall.make, "recall_text", 32), equal, None
    yield "recall: who the system prompt says it is", drawn(recall.make, "recall_persona", 33), equal, None
    for tokens, bar in ((250, None), (1000, None), (2000, None), (4000, 0.80)):
        count = n if tokens < 1500 else max(1, n // 2)
        name = f"key-value look-up in {tokens:,} tokens"
        yield name, partial(lookups, subject, tokens, count, 50 + tokens), equal, bar
    yield "JSON extraction: every field", drawn(extraction.make, "extraction", 61), same_json, None
    yield "arithmetic: one sum", drawn(arithmetic.make, "arithmetic", 71), _result, None
    yield "arithmetic: word problems in steps", drawn(arithmetic.make, "arithmetic_steps", 72), equal, None
    yield "talk: names what the reference names", drawn(dialogue.make, "talk", 81), in_world, None


def evaluate(subject: Subject, n: int, puzzles: int, patterns: Sequence[str] = ("*",)) -> Iterator[Row]:
    """The rows whose names match one of ``patterns``, as they are measured."""
    for task, items, right, bar in tasks(subject, n):
        if matches(task, patterns):
            yield measure(subject, task, items(), right, bar)
    instances, greedy = [], 0
    for method in METHODS:
        if matches(method, patterns):
            instances = instances or draw_puzzles(puzzles)
            row = solve(subject, method, instances)
            if greedy:
                row.note = f"{row.right / greedy:.1f} × greedy; {row.note}"
            elif METHODS[method] is one_answer:
                greedy = row.right
            yield row


def matches(task: str, patterns: Sequence[str]) -> bool:
    return any(fnmatch(task, pattern) for pattern in patterns)


def _result(conversation: Conversation, answer: str) -> bool:
    """The last number: of a bare sum or of a word problem."""
    numbers, wanted = re.findall(r"\d+", answer), re.findall(r"\d+", conversation.reference)
    return bool(numbers) and numbers[-1] == wanted[-1]


def in_world(conversation: Conversation, answer: str) -> bool:
    """Whole sentences of known words; where the reference names someone or something, that too. Stories: no exact check."""
    return answer.endswith((".", "!", "?")) and (
        len(conversation.reference) > 200 or _gist(conversation.reference) <= set(answer.split())
    )


def _gist(reference: str) -> set[str]:
    """The reference's words with capitals, but for the first word of each sentence."""
    return {
        w
        for before, w in zip(reference.split(), reference.split()[1:], strict=False)
        if w[0].isupper() and before[-1] not in ".!?" and w != "I"
    }


def table(rows: list[Row], head: str) -> str:
    lines = [head, "", "| task | right | of | share | 95 % | bar, or note |", "|---|---:|---:|---:|---|---|"]
    for row in rows:
        low, high = row.interval
        bar = "" if row.bar is None else f"≥ {row.bar:.0%} {'met' if row.share >= row.bar else 'missed'}"
        lines.append(
            f"| {row.task} | {row.right} | {row.asked} | {row.share:.1%} | {low:.0%} to {high:.0%} | {row.note or bar} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="", help="a folder; default: the model that ships with Branchwise")
    parser.add_argument("--n", type=int, default=200, help="questions of each kind; half as many long ones")
    parser.add_argument("--puzzles", type=int, help="default: half as many")
    parser.add_argument("--rows", nargs="+", default=["*"], help="patterns of the rows to measure")
    parser.add_argument("--out", type=Path, default=HERE / "results")
    parser.add_argument("--device", default="auto")
    for flag in ("--dtype", "--quantization", "--kv-cache-dtype"):
        parser.add_argument(flag, default="auto", help="as of `branchwise serve`")
    parser.add_argument("--kv-cache-tokens", type=int, help="default: by memory; give it where runs share a device")
    args = parser.parse_args()
    begun = time.time()
    formats = {"dtype": args.dtype, "quantization": args.quantization, "kv_cache_dtype": args.kv_cache_dtype}
    with Engine(args.model, device=args.device, kv_cache_tokens=args.kv_cache_tokens, **formats) as engine:
        rows = []
        for row in evaluate(Subject(engine), args.n, args.puzzles or max(1, args.n // 2), args.rows):
            rows.append(row)
            print(f"{time.time() - begun:.0f} s: {row.task}: {row.right}/{row.asked}", flush=True)
            fields = json.dumps([asdict(each) for each in rows], indent=1, ensure_ascii=False)
            args.out.with_suffix(".json").write_text(fields, encoding="utf-8")
    head = (
        f"Held-out draws, greedy unless said; n = {args.n}, half as many long ones. "
        f"{time.strftime('%Y-%m-%d')}, {args.device}, {time.time() - begun:.0f} s."
    )
    text = table(rows, head)
    args.out.with_suffix(".md").write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
