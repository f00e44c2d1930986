"""`jaxkv.compress`, and `jaxkv.generate` with what it returns."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxkv
from jaxkv import state as kv
from jaxkv.policies.base import WholePrompt

DOCUMENTS = [list(range(5, 75)), list(range(300, 340))]
QUESTIONS = [[7, 8, 9], [400, 11], [77]]
NEW = 8


@pytest.fixture(scope="module")
def context(wide_lm):
    return jaxkv.compress(wide_lm, DOCUMENTS)


def ask(lm, context, questions=QUESTIONS, **options):
    options = {"documents": [0, 1, 0], "max_new_tokens": NEW} | options
    return jaxkv.generate(lm, questions, context=context, **options)


def test_a_question_is_the_end_of_a_prompt(wide_lm, context):
    prompts = [DOCUMENTS[0] + QUESTIONS[0], DOCUMENTS[1] + QUESTIONS[1]]
    prompts.append(DOCUMENTS[0] + QUESTIONS[2])
    whole = jaxkv.generate(wide_lm, prompts, max_new_tokens=NEW)
    out = ask(wide_lm, context)
    assert out.tokens == whole.tokens
    assert out.stats.prompt_tokens == whole.stats.prompt_tokens
    assert ask(wide_lm, context).tokens == whole.tokens
    many = jaxkv.compress(wide_lm, DOCUMENTS + DOCUMENTS[:1])
    assert ask(wide_lm, many, documents=None).tokens == whole.tokens


def test_a_text_behind_a_text(wide_lm):
    document, question = "The grass is green.", " The sky"
    context = jaxkv.compress(wide_lm, document)
    ids = wide_lm.tokenizer(document)["input_ids"]
    ids += wide_lm.tokenizer(question, add_special_tokens=False)["input_ids"]
    whole = jaxkv.generate(wide_lm, [ids], max_new_tokens=NEW)
    out = jaxkv.generate(wide_lm, question, context=context, max_new_tokens=NEW)
    assert out.tokens == whole.tokens


def test_budgets_are_those_of_documents(wide_lm):
    policy = jaxkv.SnapKV(window_size=4)
    context = jaxkv.compress(
        wide_lm, DOCUMENTS, compression_ratio=0.9, prefill=policy, question=[[9, 9]]
    )
    assert context.kept.tolist() == [7, 4]
    assert context.lengths.tolist() == [70, 40]
    held = context.kept_positions(1)
    assert len(held) == wide_lm.config.num_layers
    assert [head.size for layer in held for head in layer] == [4] * 4
    said = repr(context)
    assert "2 documents" in said and "7, 4 of 70, 40 tokens" in said
    assert "SnapKV(window_size=4" in said and "float32" in said
    # What evicts while decoding needs slots for what is left of a document.
    evicting = dict(decode=jaxkv.StreamingLLM(), documents=[0, 1, 1])
    out = ask(wide_lm, context, budget=12, **evicting)
    assert out.stats.slots == 12 and out.lengths == (NEW,) * 3
    with pytest.raises(ValueError, match=r"budget=6 is too small .* use at least 7"):
        ask(wide_lm, context, budget=6, **evicting)
    with pytest.raises(ValueError, match=r"StreamingLLM evicts .* needs a budget"):
        ask(wide_lm, context, **evicting)


def test_contexts_are_joined(wide_lm, context):
    texts = [list(range(5, 105)), [9, 8, 7]]
    more = jaxkv.compress(wide_lm, texts, budget=8, prefill=jaxkv.KNorm())
    both = context.join(more)
    assert len(both) == 4 and both.lengths.tolist() == [70, 40, 100, 3]
    assert both.policy == "Full(); KNorm()"
    out = ask(wide_lm, both, documents=[1, 2, 3])
    assert out.tokens[0] == ask(wide_lm, context, documents=[1] * 3).tokens[0]
    for one, two in zip(both.kept_positions(2), more.kept_positions(), strict=True):
        for held, wanted in zip(one, two, strict=True):
            np.testing.assert_array_equal(held, wanted)
    chat = dataclasses.replace(more, chat=True)
    with pytest.raises(ValueError, match="of a chat template cannot be joined"):
        context.join(chat)


def test_a_document_is_read_once_for_all_budgets(wide_lm):
    policy = dict(prefill=jaxkv.SnapKV(window_size=4))
    many = jaxkv.compress(wide_lm, DOCUMENTS * 2, budget=[8, 7, 20, 30], **policy)
    assert many.kept.tolist() == [8, 7, 20, 30]
    assert many.lengths.tolist() == [70, 40] * 2
    alone = jaxkv.compress(wide_lm, DOCUMENTS[1:], budget=30, **policy)
    for one, two in zip(many.kept_positions(3), alone.kept_positions(), strict=True):
        for held, wanted in zip(one, two, strict=True):
            np.testing.assert_array_equal(held, wanted)
    np.testing.assert_allclose(many.logits[3], alone.logits[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(context=5), "context= takes what jaxkv.compress returns, got 5"),
        (dict(documents=None), "3 prompts about 2 documents; pass documents="),
        (dict(documents=[0, 1]), "got 2 indices in documents= for 3 prompts"),
        (dict(documents=[0, 1, 2]), "index 2, but the context has 2 documents"),
        (dict(documents=[0, 1, 0.5]), r"documents\[2\] must be a whole number"),
        (dict(budget=8), "budget= with context= is that of a decode policy"),
        (dict(compression_ratio=0.5), "compression_ratio= does nothing with context="),
        (dict(prefill=jaxkv.SnapKV()), "prefill= does nothing with context="),
        (dict(speculate=jaxkv.Aligned()), r"pass speculate=Aligned\(\) to jaxkv.comp"),
        (
            dict(max_new_tokens=2000),
            "prompt 0 has 3 .* 0, whose 70 tokens leave 1978 positions of 2048",
        ),
        (dict(pool=[(0, 1)] * 3), "pool= does nothing without speculate="),
    ],
)
def test_bad_questions_are_named(wide_lm, context, options, message):
    with pytest.raises(ValueError, match=message):
        ask(wide_lm, **{"context": context} | options)


@pytest.mark.parametrize("document", [2, -1, 0.5, True, "0", None])
def test_documents_that_are_not_there(context, document):
    message = f"a document is a whole number from 0 to 1, got {document!r}"
    for ask in context.kept_positions, lambda row: context.take([0, row]):
        with pytest.raises(ValueError, match=re.escape(message)):
            ask(document)
    with pytest.raises(ValueError, match="got no documents to take; name at least one"):
        context.take([])
    assert context.take(np.array([1])).kept.tolist() == [context.kept[1]]


def test_documents_need_a_context(wide_lm):
    with pytest.raises(ValueError, match="documents= does nothing without context="):
        ask(wide_lm, None)


class Broken(WholePrompt):
    """Scores with a division by 0."""

    def check(self, budget):
        pass

    def compress(self, prompt, state, *, budget):
        scores = jnp.zeros((*state.target.shape, prompt.keys.shape[1])) / 0
        return jaxkv.policies.base.keep_top(prompt, scores, state, budget=budget)


class Newest(WholePrompt):
    """Keeps the last tokens that it sees, a question's among them."""

    def check(self, budget):
        pass

    def compress(self, prompt, state, *, budget):
        del budget
        newest = prompt.lengths[:, None] - 1 - jnp.arange(4, dtype=jnp.int32)[None]
        shape = (*state.target.shape, 4)
        kept = jnp.broadcast_to(newest[:, None], shape)
        return kv.gather(state, prompt.keys, prompt.values, kept)


