"""SGLang's text programs under ``import branchwise as sgl``: one test for each row of what its language has."""

from __future__ import annotations

import asyncio

import pytest

import branchwise as sgl

pytestmark = pytest.mark.usefixtures("engine")

QUESTION = "Who is Mira?"
ANSWER = "Mira is the baker of Fernhollow. She lives next to the market square."


def test_the_public_names_are_there():
    names = (
        "function gen gen_int gen_string select system user assistant system_begin system_end user_begin user_end "
        "assistant_begin assistant_end set_default_backend flush_cache get_server_info OpenAI RuntimeEndpoint Engine "
        "token_length_normalized greedy_token_selection unconditional_likelihood_normalized"
    )
    for name in names.split():
        assert getattr(sgl, name) is not None
        assert name in dir(sgl)


def test_text_and_gen():
    @sgl.function
    def program(s, question):
        s += "Q: " + question + "\nA:"
        s += sgl.gen("answer", max_tokens=6) + "\n" + sgl.gen("more", max_tokens=4)

    state = program.run(question="2 + 2?", temperature=0, ignore_eos=True)
    assert state.text() == f"Q: 2 + 2?\nA:{state['answer']}\n{state['more']}"
    assert state["answer"] and state.get_meta_info("answer")["completion_tokens"] == 6


def test_every_gen_argument_reaches_the_request(echo):
    backend = echo(lambda prompt: "yes")

    @sgl.function
    def program(s):
        s += "x" + sgl.gen(
            "a",
            max_tokens=7,
            min_tokens=2,
            n=3,
            stop=["\n", "END"],
            stop_token_ids=[5, 6],
            temperature=0.5,
            top_p=0.9,
            top_k=20,
            min_p=0.1,
            frequency_penalty=0.2,
            presence_penalty=-0.3,
            repetition_penalty=1.1,
            logit_bias={7: 1.5},
            ignore_eos=True,
            return_logprob=True,
            top_logprobs_num=2,
            return_text_in_logprobs=True,
            seed=9,
        )

    state = program.run(backend=backend)
    (ask,) = backend.asked
    assert ask.params == sgl.SamplingParams(
        max_tokens=7,
        min_tokens=2,
        n=3,
        stop=("\n", "END"),
        stop_token_ids=(5, 6),
        temperature=0.5,
        top_p=0.9,
        top_k=20,
        min_p=0.1,
        frequency_penalty=0.2,
        presence_penalty=-0.3,
        repetition_penalty=1.1,
        logit_bias={7: 1.5},
        ignore_eos=True,
        logprobs=2,
        seed=9,
    )
    assert ask.text_in_logprobs
    assert state["a"] == ["yes", "yes", "yes"] and state.text() == "xyes"


def test_what_means_nothing_here_is_refused(echo):
    with pytest.raises(ValueError, match="logprob_start_len: only generated tokens"):
        sgl.gen("a", logprob_start_len=3)
    with pytest.raises(ValueError, match="temperature must be 0"):
        sgl.select("a", ["x"], temperature=0.5)
    sgl.gen("a", logprob_start_len=-1)

    @sgl.function
    def program(s):
        s += "x"
        s.fork(2, position_ids_offset=[1, 2])

    with pytest.raises(ValueError, match="position_ids_offset is not supported"):
        program.run(backend=echo(str))

    @sgl.function
    def stopped(s):
        s += "x" + sgl.gen("a", stop_regex="[0-9]")

    with pytest.raises(sgl.ProgramError, match="the echo cannot constrain decoding by stop_regex"):
        stopped.run(backend=echo(str))


def test_regex_json_schema_and_dtype_become_constraints(echo):
    backend = echo(lambda prompt: "17", constraints=frozenset({"regex", "json_schema"}))

    @sgl.function
    def program(s):
        s += "x" + sgl.gen("a", regex="[0-9]+") + sgl.gen("b", json_schema='{"type": "integer"}')
        s += sgl.gen_int("c") + sgl.gen("d", json_schema={"type": "integer"})

    state = program.run(backend=backend)
    constraints = [dict(ask.constraint) for ask in backend.asked]
    assert constraints[0] == {"regex": "[0-9]+"}
    assert constraints[1] == constraints[3] == {"json_schema": '{"type": "integer"}'}
    assert list(constraints[2]) == ["regex"]
    assert (state["a"], state["c"]) == ("17", 17)


def test_roles_as_expressions_pairs_and_context_managers_say_the_same():
    @sgl.function
    def expressions(s):
        s += sgl.system("Be brief.")
        s += sgl.user(QUESTION)
        s += sgl.assistant(sgl.gen("answer", max_tokens=30))

    @sgl.function
    def pairs(s):
        s += sgl.system_begin() + "Be brief." + sgl.system_end()
        s += sgl.user_begin() + QUESTION + sgl.user_end()
        s += sgl.assistant_begin() + sgl.gen("answer", max_tokens=30) + sgl.assistant_end()

    @sgl.function
    def managers(s):
        s.system("Be brief.")
        with s.user():
            s += QUESTION
        with s.assistant():
            s += sgl.gen("answer", max_tokens=30)

    states = [program.run(temperature=0) for program in (expressions, pairs, managers)]
    assert len({state.text() for state in states}) == 1
    assert states[0].messages() == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": QUESTION},
        {"role": "assistant", "content": ANSWER},
    ]
    assert states[0].text().startswith("<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n")


def test_variables_can_be_set_and_read():
    @sgl.function
    def program(s):
        s.set_var("a", 3)
        s.set("b", [1])
        assert "a" in s and "c" not in s
        s += str(s["a"])
        return s.get_var("b")

    state = program.run()
    assert (state["a"], state.ret_value, state.text()) == (3, [1], "3")


