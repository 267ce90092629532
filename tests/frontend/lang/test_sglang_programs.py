"""Programs written as SGLang's documentation and benchmarks write them, unchanged but for the import."""

from __future__ import annotations

import asyncio
import re

import pytest

import branchwise as sgl
from branchwise import assistant, function, gen, select, system, user

pytestmark = pytest.mark.usefixtures("engine")

MIRA = "Mira is the baker of Fernhollow. She lives next to the market square."


def test_few_shot_question_answering():
    @sgl.function
    def few_shot_qa(s, question):
        s += "The following are questions with answers.\n\n"
        s += "Q: What is the capital of France?\n"
        s += "A: Paris\n"
        s += "Q: What is the capital of Germany?\n"
        s += "A: Berlin\n"
        s += "Q: " + question + "\n"
        s += "A:" + sgl.gen("answer", stop="\n", temperature=0)

    state = few_shot_qa.run(question="What is the capital of the United States?")
    assert "\n" not in state["answer"]
    assert state.text().endswith("What is the capital of the United States?\nA:" + state["answer"])


def test_an_expert_answers_with_roles_and_a_context_manager():
    @function
    def expert_answer(s, question):
        s += system("You are a helpful assistant.")
        s += user(question)
        with s.assistant():
            s += gen("expert", max_tokens=30)
            s += (
                "\nFor instance, "
                + s["expert"].split()[0]
                + " would answer that"
                + gen("answer", stop=".", max_tokens=16)
                + "."
            )
        s += user("Who is the baker?") + assistant(select("who", choices=["Mira", "Tobin"]))

    state = expert_answer.run(question="Who is Mira?", temperature=0)
    assert state["expert"] == MIRA and state["who"] == "Mira"
    assert state.messages()[2]["content"].startswith(MIRA + "\nFor instance, Mira would answer that" + state["answer"])


def test_tip_suggestion_forks():
    @sgl.function
    def tip_suggestion(s):
        s += "Here are two tips for staying healthy: 1. Balanced Diet. 2. Regular Exercise.\n\n"
        forks = s.fork(2)
        for i, f in enumerate(forks):
            f += f"Now, expand tip {i + 1} into a paragraph:\n"
            f += sgl.gen("detailed_tip", max_tokens=16, stop="\n\n")
        s += "Tip 1:" + forks[0]["detailed_tip"] + "\n"
        s += "Tip 2:" + forks[1]["detailed_tip"] + "\n"
        s += "In summary" + sgl.gen("summary", max_tokens=8)

    text = tip_suggestion.run(temperature=0.5, seed=1).text()
    assert re.search(r"\n\nTip 1:.*\nTip 2:.*\nIn summary", text, re.DOTALL)


def test_branches_of_a_group_take_text_one_by_one():
    """``forks[i] += ...`` reads a branch, appends, and puts it back where it was."""

    @sgl.function
    def program(s):
        s += "x"
        forks = s.fork(2)
        for i in range(2):
            forks[i] += str(i)
            forks[i] += sgl.gen("a", max_tokens=1)
        s["note"] = [fork.text()[:2] for fork in forks]
        with pytest.raises(TypeError, match="a branch of a group can be appended to"):
            forks[0] = forks[1]
        forks.join()
        s += sgl.gen("last", max_tokens=1)

    state = program.run(temperature=0)
    assert state["note"] == ["x0", "x1"] and len(state["a"]) == 2


def test_a_copy_is_a_context_manager_whose_variables_are_gathered():
    @sgl.function
    def program(s):
        s += "x"
        with s.copy() as tmp:
            tmp += "y" + sgl.gen("a", max_tokens=1)
        with pytest.raises(sgl.ProgramError, match="joined or closed"):
            tmp += "more"
        with pytest.raises(TypeError, match="only a copy"), s:
            pass
        return s["a"], s.text()

    values, text = program.run(temperature=0).ret_value
    assert len(values) == 1 and text == "x"


