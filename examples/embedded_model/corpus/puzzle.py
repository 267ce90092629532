"""A search puzzle: combine all the numbers with + - * to reach the target.

Three prompts, after Tree of Thoughts (Yao et al., 2023): ``solve`` writes every step in one go, ``propose`` one next
step, ``evaluate`` says whether the target can still be reached.
"""

from __future__ import annotations

import re
from functools import lru_cache

from .conversation import Conversation, assistant, user
from .draw import Draw

Numbers = tuple[int, ...]
LARGEST = 199  # no step may exceed it
HARD = 2  # of about 18 first steps, at most so many lead to a solution
_STEP = re.compile(r"\s*(\d+) ([-+*]) (\d+) = (\d+)(?: \(left: ([\d ]+)\))?\s*")


def state(numbers: Numbers, target: int) -> str:
    return f"Numbers: {' '.join(map(str, numbers))}. Target: {target}."


def solve_prompt(numbers: Numbers, target: int) -> str:
    return f"{state(numbers, target)} Solve the puzzle: use every number once."


def propose_prompt(numbers: Numbers, target: int) -> str:
    return f"{state(numbers, target)} Propose one next step."


def evaluate_prompt(numbers: Numbers, target: int) -> str:
    return f"{state(numbers, target)} Can the target still be reached?"


def steps(numbers: Numbers) -> list[tuple[str, Numbers]]:
    """Every legal step: its text, and the sorted numbers that are left."""
    found = {}
    for i in range(len(numbers)):
        for j in range(i + 1, len(numbers)):
            small, large = sorted((numbers[i], numbers[j]))
            rest = numbers[:i] + numbers[i + 1 : j] + numbers[j + 1 :]
            for sign, result in (("+", large + small), ("-", large - small), ("*", large * small)):
                if 0 < result <= LARGEST:
                    left = tuple(sorted((*rest, result)))
                    found[f"{large} {sign} {small} = {result} (left: {' '.join(map(str, left))})"] = left
    return list(found.items())


@lru_cache(maxsize=500_000)
def targets(numbers: Numbers) -> frozenset[int]:
    """Everything the numbers can be made into."""
    if len(numbers) == 1:
        return frozenset(numbers)
    return frozenset().union(*(targets(left) for _, left in steps(numbers)))


def reachable(numbers: Numbers, target: int) -> bool:
    return target in targets(numbers)


def winning(numbers: Numbers, target: int) -> list[tuple[str, Numbers]]:
    return [step for step in steps(numbers) if target in targets(step[1])]


def apply(numbers: Numbers, line: str) -> Numbers | None:
    """The numbers left after a model's line, or None if it breaks a rule. What it says is left is not trusted."""
    match = _STEP.fullmatch(line)
    if match is None:
        return None
    a, sign, b, result = int(match[1]), match[2], int(match[3]), int(match[4])
    rest = list(numbers)
    for n in (a, b):
        if n not in rest:
            return None
        rest.remove(n)
    if result != {"+": a + b, "-": a - b, "*": a * b}[sign]:
        return None
    return tuple(sorted((*rest, result)))


def solves(numbers: Numbers, target: int, answer: str) -> bool:
    """Whether a full answer is right, checked step by step."""
    left: Numbers | None = numbers
    for line in answer.strip().splitlines():
        left = apply(left, line) if left is not None else None
    return left == (target,)


def instance(draw: Draw, count: int = 4, hard: bool = True) -> tuple[Numbers, int]:
    """A puzzle of this side that has a solution. Hard: few of the first steps lead to one."""
    while True:
        numbers = left = tuple(sorted(draw.between(1, 16) for _ in range(count)))
        while len(left) > 1 and (options := steps(left)):
            left = draw.pick(options)[1]
        target = left[0]
        if len(left) > 1 or not 10 <= target <= 99 or not draw.mine(f"{numbers} {target}"):
            continue
        if not hard or len(winning(numbers, target)) <= HARD:
            return numbers, target


def make(draw: Draw) -> Conversation:
    count = 4 if draw.chance(0.3 + 0.4 * draw.level) else draw.between(2, 3)
    numbers, target = instance(draw, count, hard=count == 4 and draw.chance(0.6))
    r = draw.random()
    if r < 0.3:
        lines, left = [], numbers
        while len(left) > 1:
            line, left = draw.pick(winning(left, target))
            lines.append(line)
        return Conversation("puzzle_solve", [user(solve_prompt(numbers, target)), assistant("\n".join(lines))])
    if r < 0.6:
        # Half of the proposals are any legal step: a proposer that is sampled must not put all its faith in a guess.
        line, _ = draw.pick(winning(numbers, target) if draw.chance(0.5) else steps(numbers))
        return Conversation("puzzle_propose", [user(propose_prompt(numbers, target)), assistant(line)])
    if count > 2 and draw.chance(0.9):
        options = steps(numbers)
        good = draw.chance(0.5)
        matching = [left for _, left in options if reachable(left, target) == good]
        numbers = draw.pick(matching or [left for _, left in options])
    answer = "yes" if reachable(numbers, target) else "no"
    return Conversation("puzzle_evaluate", [user(evaluate_prompt(numbers, target)), assistant(answer)])
