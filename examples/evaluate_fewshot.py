"""Few-shot evaluation: multiple choice by log-likelihood. The shots, and what choices share, are computed once."""

import random

from accounting import show

import branchwise as bw

NAMES = ["Bruno", "Clara", "Hanno", "Mira", "Otto", "Petra"]
TOWNS = ["Milford", "Penvale", "Zemol", "Fernhollow"]
QUESTIONS = 12


def item(draw):
    """A passage with a question about it, the right answer and three others."""
    people = draw.sample(NAMES, 2)
    facts = {who: (draw.choice(TOWNS), draw.randrange(20, 70)) for who in people}
    passage = " ".join(f"{who} lives in {town}. {who} is {age} years old." for who, (town, age) in facts.items())
    who = draw.choice(people)
    town, age = facts[who]
    if draw.random() < 0.5:
        choices = [f"{who} lives in {other}." for other in TOWNS]
        return f"{passage} Where does {who} live?", f"{who} lives in {town}.", choices
    ages = sorted({age, *draw.sample([n for n in range(20, 70) if n != age], 3)})
    return f"{passage} How old is {who}?", f"{who} is {age} years old.", [f"{who} is {n} years old." for n in ages]


@bw.function
def evaluate(s, shots, questions):
    for question, answer, _ in shots:
        s += bw.user(question) + bw.assistant(answer)
    forks = s.fork(len(questions))
    forks += lambda i: bw.user(questions[i][0])
    forks += lambda i: bw.assistant(bw.select("answer", questions[i][2]))
    return forks["answer"]


def work() -> str:
    draw = random.Random(1)
    shots, questions = [item(draw) for _ in range(5)], [item(draw) for _ in range(QUESTIONS)]
    answers = evaluate.run(shots, questions).ret_value
    right = sum(given == answer for given, (_, answer, _) in zip(answers, questions, strict=True))
    lines = [
        f"  {question.rpartition('. ')[2]:<28} {given}"
        for given, (question, _, _) in zip(answers, questions, strict=True)
    ]
    return "\n".join([*lines[:4], f"  {right} of {QUESTIONS} right"])


if __name__ == "__main__":
    show("Few-shot evaluation", work)
