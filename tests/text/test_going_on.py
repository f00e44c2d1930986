"""What a next turn needs: the cache, log-probabilities, and scores of candidates."""

import jax
import numpy as np
import pytest

import jaxkv

PROMPTS = [list(range(5, 45)), list(range(300, 320))]
NEXT = [[7, 8, 9], [400]]
NEW = 8
CLOSE = dict(rtol=1e-4, atol=1e-4)
EVICTING = dict(
    budget=24, prefill=jaxkv.SnapKV(window_size=4), decode=jaxkv.LongFlow.paper()
)


def test_a_turn_costs_its_own_tokens(wide_lm):
    first = jaxkv.generate(wide_lm, PROMPTS, max_new_tokens=NEW, return_cache=True)
    assert first.context.lengths.tolist() == [48, 28]
    assert first.context.kept.tolist() == [48, 28]
    turns = dict(max_new_tokens=NEW, return_cache=True)
    second = jaxkv.generate(wide_lm, NEXT, context=first.context, **turns)
    third = jaxkv.generate(wide_lm, NEXT, context=second.context, **turns)
    texts = PROMPTS
    for out in (first, second, third):
        whole = jaxkv.generate(wide_lm, texts, max_new_tokens=NEW)
        assert out.tokens == whole.tokens
        rows = zip(texts, out.tokens, NEXT, strict=True)
        texts = [[*text, *answer, *more] for text, answer, more in rows]
    slots = [context.context.cache[0].slots for context in (first, second, third)]
    assert slots == [64, 64, 96]  # not those of outputs that ended


LONGER = [[7, 8, 9, 300, 301, 302, 303, 304], [400, 6, 11, 12, 13, 14, 15]]
SINKS = jaxkv.StreamingLLM(n_sink=1)


@pytest.mark.slow
def test_what_evicts_is_gone_on_with(wide_lm):
    out = jaxkv.generate(
        wide_lm, PROMPTS, max_new_tokens=NEW, return_cache=True, **EVICTING
    )
    assert out.context.kept.tolist() == [23, 23]  # less what comes next to go
    assert "SnapKV(" in out.context.policy and "LongFlow(" in out.context.policy
    (held, *_), *_ = out.context.kept_positions(1)
    assert held[-1] == 27  # the newest token is among them
    after = jaxkv.generate(wide_lm, NEXT, context=out.context, max_new_tokens=NEW)
    assert after.lengths == (NEW, NEW)


def test_turns_go_on_within_one_budget(wide_lm):
    """A loop of one's own is what one reading of everything, token by token, gives."""
    how = dict(budget=24, decode=SINKS)
    turns = dict(max_new_tokens=NEW, return_cache=True, logprobs=True, stop_ids=[])
    first = jaxkv.generate(wide_lm, PROMPTS, prefill=SINKS, **how, **turns)
    second = jaxkv.generate(wide_lm, LONGER, context=first.context, **how, **turns)
    third = jaxkv.generate(wide_lm, LONGER, context=second.context, **how, **turns)
    assert third.context.kept.tolist() == [23, 23]
    said = [
        [*a, *asked, *b, *asked, *c]
        for a, asked, b, c in zip(
            first.tokens, LONGER, second.tokens, third.tokens, strict=True
        )
    ]
    pair = [5, 9]  # candidates, too
    got = jaxkv.score(wide_lm, None, [pair, pair], context=third.context, **how)
    said = [[*row, *pair] for row in said]
    want = jaxkv.score(wide_lm, PROMPTS, said, prefill=SINKS, **how)
    for index, (row, asked) in enumerate(zip(want.logprobs, LONGER, strict=True)):
        np.testing.assert_allclose(row[-2:], got.logprobs[index], **CLOSE)
        np.testing.assert_allclose(row[-NEW - 2 : -2], third.logprobs[index], **CLOSE)
        middle = row[NEW + len(asked) :][:NEW]
        np.testing.assert_allclose(middle, second.logprobs[index], **CLOSE)


