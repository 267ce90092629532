"""A judge after branch-solve-merge (Saha et al., 2023): two answers, compared by several criteria in parallel."""

from accounting import show

import branchwise as bw

SIDES = ["Who is {}?", "Tell me about {}.", "What does {} do?"]
CASES = [
    ("Mira", "Mira is the baker of Fernhollow.", "Mira is the ferryman of Fernhollow."),
    ("Tobin", "Tobin is the teacher of Fernhollow.", "Tobin is the miller of Fernhollow."),
    ("Sol", "Sol is the lamplighter of Fernhollow.", "Sol is the baker of Fernhollow."),
]


@bw.function
def judge(s, name, first, second):
    s += bw.system("You are a helpful assistant.")
    forks = s.fork(len(SIDES))
    forks += lambda i: bw.user(SIDES[i].format(name))
    forks += bw.assistant(bw.select("better", [first, second]))
    forks.join()
    votes = s["better"].count(first)
    return f"{'first' if votes * 2 > len(SIDES) else 'second'} ({votes} of {len(SIDES)} for the first)"


def work() -> str:
    batch = [{"name": name, "first": first, "second": second} for name, first, second in CASES]
    lines = []
    for (_, first, second), state in zip(CASES, judge.run_batch(batch), strict=True):
        lines.append(f"  {first} | {second}  ->  {state.ret_value}")
    return "\n".join(lines)


if __name__ == "__main__":
    show("Branch, solve, merge: a judge", work)