def test_multi_turn_with_a_sized_fork_and_every_argument_by_name():
    @sgl.function
    def multi_turn_question(s, question_1, question_2):
        s += sgl.system("You are a helpful assistant.")
        s += sgl.user(question_1)
        s += sgl.assistant(sgl.gen("answer_1", max_tokens=256))
        forks = s.fork(size=1, position_ids_offset=None)
        forks += sgl.user(question_2)
        forks += sgl.assistant(sgl.gen("answer_2", max_tokens=256))
        s.set_var(name="answer_2", value=forks[0].get_var(name="answer_2"))

    state = multi_turn_question.run(
        question_1="Who is Mira?", question_2="Who is Tobin?", temperature=0, use_thread=True
    )
    assert [one["role"] for one in state.messages()] == ["system", "user", "assistant"]
    assert state["answer_1"] == MIRA and state.get_meta_info(name="answer_1")["completion_tokens"] > 5
    assert state["answer_2"].startswith("Tobin is the ")


def test_tool_use_chooses_and_then_goes_its_way():
    @sgl.function
    def tool_use(s, question):
        s += "To answer this question: " + question + ", "
        s += "I need to use a " + sgl.gen("tool", choices=["calculator", "web browser"]) + ". "
        if s["tool"] == "calculator":
            s += "The math expression is" + sgl.gen("expression", max_tokens=4)
        elif s["tool"] == "web browser":
            s += "The website url is" + sgl.gen("url", max_tokens=4)

    state = tool_use.run(question="What is 2 + 2?", temperature=0)
    named = {"calculator": "expression", "web browser": "url"}[state["tool"]]
    assert state.text().endswith(f"I need to use a {state['tool']}. The {_words(named)} is{state[named]}")


def _words(name: str) -> str:
    return {"expression": "math expression", "url": "website url"}[name]


ADDRESS = r"((25[0-5]|2[0-4]\d|[01]?\d\d?)\.){3}(25[0-5]|2[0-4]\d|[01]?\d\d?)"
CHARACTER = (
    r"""\{\n"""
    + r"""    "name": "[\w\d\s]{1,16}",\n"""
    + r"""    "house": "(Gryffindor|Slytherin|Ravenclaw|Hufflepuff)",\n"""
    + r"""    "alive": "(Alive|Deceased)"\n"""
    + r"""\}"""
)


@pytest.mark.parametrize("regex", [ADDRESS, CHARACTER], ids=["address", "character"])
def test_a_regular_expression_shapes_the_answer(regex):
    @sgl.function
    def regular_expression_gen(s):
        s += "Q: What is the IP address of the Google DNS servers?\n"
        s += "A: " + sgl.gen("answer", temperature=0, max_tokens=256, regex=regex)

    assert re.fullmatch(regex, regular_expression_gen.run()["answer"])


@sgl.function
def text_qa(s, question):
    s += sgl.user(question)
    s += sgl.assistant(sgl.gen("answer", stop="\n"))


@pytest.mark.parametrize(
    "batch",
    [
        [{"question": "Who is Mira?"}, {"question": "Who is Tobin?"}],
        [("Who is Mira?",), ("Who is Tobin?",)],
        [["Who is Mira?"], ["Who is Tobin?"]],
    ],
    ids=["dicts", "tuples", "lists"],
)
def test_a_batch_of_arguments(batch):
    states = text_qa.run_batch(batch, max_new_tokens=64, temperature=0, num_threads=2, progress_bar=True)
    assert [state["answer"].split()[0] for state in states] == ["Mira", "Tobin"]


def test_streaming():
    state = text_qa.run(question="Who is Mira?", temperature=0, stream=True)
    assert "".join(state.text_iter(var_name="answer")) == MIRA
    assert "".join(state.text_iter()) == state.text()

    async def follow():
        state = text_qa.run(question="Who is Mira?", temperature=0, stream=True)
        return [pair async for pair in state.text_async_iter(var_name="answer", return_meta_data=True)]

    pairs = asyncio.run(follow())
    assert "".join(text for text, _ in pairs) == MIRA and pairs[-1][1]["finish_reason"]["type"] == "stop"


async def test_an_async_states_text_has_its_meta_data_too():
    pairs = []

    @sgl.function
    async def program(s):
        s += sgl.user("Who is Mira?") + sgl.assistant(sgl.gen("answer", max_tokens=40))
        pairs.extend([pair async for pair in s.text_async_iter("answer", return_meta_data=True)])

    async for _ in program.astream(temperature=0):
        pass
    assert "".join(text for text, _ in pairs) == MIRA and pairs[-1][1]["completion_tokens"] > 5
