"""Questions about one long document, all at once. The document is computed once for all questions."""

from accounting import show

import branchwise as bw

ONSETS, VOWELS = ["b", "d", "f", "g", "k", "l", "m", "n", "p", "r", "s", "t"], ["a", "e", "i", "o", "u"]
WORDS = [f"{a}{x}{b}{y}l" for a in ONSETS for x in VOWELS for b in ONSETS[:4] for y in VOWELS[:2]][::4]
REGISTER = {word: str(1000 + 37 * i) for i, word in enumerate(WORDS)}
ASKED = WORDS[3::15]


@bw.function
def look_up(s, keys):
    with s.user():
        s += "Here is a register.\n" + "".join(f"{key}: {value}\n" for key, value in REGISTER.items()) + "\n"
        forks = s.fork(len(keys))
    forks += lambda i: f"What is the value of {keys[i]}?" + bw.user_end()
    forks += bw.assistant(bw.gen("value", max_tokens=8))
    return forks["value"]


def work() -> str:
    values = look_up.run(ASKED, temperature=0).ret_value
    right = sum(REGISTER[key] == value for key, value in zip(ASKED, values, strict=True))
    shown = ", ".join(f"{key}: {value}" for key, value in zip(ASKED, values, strict=True))
    return f"  {len(REGISTER)} entries; {shown}\n  {right} of {len(ASKED)} right"


if __name__ == "__main__":
    show("Questions about one long document", work)