def test_nothing_of_a_question_is_kept(wide_lm):
    context = jaxkv.compress(
        wide_lm, [[5] * 40], budget=8, prefill=Newest(), question=[[7, 8]]
    )
    for head in sum(context.kept_positions(), ()):
        assert head.tolist() == [38, 39]
    asked = jaxkv.generate(wide_lm, [[7, 8]], context=context, max_new_tokens=2)
    assert asked.lengths == (2,)


@pytest.mark.parametrize(
    ("documents", "options", "message"),
    [
        ([], {}, "compress: got no documents"),
        (["a", ""], {}, "compress: document 1 is empty"),
        (
            [[5] * 3000],
            {},
            "of 3000 tokens and a token behind it .*; shorten it",
        ),
        ([[5] * 40], dict(budget=8), "keeps all of them; choose a prefill policy"),
        ([[5], [6]], dict(question=["a", ""]), "compress: question 1 is empty"),
        ([[5], [6]], dict(question=["a"] * 3), "got 3 questions for 2 documents"),
        ([[5] * 40], dict(budget=8, prefill=jaxkv.SnapKV), "takes an instance"),
        ([[5] * 40], dict(budget=8, prefill=Broken()), "Broken scores .* document 0"),
        (
            [[5] * 40],
            dict(budget=3, prefill=Newest()),
            "Newest keeps more tokens of document 0 in layer 0 than .* prompt.keep of",
        ),
        ([[5]], dict(budget=1, compression_ratio=0.5), "not both"),
    ],
)
def test_bad_documents_are_named(wide_lm, documents, options, message):
    with pytest.raises(ValueError, match=message):
        jaxkv.compress(wide_lm, documents, **options)


def test_a_context_of_another_model_is_refused(wide_lm, context):
    params = wide_lm.params
    other = jax.tree.map(lambda x: x.at[..., 0].add(1.0), params)
    with pytest.raises(ValueError, match="whose weights are not those of"):
        ask(dataclasses.replace(wide_lm, params=other), context)
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
    said = "in float32, but .* is in bfloat16; load it with dtype='float32'"
    with pytest.raises(ValueError, match=said):
        ask(dataclasses.replace(wide_lm, params=half), context)
    bare = dataclasses.replace(wide_lm, tokenizer=None)
    with pytest.raises(ValueError, match="whose tokenizer is not that of"):
        ask(bare, context)
    broken = jax.tree.map(lambda x: x * np.float32(np.nan), params)
    bad = dataclasses.replace(wide_lm, params=broken)
    with pytest.raises(jaxkv.LogitsError, match=r"compress: .* document 0"):
        jaxkv.compress(bad, [[5, 6]])
    with pytest.raises(jaxkv.LogitsError, match=r"score: .* prompt 0"):
        jaxkv.score(bad, [[5, 6]], [[7]])
