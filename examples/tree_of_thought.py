"""Tree of thought (Yao et al., 2023): combine numbers with + - * to reach a target.

Every kept state is forked: each fork proposes a next step, another prompt asks whether the target can still be reached,
and the most promising go on. `bw.search` is the loop; rules are checked by the program.
"""

import math
import re

from accounting import show

import branchwise as bw

STEP = re.compile(r"(\d+) ([-+*]) (\d+) = (\d+)")
PUZZLES = [((2, 3, 4), 20), ((3, 5, 8), 16), ((2, 4, 6, 7), 26)]


def after(numbers, line):
    """The numbers left after a model's line; None if it breaks a rule."""
    found = STEP.match(line)
    if found is None:
        return None
    a, b, result = int(found[1]), int(found[3]), int(found[4])
    rest = list(numbers)
    for number in (a, b):
        if number not in rest:
            return None
        rest.remove(number)
    if result != {"+": a + b, "-": a - b, "*": a * b}[found[2]]:
        return None
    return tuple(sorted((*rest, result)))


def told(numbers, target):
    return f"Numbers: {' '.join(map(str, numbers))}. Target: {target}."


@bw.function
async def solve(s, numbers, target):
    s.set("numbers", numbers)
    s.set("steps", [])

    async def propose(fork):
        numbers = await fork["numbers"]
        fork += bw.user(f"{told(numbers, target)} Propose one next step.")
        fork += bw.assistant(bw.gen("step", max_tokens=24, temperature=0.8))
        step = await fork["step"]
        fork.set("numbers", after(numbers, step))
        fork.set("steps", [*await fork["steps"], step])

    async def score(fork):
        numbers = await fork["numbers"]
        if numbers is None:
            return None
        if len(numbers) == 1:
            return math.inf if numbers == (target,) else None
        fork += bw.user(f"{told(numbers, target)} Can the target still be reached?")
        fork += bw.assistant(bw.select("reachable", ["no", "yes"]))
        no, yes = (await fork.meta("reachable"))["normalized_prompt_logprobs"]
        return yes - no

    async def done(fork):
        return len(await fork["numbers"] or ()) == 1

    kept = await bw.search(s, propose, score, beam=3, depth=len(numbers) - 1, branches=6, done=done)
    return await kept[0]["steps"] if kept and await kept[0]["numbers"] == (target,) else None


def work() -> str:
    batch = [{"numbers": numbers, "target": target} for numbers, target in PUZZLES]
    lines = []
    for (numbers, target), state in zip(PUZZLES, solve.run_batch(batch, seed=1), strict=True):
        steps = state.ret_value
        lines.append(f"  {told(numbers, target):<40} {'; '.join(steps) if steps else 'not found'}")
    return "\n".join(lines)


if __name__ == "__main__":
    show("Tree of thought", work)
