"""SGLang's language has defects (see the table in docs/language.md); here each has a test that it is not ours."""

from __future__ import annotations

import asyncio

import pytest

import branchwise as bw
from branchwise.frontend.errors import BackendError
from branchwise.runtime.sampling_params import SamplingParams


def test_1_join_by_appending_keeps_what_every_branch_said_token_for_token(engine):
    kept = {}

    @bw.function
    def program(s):
        s += "Three words:"
        forks = s.fork(3)
        forks += lambda i: f"\n{i + 1}." + bw.gen("word", max_tokens=4, temperature=0, ignore_eos=True)
        texts = [fork.text() for fork in forks]
        forks.join("concate_and_append")
        s += "\nEnd." + bw.gen("end", max_tokens=1)
        kept["texts"] = texts

    state = program.run()
    said = "".join(text.removeprefix("Three words:") for text in kept["texts"])
    assert state.text() == "Three words:" + said + "\nEnd." + state["end"]
    # The prompt of the last gen holds the very tokens that the branches generated.
    assert state.meta("end")["prompt_tokens"] > 3 * 4


def test_2_a_second_round_with_the_same_name_is_a_second_round(echo):
    @bw.function
    def program(s):
        s += "x"
        for round in range(2):
            forks = s.fork(2)
            forks += lambda i: f"[{round}{i}]" + bw.gen("a")  # noqa: B023 - called at once
            forks.join()
            s += "".join(s["a"])

    state = program.run(backend=echo(lambda prompt: prompt[-4:]))
    assert state["a"] == ["[10]", "[11]"]
    assert state.text() == "x[00][01][10][11]"


def test_3_what_a_fork_shares_is_computed_before_its_branches_ask(engine):
    """SGLang's hint looked at text that had not been executed yet, and so was hardly ever sent."""
    prompt = "There is a mill by the river, and an old bridge, and a baker who sings in the morning.\n"

    @bw.function
    def program(s):
        s += prompt
        forks = s.fork(8)
        forks += lambda i: f"{i}:" + bw.gen("a", max_tokens=1)
        forks.join()

    state = program.run()
    tokens = len(asyncio.run(engine.codec()).tokenizer.encode(prompt))
    assert [meta["cached_tokens"] for meta in state.meta("a")] == [tokens] * 8


def test_4_a_batch_of_n_runs_the_program_n_times(echo):
    runs = []

    @bw.function
    def program(s, i):
        runs.append(i)
        s += "a long prefix that is longer than sixty-four characters, as it happens: " + str(i) + bw.gen("x")

    program.run_batch([{"i": i} for i in range(5)], backend=echo(lambda prompt: "ok"))
    assert sorted(runs) == [0, 1, 2, 3, 4]


def test_5_a_failed_call_raises_at_the_read_with_message_variable_and_line(echo):
    backend = echo(lambda prompt: BackendError("the queue is full", status=503))

    @bw.function
    def program(s):
        s += "x"
        s += bw.gen("y")  # the line in question
        return s["y"]

    with pytest.raises(bw.ProgramError) as caught:
        program.run(backend=backend)
    error = caught.value
    assert (error.message, error.variable, error.backend) == ("the queue is full", "y", "the echo")
    assert error.__cause__.status == 503
    file, _, line = error.site.rpartition(":")
    assert file == __file__
    assert "the line in question" in open(file).read().splitlines()[int(line) - 1]  # noqa: PTH123, SIM115


def test_5_a_failure_nobody_read_raises_at_the_end_of_the_run(echo):
    @bw.function
    def program(s):
        s += "x" + bw.gen("y")

    with pytest.raises(bw.ProgramError, match="no such model"):
        program.run(backend=echo(lambda prompt: BackendError("no such model")))


def test_5_a_failure_the_program_was_told_of_is_the_programs_business(echo):
    @bw.function
    def program(s):
        fork = s.fork(1)[0]
        fork += "x" + bw.gen("y")
        try:
            return fork["y"]
        except bw.ProgramError as error:
            return error.message

    assert program.run(backend=echo(lambda prompt: BackendError("gone"))).ret_value == "gone"


