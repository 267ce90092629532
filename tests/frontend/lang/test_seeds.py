"""A program's seed makes it repeat: each place in it draws on its own."""

from __future__ import annotations

import branchwise as bw


def ok(prompt: str) -> str:
    return "ok"


@bw.function
def branching(s, word):
    s += f"The {word}"
    s += bw.gen("a", max_tokens=4)
    forks = s.fork(3)
    forks += bw.gen("b", max_tokens=4)
    forks += bw.gen("b2", max_tokens=4)
    again = s.fork(2)
    again += bw.gen("b", max_tokens=4)
    forks.join()
    s += " and" + bw.gen("a", max_tokens=4, n=2)
    s.set("again", again["b"])


def outcome(state) -> list:
    return [state[name] for name in ("a", "b", "b2", "again")]


def test_the_same_seed_gives_the_same_result_whatever_the_concurrency(engine):
    batch = [{"word": word} for word in ("mill", "bridge", "owl", "mill")]
    options = {"temperature": 3.0, "seed": 5, "ignore_eos": True}
    one = [outcome(state) for state in branching.run_batch(batch, num_threads=1, **options)]
    bw.flush_cache()
    many = [outcome(state) for state in branching.run_batch(batch, num_threads=4, **options)]
    assert one == many
    assert one[0] != one[3], "items of a batch draw on their own"
    assert len({str(b) for b in one[0][1]}) == 3, "branches draw on their own"
    other = branching.run_batch(batch, **{**options, "seed": 6})
    assert outcome(other[0]) != one[0]


def test_seeds_are_of_the_place_in_the_program(echo):
    def seeds(seed: int) -> set[int]:
        backend = echo(ok)
        branching.run("x", backend=backend, seed=seed)
        return {ask.params.seed for ask in backend.asked if ask.params.max_tokens}

    assert seeds(1) == seeds(1)
    assert len(seeds(1)) == 1 + 3 + 3 + 2 + 1
    assert not seeds(1) & seeds(2)
    assert {ask.params.seed for ask in _run_unseeded(echo).asked} == {None}


def _run_unseeded(echo):
    backend = echo(ok)
    branching.run("x", backend=backend)
    return backend


def test_a_gen_with_a_seed_keeps_it(echo):
    @bw.function
    def program(s):
        s += "x" + bw.gen("a", seed=3)

    backend = echo(ok)
    program.run(backend=backend, seed=1)
    assert backend.asked[0].params.seed == 3
