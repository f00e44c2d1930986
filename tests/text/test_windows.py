"""Layers with windows behind the doors: contexts, turns, chats, budgets, drafts."""

import dataclasses

import jax
import numpy as np
import pytest

import jaxkv
from jaxkv.models.config import LayerKind
from jaxkv.models.decoder import Decoder

WINDOW = 24
PROMPTS = [list(range(5, 45)), list(range(300, 320))]  # one is longer, one shorter
NEXT = [[7, 8, 9], [400]]
NEW = 8
EVICTING = dict(
    budget=20, prefill=jaxkv.SnapKV(window_size=4), decode=jaxkv.LongFlow.paper()
)


@pytest.fixture(scope="module")
def lm(tiny_lm):
    """The tiny model with a window in its first layer, and wide weights."""
    config = tiny_lm.config
    kinds = (LayerKind(window=WINDOW), *[LayerKind()] * (config.num_layers - 1))
    return dataclasses.replace(
        tiny_lm,
        network=Decoder(dataclasses.replace(config, kinds=kinds)),
        params=jax.tree.map(lambda x: 12 * x if x.ndim == 2 else x, tiny_lm.params),
    )


def test_turns_are_generation_on_the_whole_text(lm, tmp_path):
    context, texts, asked = None, [[], []], PROMPTS
    for _ in range(2):
        texts = [[*text, *more] for text, more in zip(texts, asked, strict=True)]
        turn = dict(max_new_tokens=NEW, return_cache=True, context=context)
        out = jaxkv.generate(lm, asked, **turn)
        assert out.tokens == jaxkv.generate(lm, texts, max_new_tokens=NEW).tokens
        texts = [[*text, *more] for text, more in zip(texts, out.tokens, strict=True)]
        context, asked = out.context, NEXT
        ring, whole = context.cache[:2]
        assert (ring.window, ring.slots, whole.window) == (WINDOW, WINDOW, None)
        for row, text in enumerate(texts):
            (held, *_), *_ = context.kept_positions(row)
            assert held.tolist() == list(range(len(text)))[-WINDOW:]
        assert context.kept.tolist() == [len(text) for text in texts]
        jaxkv.save_context(context, tmp_path / "context", overwrite=True)
        context = jaxkv.load_context(tmp_path / "context", lm)


def test_a_budget_cuts_the_other_layers(lm):
    document = dict(budget=8, prefill=jaxkv.SnapKV(window_size=4))
    context = jaxkv.compress(lm, PROMPTS, question=[[9, 8, 7]], **document)
    assert context.kept.tolist() == [8, 8]
    for row, prompt in enumerate(PROMPTS):
        first, *others = context.kept_positions(row)
        for head in first:  # nothing of the question
            assert head.tolist() == list(range(len(prompt)))[-WINDOW:]
        assert {len(head) for layer in others for head in layer} == {8}
    again = dict(context=context, max_new_tokens=NEW)
    plain = jaxkv.generate(lm, NEXT, **again)
    drafter = jaxkv.PromptLookup(break_even=0.0)
    assert jaxkv.generate(lm, NEXT, speculate=drafter, **again).tokens == plain.tokens
    # Fewer slots than the window has, and more tokens than it has.
    decode = dict(budget=20, decode=jaxkv.StreamingLLM(), return_cache=True)
    out = jaxkv.generate(lm, NEXT, **again | dict(max_new_tokens=40), **decode)
    assert [state.slots for state in out.context.cache[:2]] == [WINDOW, 20]
    assert out.stats.window_bytes < out.stats.cache_bytes
    ring = out.context.cache[0]
    assert (
        out.stats.window_bytes
        == ring.slots * 2 * ring.positions.shape[1] * (2 * ring.keys.shape[3] * 4 + 4)
        + 4 * ring.target.size
    )


@pytest.mark.parametrize(
    "options", [{}, pytest.param(EVICTING | dict(budget=60), marks=pytest.mark.slow)]
)
def test_a_chat_holds_the_window(lm, options):
    chat = jaxkv.Chat.begin(lm, **options)
    for text in ("hello kimalo", "what is 7?", "good bye, and many more words"):
        chat, out = chat.say(text, max_new_tokens=NEW)
        prompt = list(chat.tokens[: len(chat.tokens) - out.lengths[0]])
        if not options:
            whole = jaxkv.generate(lm, [prompt], max_new_tokens=NEW)
            assert out.tokens == whole.tokens
        held = np.sort(chat._read.running.cache[0].positions, axis=-1)[0]
        held = held[:, held[0] >= 0]
        newest = len(chat.tokens) - 1
        wanted = np.arange(max(newest - WINDOW, 0), newest)
        np.testing.assert_array_equal(held, np.broadcast_to(wanted, held.shape))
    assert len(chat.tokens) > 2 * WINDOW