def test_n_samples_are_a_list_and_the_text_goes_on_with_the_first():
    @sgl.function
    def program(s):
        s += "Once" + sgl.gen("a", n=3, max_tokens=5, temperature=1.0)
        s += "."

    state = program.run(seed=1)
    assert len(state["a"]) == 3 and len(set(state["a"])) == 3
    assert state.text() == "Once" + state["a"][0] + "."
    assert len(state.meta("a")) == 3


def test_fork_broadcast_lists_lambdas_and_gather():
    @sgl.function
    def program(s):
        s += sgl.system("Be brief.")
        forks = s.fork(3)
        forks += lambda i: sgl.user(f"Who is {['Mira', 'Tobin', 'Sol'][i]}?")
        forks += sgl.assistant(sgl.gen("who", max_tokens=30))
        forks += ["1", "2", "3"]
        assert len(forks) == 3 and [f["who"][:4] for f in forks] == ["Mira", "Tobi", "Sol "]
        assert forks["who"] == [forks[i]["who"] for i in range(3)]
        assert [f.text()[-1] for f in forks] == ["1", "2", "3"]
        forks.join()
        s += sgl.user(f"{len(s['who'])} people")

    state = program.run(temperature=0)
    assert [text.split()[0] for text in state["who"]] == ["Mira", "Tobin", "Sol"]
    assert state.messages()[-1]["content"] == "3 people"


def test_copy_and_var_scope():
    @sgl.function
    def program(s):
        s += "one"
        twin = s.copy()
        twin += " two"
        with s.var_scope("scope"):
            s += " three" + sgl.gen("x", max_tokens=2) + " four"
        return twin.text()

    state = program.run(temperature=0)
    assert state.ret_value == "one two"
    assert state["scope"] == f" three{state['x']} four"


def test_bind_call_and_run_with_defaults(echo):
    backend = echo(lambda prompt: "!")

    @sgl.function
    def program(s, a, b, c="c"):
        s += a + b + c + sgl.gen("x")

    bound = program.bind(b="2")
    assert bound(a="1", backend=backend).text() == "12c!"
    assert bound.run("1", backend=backend, max_new_tokens=9, temperature=0.1, min_tokens=3, stop="x")["x"] == "!"
    params = backend.asked[-1].params
    assert (params.max_tokens, params.temperature, params.min_tokens, params.stop) == (9, 0.1, 3, ("x",))
    assert program.arg_names == ["a", "b", "c"]


def test_a_program_called_with_a_state_goes_on_in_it(echo):
    @sgl.function
    def inner(s, n):
        s += f"<{n}>" + sgl.gen(f"v{n}")

    @sgl.function
    def outer(s):
        inner(s, 1)
        inner(s, n=2)

    state = outer.run(backend=echo(lambda prompt: "."))
    assert state.text() == "<1>.<2>." and state["v1"] == state["v2"] == "."


@pytest.mark.parametrize("generator_style", [False, True])
def test_run_batch_keeps_the_order(echo, generator_style):
    @sgl.function
    def program(s, word):
        s += word + sgl.gen("x")

    words = [f"w{i}" for i in range(20)]
    backend = echo(lambda prompt: prompt.upper())
    states = program.run_batch(
        [{"word": word} for word in words],
        backend=backend,
        num_threads=4,
        progress_bar=True,
        generator_style=generator_style,
    )
    assert [state["x"] for state in states] == [word.upper() for word in words]


def test_streams_join_to_the_text_all_of_it_or_one_variable():
    @sgl.function
    def program(s):
        s += sgl.user(QUESTION)
        s += sgl.assistant(sgl.gen("answer", max_tokens=30))
        s += sgl.user("Thank you!")

    state = program.run(temperature=0, stream=True)
    pieces = list(state.text_iter("answer"))
    assert len(pieces) > 5 and "".join(pieces) == ANSWER == state["answer"]
    assert "".join(state.text_iter()) == state.text()
    assert "".join(program.stream(temperature=0, variable="answer")) == ANSWER


def test_text_async_iter_with_meta_data():
    @sgl.function
    def program(s):
        s += sgl.user(QUESTION) + sgl.assistant(sgl.gen("answer", max_tokens=30))

    async def follow():
        state = program.run(temperature=0, stream=True)
        return [pair async for pair in state.text_async_iter("answer", return_meta_data=True)]

    pairs = asyncio.run(follow())
    assert "".join(text for text, _ in pairs) == ANSWER
    assert pairs[-1][1]["finish_reason"]["type"] == "stop"


def test_logprobs_are_in_the_meta():
    @sgl.function
    def program(s):
        s += "Once" + sgl.gen("a", max_tokens=3, temperature=0, top_logprobs_num=2, return_text_in_logprobs=True)

    meta = program.run().get_meta_info("a")
    assert len(meta["output_token_logprobs"]) == len(meta["output_top_logprobs"]) == 3
    value, _, text = meta["output_token_logprobs"][0]
    assert value <= 0 and isinstance(text, str)
    assert meta["output_top_logprobs"][0][0][0] == pytest.approx(value)


def test_sync_error_and_flush_cache(engine):
    @sgl.function
    def program(s):
        s += "Once upon a time there was a mill" + sgl.gen("a", max_tokens=2)
        s.sync()
        assert s.error() is None

    program.run()
    assert program.run().meta("a")["cached_tokens"] > 0
    sgl.flush_cache()
    assert program.run().meta("a")["cached_tokens"] == 0
    with pytest.raises(sgl.BackendError, match="the engine in this process is not a Branchwise server"):
        sgl.get_server_info()