@pytest.mark.parametrize(
    "decode",
    [
        jaxkv.H2ODecode(),
        pytest.param(jaxkv.RKV(window_size=2, buffer=4), marks=pytest.mark.slow),
    ],
)
def test_a_row_that_fits_is_read_as_it_is_alone(wide_lm, decode):
    """Whatever the others do not have room for."""
    context = jaxkv.compress(
        wide_lm, [PROMPTS[0], [5, 6, 7]], budget=20, prefill=jaxkv.SnapKV(window_size=4)
    )
    how = dict(budget=24, decode=decode, max_new_tokens=NEW, stop_ids=[])
    both = jaxkv.generate(wide_lm, LONGER, context=context, **how)
    for index, question in enumerate(LONGER):
        one = context.take([index])
        alone = jaxkv.generate(wide_lm, [question], context=one, **how)
        assert alone.tokens[0] == both.tokens[index]


def test_a_budget_that_does_not_hold_the_document_is_refused(wide_lm):
    context = jaxkv.compress(wide_lm, [PROMPTS[1]])
    with pytest.raises(ValueError, match=r"too small for the 20 tokens .* at least 21"):
        jaxkv.generate(
            wide_lm, [[5]], context=context, budget=20, decode=jaxkv.H2ODecode()
        )
    noted = jaxkv.compress(wide_lm, [PROMPTS[1]], speculate=jaxkv.Aligned())
    with pytest.raises(ValueError, match="budget=21 does not hold a document and its"):
        jaxkv.generate(
            *(wide_lm, [[5, 6]]),
            context=noted,
            budget=21,
            decode=SINKS,
            speculate=jaxkv.Aligned(),
        )


@pytest.mark.slow
def test_drafts_go_on_from_what_was_likeliest(wide_lm):
    drafter = jaxkv.Aligned(num_draft_tokens=7, break_even=0.0)
    turns = dict(max_new_tokens=NEW, return_cache=True, stop_ids=[])
    first = jaxkv.generate(wide_lm, PROMPTS, speculate=drafter, top_logprobs=1, **turns)
    assert {len(top) for row in first.top_logprobs for top in row} == {1}
    second = jaxkv.generate(
        wide_lm, NEXT, context=first.context, speculate=drafter, **turns
    )
    assert second.logprobs is None and second.top_logprobs is None
    plain = jaxkv.generate(wide_lm, PROMPTS, **turns)
    after = jaxkv.generate(wide_lm, NEXT, context=plain.context, **turns)
    assert (first.tokens, second.tokens) == (plain.tokens, after.tokens)
    # Of prompts, outputs and what follows, as if all had been read at once.
    texts = [
        [*row, *out, *more, *last]
        for row, out, more, last in zip(
            PROMPTS, first.tokens, NEXT, second.tokens, strict=True
        )
    ]
    whole = jaxkv.compress(wide_lm, texts, speculate=drafter).likeliest
    for index, text in enumerate(texts):
        got = np.asarray(second.context.likeliest[index, 1 : len(text)])
        np.testing.assert_array_equal(got, whole[index, 1 : len(text)])
    with pytest.raises(ValueError, match="or to the call that returned the context"):
        jaxkv.generate(wide_lm, NEXT, context=plain.context, speculate=drafter)


