"""Conversations: a chat is generation on its transcript, however little is read."""

import dataclasses
import types

import jax
import numpy as np
import pytest

import jaxkv
from jaxkv.text.chat import encode_addition, encode_chat

TURNS = ("hello kimalo", "what is 7?", "good bye, and 12 more words of no use")
NEW = 12


@pytest.fixture(scope="module")
def lm(tiny_lm):
    """The tiny model, with weights so wide that its answers are of many words."""
    wide = jax.tree.map(lambda x: 12 * x if x.ndim == 2 else x, tiny_lm.params)
    return dataclasses.replace(tiny_lm, params=wide)


def talk(lm, turns=TURNS, **options):
    """Yield the chat after each turn, and the answer."""
    chat = jaxkv.Chat.begin(lm, **options)
    for text in turns:
        chat, out = chat.say(text, max_new_tokens=NEW)
        yield chat, out


@pytest.mark.parametrize(
    "options",
    [
        {},
        dict(system="be brief", sampler=jaxkv.Categorical(temperature=2.0), seed=3),
        dict(budget=200),
        pytest.param(
            dict(sampler=jaxkv.Greedy(repetition_penalty=1.5)), marks=pytest.mark.slow
        ),
        pytest.param(
            dict(budget=200, decode=jaxkv.StreamingLLM()), marks=pytest.mark.slow
        ),
        pytest.param(dict(budget=200, decode=jaxkv.Full()), marks=pytest.mark.slow),
    ],
)
def test_a_chat_is_generation_on_the_whole_transcript(lm, options):
    sampler, seed = options.get("sampler"), options.get("seed", 0)
    for chat, out in talk(lm, **options):
        prompt = list(chat.tokens[: len(chat.tokens) - out.lengths[0]])
        whole = jaxkv.generate(
            lm, [prompt], max_new_tokens=NEW, sampler=sampler, seed=seed
        )
        assert out.tokens == whole.tokens
        assert out.stats.prompt_tokens == (len(prompt),)
        assert chat.kept == len(chat.tokens) - 1  # the newest is not there yet


def test_a_transcript_is_what_the_template_writes(lm):
    chats = list(talk(lm))
    said, (_, out) = [m for chat, _ in chats for m in chat.messages[-2:]], chats[-1]
    prompt = encode_chat(lm, said[:-1])
    tokens = chats[-1][0].tokens
    text = lm.tokenizer.decode(tokens[: len(tokens) - out.lengths[0]])
    assert text == lm.tokenizer.decode(prompt)


def test_a_turn_stays_within_the_budget(lm):
    budget = 24
    for chat, _ in talk(lm, budget=budget, prefill=jaxkv.SnapKV(window_size=4)):
        assert chat.kept <= budget
    assert len(chat.tokens) > budget
    assert f"{len(chat.tokens)} tokens, budget=24" in repr(chat)


def test_an_old_chat_can_be_gone_on_with(lm):
    first, second, third = (chat for chat, _ in talk(lm))
    again, _ = first.say(TURNS[1], max_new_tokens=NEW)
    assert again.tokens == second.tokens
    assert again.messages == second.messages
    other, _ = second.say("something else", max_new_tokens=NEW)
    assert other.tokens != third.tokens


def test_another_budget_reads_anew(lm):
    *_, (chat, _) = talk(lm, turns=TURNS[:2])
    changed = chat.with_budget(200)
    assert changed.kept == 0 and changed.options.decode == jaxkv.LongFlow()
    assert changed.messages == chat.messages
    after, out = changed.say(TURNS[2], max_new_tokens=NEW)
    prompt = encode_chat(lm, after.messages[:-1])
    whole = jaxkv.generate(lm, [prompt], max_new_tokens=NEW)
    assert after.tokens == (*prompt, *whole.tokens[0]) and out.tokens == whole.tokens
    back = after.with_budget(None)
    assert back.options.decode == jaxkv.Full() and back.messages == after.messages


