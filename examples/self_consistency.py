"""Self-consistency (Wang et al., 2022): many samples of one problem, and the answer that most of them reach."""

import re
from collections import Counter

from accounting import show

import branchwise as bw

PROBLEMS = [
    "Nora has 12 apples. She buys 7 more. She gives 5 to Tom. How many apples does Nora have now?",
    "Ben buys 4 packs of 6 pencils. Then he sells 9. How many are left?",
]


@bw.function
def solve(s, problem, ways):
    s += bw.user(problem)
    with s.assistant():
        s += bw.gen("way", n=ways, max_tokens=60)
    answers = Counter(found[1] for way in s["way"] if (found := re.search(r"answer is (-?\d+)", way)))
    return answers.most_common()


def work() -> str:
    batch = [{"problem": problem, "ways": 9} for problem in PROBLEMS]
    lines = []
    for problem, state in zip(PROBLEMS, solve.run_batch(batch, temperature=0.9, seed=1), strict=True):
        lines += [f"  {problem}", f"    {state['way'][0]}"]
        lines.append("    " + ", ".join(f"{answer}: {count} of 9" for answer, count in state.ret_value))
    return "\n".join(lines)


if __name__ == "__main__":
    show("Self-consistency", work)