@pytest.mark.parametrize(
    "options",
    [
        {},
        dict(speculate=jaxkv.PromptLookup(break_even=0.0)),
        pytest.param(EVICTING, marks=pytest.mark.slow),
    ],
)
def test_logprobs_are_scores(wide_lm, options):
    out = jaxkv.generate(
        wide_lm, PROMPTS, max_new_tokens=NEW, top_logprobs=3, stop_ids=[], **options
    )
    for tokens, chosen, tops in zip(
        out.tokens, out.logprobs, out.top_logprobs, strict=True
    ):
        assert len(tokens) == len(chosen) == len(tops) == NEW
        for token, logprob, top in zip(tokens, chosen, tops, strict=True):
            assert next(iter(top.items())) == (token, logprob)  # greedy
            assert len(top) == 3 and sorted(top.values(), reverse=True) == [
                *top.values()
            ]
    policies = {k: v for k, v in options.items() if k != "speculate"}
    scores = jaxkv.score(wide_lm, PROMPTS, out.tokens, **policies)
    assert scores.tokens == out.tokens and scores.greedy == (True, True)
    np.testing.assert_allclose(scores.logprobs, out.logprobs, **CLOSE)
    np.testing.assert_allclose(scores.totals, np.sum(out.logprobs, axis=1), **CLOSE)
    plain = jaxkv.generate(wide_lm, PROMPTS, max_new_tokens=NEW, **policies)
    assert plain.logprobs is None and plain.top_logprobs is None
    only = jaxkv.generate(
        wide_lm, PROMPTS, max_new_tokens=NEW, logprobs=True, stop_ids=[], **policies
    )
    assert only.top_logprobs is None
    np.testing.assert_allclose(only.logprobs, out.logprobs, **CLOSE)


@pytest.mark.slow
def test_scores_are_those_of_the_network(wide_lm):
    rows = [[5, 9, 11], [400, 6]]
    scores = jaxkv.score(wide_lm, PROMPTS, rows)
    logits, _ = jaxkv.prefill(
        *(wide_lm.network, wide_lm.params),
        *(np.array([[*PROMPTS[0], *rows[0][:2]]], np.int32), np.array([42])),
        options=jaxkv.Options(),
        slots=42,
    )
    want = jax.nn.log_softmax(logits)[0, 11]
    np.testing.assert_allclose(scores.logprobs[0][2], want, **CLOSE)
    assert [len(row) for row in scores.logprobs] == [3, 2]
    assert scores.greedy == (False, False)


def test_candidates_behind_a_context(wide_lm):
    context = jaxkv.compress(wide_lm, PROMPTS)
    rows = [[5, 9, 11], [400, 6], [77]]
    documents = [0, 1, 0]
    got = jaxkv.score(wide_lm, None, rows, context=context, documents=documents)
    prompts = [PROMPTS[document] for document in documents]
    want = jaxkv.score(wide_lm, prompts, rows)
    for one, two in zip(got.logprobs, want.logprobs, strict=True):
        np.testing.assert_allclose(one, two, **CLOSE)
    asked = jaxkv.score(wide_lm, [[5, 9]], [[11], [12]], context=context.take([0]))
    np.testing.assert_allclose(asked.logprobs[0][0], got.logprobs[0][2], **CLOSE)
    one = jaxkv.score(wide_lm, PROMPTS[:1], rows, **EVICTING)
    assert len(one.totals) == 3


@pytest.mark.parametrize(
    ("prompts", "rows", "options", "message"),
    [
        (None, ["a"], {}, "score: pass prompts, or a context"),
        (["a"], ["a"], dict(documents=[0]), "documents= does nothing without context="),
        (
            ["a", "b"],
            ["a"] * 3,
            {},
            "score: got 3 continuations for 2 prompts; pass one",
        ),
        (["a"], [[5] * 3000], {}, "continuation 0 of 3000 tokens behind .* positions"),
        (["a"], ["b"], dict(decode=jaxkv.LongFlow()), "LongFlow evicts .* needs a bud"),
        (["a"], [], {}, "score: got no continuations"),
        (["a"], [[5], [-1]], {}, "score: continuation 1 has token ids outside"),
    ],
)
def test_bad_scores_are_named(wide_lm, prompts, rows, options, message):
    with pytest.raises(ValueError, match=message):
        jaxkv.score(wide_lm, prompts, rows, **options)


@pytest.mark.parametrize("number", [-1, 5000, 0.5])
def test_bad_alternatives_are_named(wide_lm, number):
    with pytest.raises(ValueError, match="top_logprobs must be"):
        jaxkv.generate(wide_lm, [[5]], top_logprobs=number)
