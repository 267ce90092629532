"""Tree of thought (Yao et al., 2023): combine all numbers with + - * to reach a target.

Breadth first: the prompt of every kept state is forked, and each fork samples a next step. Steps that break the rules
are dropped, the model ranks the rest, and the best are kept. `bw.search` is this loop for thoughts that form one
conversation; here every state has a prompt of its own, as in the paper.
"""

import re

from accounting import show

import branchwise as bw

STEP = re.compile(r"(\d+) ([-+*]) (\d+) = (\d+)")
PUZZLES = [((2, 3, 4), 20), ((2, 4, 6, 7), 26), ((6, 7, 13, 13), 68)]


def after(numbers, line):
    """The numbers left after the model's step; None if it breaks a rule."""
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
async def solve(s, numbers, target, beam=6, branches=16):
    kept = {numbers: []}  # what is left: the steps that led there
    for _ in numbers[1:]:
        prompts = s.fork(len(kept))
        prompts += [bw.user(f"{told(left, target)} Propose one next step.") for left in kept]
        forks = [prompt.fork(branches) for prompt in prompts]
        for group in forks:
            group += bw.assistant(bw.gen("step", max_tokens=24, temperature=1.2))
        found = {}
        for (left, steps), group in zip(kept.items(), forks, strict=True):
            for step in await group["step"]:
                if (rest := after(left, step)) is not None:
                    found.setdefault(rest, [*steps, step.split(" (")[0]])
        if (target,) in found:
            return found[(target,)]
        kept = await likeliest(s, {left: steps for left, steps in found.items() if len(left) > 1}, target, beam)
    return None


async def likeliest(s, found, target, beam):
    """Of the states found, those from which the model rates the target most reachable."""
    if not found:
        return {}
    asked = s.fork(len(found))
    asked += [bw.user(f"{told(left, target)} Can the target still be reached?") for left in found]
    asked += bw.assistant(bw.select("reachable", ["no", "yes"]))
    scores = [(await fork.meta("reachable"))["normalized_prompt_logprobs"] for fork in asked]
    ranked = sorted(zip(scores, found.items(), strict=True), key=lambda one: one[0][0] - one[0][1])
    return dict(state for _, state in ranked[:beam])


def work() -> str:
    batch = [{"numbers": numbers, "target": target} for numbers, target in PUZZLES]
    lines = []
    for (numbers, target), state in zip(PUZZLES, solve.run_batch(batch, seed=1), strict=True):
        steps = state.ret_value
        lines.append(f"  {told(numbers, target):<40} {'; '.join(steps) if steps else 'not found'}")
    return "\n".join(lines)


if __name__ == "__main__":
    show("Tree of thought", work)
