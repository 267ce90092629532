"""`Engine.chat`: conversations in process, through the model's own template."""

from __future__ import annotations

from typing import Any

import pytest

from branchwise import AsyncEngine, Engine, SamplingParams
from branchwise.runtime.errors import InvalidRequest

GREEDY = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
HELLO = [{"role": "user", "content": "Hello."}]
ASKED = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Who are you?"}]


@pytest.fixture(scope="module")
def engine(checkpoint):
    with Engine(checkpoint("llama-gqa"), max_num_seqs=16, kv_cache_tokens=4096) as engine:
        yield engine
        engine.check()


def test_a_conversation_is_generated_from_as_its_template_writes_it(engine):
    output = engine.chat(HELLO, GREEDY)
    text = "<|im_start|>user\nHello.<|im_end|>\n<|im_start|>assistant\n"
    ids = engine.tokenizer.encode(text, add_special_tokens=False).tolist()
    assert engine.chat_prompt(HELLO) == ids
    assert output.prompt_tokens == len(ids)
    assert output.token_ids == engine.generate(ids, GREEDY).token_ids
    assert engine.generate(text, GREEDY).prompt_tokens == len(ids) + 1, "a prompt that is text begins with <|begin|>"


def test_conversations_are_answered_in_order_each_with_its_parameters(engine):
    one, other = engine.chat(HELLO, GREEDY), engine.chat(ASKED, GREEDY)
    both = engine.chat([HELLO, ASKED], GREEDY)
    assert [output.token_ids for output in both] == [one.token_ids, other.token_ids]
    short = SamplingParams(temperature=0, max_tokens=3, ignore_eos=True)
    assert [len(output.token_ids) for output in engine.chat((tuple(HELLO), ASKED), [short, GREEDY])] == [3, 8]
    (alone,) = engine.chat([HELLO], GREEDY)
    assert alone.token_ids == one.token_ids


def test_the_last_message_is_gone_on_with(engine):
    said = [*HELLO, {"role": "assistant", "content": "Hi, I am"}]
    assert engine.tokenizer.decode(engine.chat_prompt(said, continue_final_message=True), False).endswith("Hi, I am")
    output = engine.chat(said, GREEDY, continue_final_message=True)
    assert output.prompt_tokens == len(engine.chat_prompt(said, continue_final_message=True))


def test_a_conversation_is_streamed_and_branched_from_by_its_prompt(engine):
    whole = engine.chat(ASKED, GREEDY)
    prompt = engine.chat_prompt(ASKED)
    assert "".join(chunk.text for chunk in engine.stream(prompt, GREEDY)) == whole.text
    with engine.branch(ASKED) as branch, engine.branch(prompt) as same:
        assert branch.tokens == same.tokens == prompt
        assert branch.generate(GREEDY).token_ids == whole.token_ids
    parts = [{"role": "user", "content": [{"type": "text", "text": "Hello."}]}]
    with engine.branch(parts) as branch:
        assert branch.tokens == engine.chat_prompt(HELLO), "messages mean the same to a branch"


def test_a_salt_and_a_priority_reach_the_request(engine):
    asked = [{"role": "user", "content": "what nobody has asked before, and is to be kept apart by its salt"}]
    engine.chat(asked, GREEDY, cache_salt="a", priority=3)
    assert engine.chat(asked, GREEDY, cache_salt="b").cached_tokens == 0
    assert engine.chat(asked, GREEDY, cache_salt="a").cached_tokens > 0


@pytest.mark.parametrize(
    ("messages", "options", "field", "says"),
    [
        ([], {}, "messages", "messages must not be empty"),
        ("Hello.", {}, "messages", "must be a list of messages or of such lists, got str"),
        (HELLO[0], {}, "messages", "must be a list of messages or of such lists, got dict"),
        (["Hello."], {}, "messages[0]", "messages[0] must be an object, got str"),
        ([{"role": "king", "content": "x"}], {}, "messages[0].role", "must be one of system, developer"),
        ([{"role": "user"}], {}, "messages[0].content", "is required"),
        ([HELLO, []], {}, "messages[1]", "messages[1] must not be empty"),
        ([HELLO, HELLO[0]], {}, "messages[1]", "must be a list of messages like the first, got dict"),
        ([HELLO, [*HELLO, {"role": "king"}]], {}, "messages[1][1].role", "messages[1][1].role must be"),
        (HELLO, {"tools": [{"type": "function"}]}, "tools[0].function", "must be an object"),
        (HELLO, {"tools": {"name": "f"}}, "tools", "must be a list"),
        (HELLO, {"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools", "does not write them"),
        (HELLO, {"chat_template_kwargs": {"unheard_of": 1}}, "chat_template_kwargs.unheard_of", "is not a variable of"),
        (HELLO, {"continue_final_message": True}, "continue_final_message", "needs a last message of role assistant"),
        (HELLO, {"params": [GREEDY, GREEDY]}, "params", "params has 2 entries for 1 prompts"),
        (HELLO, {"params": SamplingParams(max_tokens=10**6)}, "max_tokens", "lower it or raise"),
        ([{"role": "user", "content": "long " * 600}], {}, "prompt", "more than the 512 tokens of the model's context"),
    ],
)
async def test_bad_conversations_are_refused_by_name(engine, messages: Any, options: Any, field: str, says: str):
    options = {"params": GREEDY, **options}
    with pytest.raises(InvalidRequest) as refused:
        engine.chat(messages, **options)
    assert refused.value.path == field and says in refused.value.message
    with pytest.raises(InvalidRequest) as again:
        await engine.achat(messages, **options)
    assert (again.value.path, again.value.message) == (refused.value.path, refused.value.message)
    assert engine.chat(HELLO, GREEDY).finish_reason == "length"


def test_a_branch_refuses_what_a_chat_refuses(engine):
    with pytest.raises(InvalidRequest, match=r"messages\[1\].role must be one of"):
        engine.branch([*HELLO, {"role": "king", "content": "x"}])


async def test_a_model_without_a_template_says_so(checkpoints, tmp_path):
    folder = checkpoints.build("llama-gqa", tmp_path / "model")
    config = folder / "tokenizer_config.json"
    config.write_text(config.read_text().replace('"chat_template"', '"no_template"'))
    async with AsyncEngine(folder, kv_cache_tokens=512) as engine:
        with pytest.raises(InvalidRequest, match="no chat template; send a prompt instead") as refused:
            await engine.chat(HELLO, GREEDY)
        assert refused.value.path == "messages"


async def test_the_asynchronous_engine_chats_by_the_same_name(engine, checkpoint):
    async with AsyncEngine(checkpoint("llama-gqa"), kv_cache_tokens=2048) as other:
        one = await other.chat(HELLO, GREEDY)
        both = await other.chat([HELLO, ASKED], GREEDY)
        streamed = [chunk.text async for chunk in other.stream(other.chat_prompt(HELLO), GREEDY)]
    assert one.token_ids == both[0].token_ids == engine.chat(HELLO, GREEDY).token_ids
    assert both[1].token_ids == (await engine.achat(ASKED, GREEDY)).token_ids
    assert "".join(streamed) == one.text
