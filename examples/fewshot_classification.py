"""Few-shot classification: one list of examples, many lines to label. The examples are computed once."""

from accounting import show

import branchwise as bw

EXAMPLES = """Label each line like the examples.
the soup was lovely -> good
what a dreadful hotel -> bad
I found the song delightful -> good
a really broken guide -> bad
the cake was so tasty today -> good
the room was so rude today -> bad
"""
LINES = ["the film was wonderful", "what a nasty trip", "I found the book boring", "a really great walk"]


@bw.function
def classify(s, lines):
    with s.user():
        s += EXAMPLES
        forks = s.fork(len(lines))
    forks += lambda i: lines[i] + " ->" + bw.user_end()
    forks += bw.assistant(bw.select("label", ["good", "bad"]))
    return forks["label"]


def work() -> str:
    labels = classify.run(LINES).ret_value
    return "\n".join(f"  {line:<28} {label}" for line, label in zip(LINES, labels, strict=True))


if __name__ == "__main__":
    show("Few-shot classification", work)