def test_a_cache_grows_where_nothing_evicts(lm, monkeypatch):
    wanted = [out.tokens for _, out in talk(lm)]
    monkeypatch.setattr("jaxkv.text.conversation._ROOM", 1)
    monkeypatch.setattr("jaxkv.text.conversation.bucket", lambda length: length)
    monkeypatch.setattr("jaxkv.text.planning.bucket", lambda length: length)
    sizes, found = [], []
    for chat, out in talk(lm):
        sizes.append(chat.cache_bytes)
        found.append(out.tokens)
    assert found == wanted
    assert sizes == sorted(sizes) and sizes[0] < sizes[-1]


def with_template(lm, template):
    """Return the model with another template, and nothing else changed."""
    tokenizer = lm.tokenizer

    class Other:
        def __call__(self, *args, **kwargs):
            return tokenizer(*args, **kwargs)

        def __getattr__(self, name):
            return getattr(tokenizer, name)

        def apply_chat_template(self, messages, **kwargs):
            return tokenizer.apply_chat_template(
                messages, chat_template=template, **kwargs
            )

    return dataclasses.replace(lm, tokenizer=Other())


def test_a_template_that_rewrites_answers_is_read_anew(lm):
    template = (
        "{% for m in messages %}<{{ m['role'] }}>"
        "{% if m['role'] == 'assistant' %}..{% else %}{{ m['content'] }}{% endif %}"
        "{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    other = with_template(lm, template)
    chat, _ = jaxkv.Chat.begin(other).say("a", max_new_tokens=4)
    assert encode_addition(other, chat.messages[:1], "answer", []) is None
    after, out = chat.say("b", max_new_tokens=4)
    prompt = encode_chat(other, after.messages[:-1])
    assert list(after.tokens[: -out.lengths[0]]) == prompt
    assert out.tokens == jaxkv.generate(lm, [prompt], max_new_tokens=4).tokens


def test_an_answer_that_stopped_is_ended_once(lm):
    *_, (chat, out) = talk(lm, turns=TURNS[:1])
    stop = int(out.tokens[0][3])  # as if the model had stopped there
    stopping = dataclasses.replace(lm, stop_ids=(stop,))
    chat, out = jaxkv.Chat.begin(stopping).say(TURNS[0], max_new_tokens=NEW)
    assert out.finish_reason == ("stop",) and chat.tokens[-1] == stop
    length = len(chat.tokens)
    after, out = chat.say(TURNS[1], max_new_tokens=NEW)
    added = encode_addition(
        lm, chat.messages[:1], chat.messages[1]["content"], after.messages[2:3]
    )
    prompt = [*chat.tokens[: length - 1], *added]
    assert list(after.tokens[: len(prompt)]) == prompt
    whole = jaxkv.generate(stopping, [prompt], max_new_tokens=NEW)
    assert out.tokens == whole.tokens


@pytest.mark.parametrize(
    ("options", "say", "message"),
    [
        (dict(budget=0), None, "budget must be at least 1"),
        (dict(decode=jaxkv.LongFlow()), None, "needs a budget"),
        (dict(prefill=jaxkv.SnapKV), None, "takes an instance"),
        ({}, dict(max_new_tokens=0), "max_new_tokens must be >= 1"),
        ({}, dict(max_new_tokens=1 << 20), "positions"),
        (dict(budget=4, prefill=jaxkv.Full()), {}, "keeps all of them"),
    ],
)
def test_bad_input_is_named(lm, options, say, message):
    with pytest.raises(ValueError, match=message):
        jaxkv.Chat.begin(lm, **options).say("a b c d e f g h", **(say or {}))


def test_a_model_without_a_template_is_named(lm):
    plain = dataclasses.replace(lm, tokenizer=types.SimpleNamespace(chat_template=None))
    with pytest.raises(ValueError, match="has no chat template"):
        jaxkv.Chat.begin(plain)


def test_a_chat_holds_arrays_of_its_own(lm):
    *_, (chat, _) = talk(lm, turns=TURNS[:1])
    before = [np.asarray(x) for x in jax.tree.leaves(chat._read.running.cache)]
    chat.say(TURNS[1], max_new_tokens=NEW)
    after = [np.asarray(x) for x in jax.tree.leaves(chat._read.running.cache)]
    for old, new in zip(before, after, strict=True):
        np.testing.assert_array_equal(old, new)
