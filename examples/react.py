"""ReAct (Yao et al., 2022): a thought, the action it leads to, the observation, and the next step."""

from accounting import show

import branchwise as bw

AGES = {"Mira": 34, "Tobin": 41, "Hesper": 68, "Rook": 57, "Juniper": 29, "Sol": 45, "Wren": 31, "Bram": 52}


@bw.function
def react(s, who):
    """How old is the friend of ``who``? The model knows the friend; only the register knows the age."""
    s += bw.system("You are a helpful assistant.")
    s += bw.user(f"Who is {who}'s friend?")
    s += bw.assistant(bw.gen("thought", max_tokens=20))
    s += bw.user("What is the name of the friend?")
    s += bw.assistant(f"{who}'s best friend is" + bw.select("action", [f" {name}" for name in AGES]) + ".")
    name = s["action"].strip()
    found = "\n".join(f"{one}: {age}" for one, age in AGES.items() if one[0] in name[0] + "RS")
    s += bw.user(f"Here is a register.\n{found}\n\nWhat is the value of {name}?")
    s += bw.assistant(bw.gen("answer", max_tokens=20))
    return name


def work() -> str:
    lines = []
    for state in react.run_batch(["Sol", "Mira", "Rook"], temperature=0):
        name = state.ret_value
        lines += [f"  thought:     {state['thought']}", f"  action:      look up {name}"]
        lines += ["  observation: the register's lines", f"  answer:      {state['answer']}"]
    return "\n".join(lines)


if __name__ == "__main__":
    show("ReAct", work)