def test_6_chat_without_select_says_so_and_names_the_server():
    from branchwise.frontend.lang.openai import OpenAIBackend

    @bw.function
    def program(s):
        s += bw.user("yes or no?")
        s += bw.assistant(bw.select("a", ["yes", "no"]))

    with pytest.raises(bw.ProgramError, match=r"http://127\.0\.0\.1:1.*cannot score"):
        program.run(backend=OpenAIBackend("http://127.0.0.1:1", "m", chat=True))


def test_7_the_chat_template_is_the_tokenizers_own(engine, tokenizer):
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Who is Sol?"}]

    @bw.function
    def program(s):
        for message in messages:
            s += getattr(bw, message["role"])(message["content"])
        s += bw.assistant(bw.gen("a", max_tokens=1))

    text = tokenizer.apply_chat_template(messages)
    state = program.run()
    assert state.text().startswith(text)
    assert state.meta("a")["prompt_tokens"] == len(tokenizer.encode(text, add_special_tokens=False))


def test_8_programs_see_and_control_reuse(engine):
    @bw.function
    def program(s):
        s += "The mill stands by the river Lind." + bw.gen("a", max_tokens=1)

    assert program.run().meta("a")["cache"] == {"hit_tokens": 0, "reason": "cold"}
    warm = program.run().meta("a")
    assert warm["cache"]["reason"] == "hit" and warm["cached_tokens"] == warm["prompt_tokens"] - 1
    assert program.run(backend=engine.without_cache()).meta("a")["cached_tokens"] == 0
    bw.flush_cache()
    assert program.run().meta("a")["cached_tokens"] == 0


def test_9_run_sets_defaults_for_every_sampling_argument(echo):
    backend = echo(lambda prompt: "7", constraints=frozenset({"regex", "json_schema"}))

    @bw.function
    def program(s):
        s += "x" + bw.gen("a") + bw.gen("b", regex="[a-z]", min_tokens=1)

    program.run(backend=backend, min_tokens=2, max_tokens=4, json_schema={"type": "integer"}, top_k=3, logprobs=1)
    first, second = backend.asked
    assert not first.text_in_logprobs
    assert first.params == SamplingParams(min_tokens=2, max_tokens=4, top_k=3, logprobs=1)
    assert first.constraint == {"json_schema": '{"type": "integer"}'}
    assert second.params.min_tokens == 1 and second.constraint == {"regex": "[a-z]"}
    sglang = {"return_logprob": True, "top_logprobs_num": 2, "return_text_in_logprobs": True, "logprob_start_len": -1}
    program.run(backend=backend, max_new_tokens=3, min_new_tokens=1, stop=["x"], **sglang)
    assert backend.asked[2].params == SamplingParams(min_tokens=1, max_tokens=3, stop=("x",), logprobs=2)
    assert backend.asked[2].text_in_logprobs
    with pytest.raises(TypeError, match="program: got an unexpected keyword argument 'dtype'"):
        program.run(backend=backend, dtype=int)


def test_9_no_thread_per_state(echo, threads_started):
    most = []

    @bw.function
    def program(s):
        s += "x"
        forks = s.fork(500)
        forks += bw.gen("a")
        forks.join()
        most.append(len(threads_started()))
        return len(s["a"])

    assert program.run(backend=echo(lambda prompt: "ok")).ret_value == 500
    assert most[0] < 10  # the loop and its resolver, not one for each state


def test_a_regex_is_never_dropped(engine):
    from branchwise.frontend.lang.openai import OpenAIBackend

    @bw.function
    def program(s):
        s += "x" + bw.gen("a", regex="[0-9]+")

    with pytest.raises(bw.ProgramError, match=r"http://127\.0\.0\.1:1 cannot constrain decoding by regex"):
        program.run(backend=OpenAIBackend("http://127.0.0.1:1", "m"))
    if "regex" not in engine.capabilities.constraints:
        with pytest.raises(bw.ProgramError, match="the engine in this process cannot constrain decoding by regex"):
            program.run()
