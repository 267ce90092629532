"""A chat of many turns: every turn reuses the turns before it."""

from accounting import show

import branchwise as bw

TURNS = [
    "Hello!",
    "My favourite colour is green. I live in Zemol.",
    "Who is Hesper?",
    "Where does Rook live?",
    "What is my favourite colour?",
    "Where do I live?",
    "Thank you!",
]


@bw.function
def chat(s):
    s += bw.system("You are Twig, a small helpful model.")
    for turn in TURNS:
        s += bw.user(turn)
        s += bw.assistant(bw.gen("said", max_tokens=60))


def work() -> str:
    shown = {"system": "", "user": "you > ", "assistant": "      "}
    return "\n".join(f"  {shown[one['role']]}{one['content']}" for one in chat.run(temperature=0).messages())


if __name__ == "__main__":
    show("A chat of many turns", work)
