"""Skeleton of thought (Ning et al., 2023): an outline first, then all its points in parallel."""

from accounting import show

import branchwise as bw


@bw.function
def describe(s):
    s += bw.system("You are Twig, a small helpful model.")
    s += bw.user("Name some people of Fernhollow.")
    s += bw.assistant(bw.gen("outline", max_tokens=60))
    names = s["outline"].rpartition(":")[2].strip(" .").replace(" and ", ", ").split(", ")[:5]
    forks = s.fork(len(names))
    forks += lambda i: bw.user(f"Tell me about {names[i]}.")
    forks += bw.assistant(bw.gen("point", max_tokens=50))
    forks.join()
    return names


def work() -> str:
    state = describe.run(temperature=0)
    return "\n".join([f"  {state['outline']}", *(f"  - {point}" for point in state["point"])])


if __name__ == "__main__":
    show("Skeleton of thought", work)
