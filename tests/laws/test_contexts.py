"""The laws of contexts: a question behind a document is the end of a whole prompt."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_policies import PREFILL, SMALL_DECODE
from tiny import NETWORK, params, prompts

from jaxkv import (
    Aligned,
    Conditional,
    Context,
    Full,
    Greedy,
    Options,
    SnapKV,
    StreamingLLM,
)
from jaxkv import state as kv
from jaxkv.contexts import asking, sharing
from jaxkv.contexts import context as contexts
from jaxkv.identity import Identity
from jaxkv.laws import lawbook, programs
from jaxkv.laws.programs import NEW, PROMPT

LENGTHS = (16, 9)  # of the documents
ABOUT, COUNTS = (0, 1, 0), (8, 3, 1)  # each question's document, and its tokens
WIDTH = max(LENGTHS)
QUESTION = PROMPT - WIDTH
NOBODY = Identity(name="tiny", network="", tokenizer=None, dtype="float32")
ALIGNED = Aligned(num_draft_tokens=7, depth=3, ngram_max=2, ngram_min=1, break_even=0.0)
KINDS = {
    "full": Options(),
    "penalised": Options(sampler=Greedy(repetition_penalty=1.3)),
    "drafts": Options(speculate=lawbook.DRAFTER),
    "lossy drafts": Options(speculate=ALIGNED, accept=Conditional()),
    **{
        name: Options(decode=SMALL_DECODE[name], budget=PROMPT + 2)
        for name in SMALL_DECODE
        if name != "full"
    },
}

QUICK = ("full", "lossy drafts", "longflow")  # the others are much as these


@functools.partial(jax.jit, static_argnames=("options", "likeliest"))
def read(weights, tokens, lengths, asked, keep, options, likeliest=False):
    return contexts.read_documents(
        *(NETWORK, weights, tokens, lengths, asked, keep),
        options=options,
        slots=(WIDTH,) * NETWORK.config.num_layers,
        likeliest=likeliest,
    )


def compress(options=None, keep=None, question=None, likeliest=False):
    """Return a context of two documents of random tokens."""
    tokens, lengths = prompts(3, LENGTHS, WIDTH)
    asked = jnp.zeros_like(lengths)
    text = tokens
    if question is not None:
        text = jnp.pad(tokens, ((0, 0), (0, QUESTION)))
        asked = asked + len(question)
        for row, length in enumerate(LENGTHS):
            text = text.at[row, length : length + len(question)].set(question)
    keep = None if keep is None else jnp.full_like(lengths, keep)
    found = read(
        *(params(), text, lengths, asked, keep),
        options=options or Options(),
        likeliest=likeliest,
    )
    return Context(
        cache=found.cache,
        tokens=tokens,
        lengths=lengths,
        kept=found.kept.max(0),
        logits=found.logits,
        likeliest=found.likeliest,
        identity=NOBODY,
        policy="",
    )


@functools.partial(jax.jit, static_argnames="options")
def ask(weights, context, about, tokens, counts, keys, shared, options):
    slots = options.num_slots(PROMPT, NEW)
    if any(shared):
        slots = QUESTION + NEW
    state = asking.ask(
        *(NETWORK, weights, context, about, tokens, counts, keys, jnp.array([-1])),
        options=options,
        slots=(slots,) * NETWORK.config.num_layers,
        max_out=NEW,
        shared=shared,
    )
    return sharing.advance(
        *(NETWORK, weights, state, shared, jnp.int32(NEW), jnp.array([-1])),
        options=options,
    )


def asked(context, options, rows=(0, 1, 2), seed=4, *, goes_on=False):
    """Ask some of three questions of random tokens, each with its own key."""
    tokens, counts = prompts(seed, COUNTS, QUESTION)
    keys, rows = jax.random.split(jax.random.key(0), 3), jnp.asarray(rows)
    about = jnp.asarray(ABOUT, jnp.int32)[rows]
    shared = sharing.shared_of(
        *(context, np.asarray(about), options, params()), goes_on=goes_on
    )
    ended = ask(
        *(params(), context, about, tokens[rows], counts[rows], keys[rows], shared),
        options=options,
    )
    cache = map(kv.own_all, kv.beside(ended.cache, shared))
    return dataclasses.replace(ended, cache=tuple(cache))


def whole(options, seed=4):
    """Generate from documents and questions that are read as prompts."""
    tokens, lengths = prompts(3, LENGTHS, WIDTH)
    questions, counts = prompts(seed, COUNTS, QUESTION)
    text = np.zeros((len(ABOUT), PROMPT), np.int32)
    for row, (about, count) in enumerate(zip(ABOUT, COUNTS, strict=True)):
        length = LENGTHS[about]
        text[row, :length] = tokens[about, :length]
        text[row, length : length + count] = questions[row, :count]
    if options.decode.evicts:
        options = dataclasses.replace(options, prefill=StreamingLLM(n_sink=1))
    lengths = lengths[jnp.asarray(ABOUT)] + counts
    keys = jax.random.split(jax.random.key(0), 3)
    return programs.generate(options, jnp.asarray(text), lengths, keys=keys)


@pytest.mark.parametrize(
    "options",
    [
        pytest.param(options, id=name, marks=[pytest.mark.slow] * (name not in QUICK))
        for name, options in KINDS.items()
    ],
)
def test_a_whole_document_and_a_question_are_a_prompt(options):
    drafter = options.speculate
    context = compress(likeliest=drafter is not None and drafter.likeliest)
    before = jax.tree.map(np.asarray, context)
    got, want = asked(context, options), whole(options)
    np.testing.assert_array_equal(got.tokens, want.tokens)
    lawbook.assert_same_tokens_are_held(want.cache, got.cache)
    again = asked(context, options)  # using it has changed nothing
    jax.tree.map(np.testing.assert_array_equal, got.cache, again.cache)
    jax.tree.map(np.testing.assert_array_equal, before, context)


@pytest.mark.parametrize(
    "name",
    [
        "full",
        *(pytest.param(x, marks=pytest.mark.slow) for x in ("penalised", "drafts")),
    ],
)
def test_rows_that_share_slots_are_rows_that_copy_them(name):
    context = compress(Options(budget=8, prefill=SnapKV(window_size=4)), keep=8)
    shared = asked(context, KINDS[name])
    copied = asked(context, KINDS[name], goes_on=True)
    np.testing.assert_array_equal(shared.tokens, copied.tokens)
    lawbook.assert_same_tokens_are_held(copied.cache, shared.cache)


def test_what_is_shared_of_a_context():
    context = compress()
    documents = np.array([1, 1], np.int32)

    def of(context, **options):
        given = documents, Options(**options), params()
        return sharing.shared_of(context, *given)

    for state, found in zip(context.cache, of(context), strict=True):
        assert found.most == 2 and found.slots.owner.tolist() == [0, 0]
        np.testing.assert_array_equal(found.slots.keys, state.keys[1:])
    one = context.take([1, 0])
    documents = np.array([1, 0, 1], np.int32)
    assert of(one)[0].slots.keys is one.cache[0].keys  # no copy
    assert any(of(one, decode_implementation="reference"))
    assert not any(of(one, decode_implementation="pallas_tpu"))
    assert not any(of(one, decode=SMALL_DECODE["longflow"]))
    layer, other = context.cache
    ring = dataclasses.replace(layer, window=layer.slots)
    mixed = dataclasses.replace(context, cache=(ring, other))
    assert [found is None for found in of(mixed)] == [True, False]


@pytest.mark.parametrize("name", ["full", "longflow"])
def test_questions_in_any_order_are_questions_alone(name):
    options = KINDS[name]
    context = compress(Options(budget=8, prefill=SnapKV(window_size=4)), keep=8)
    together = asked(context, options).tokens
    other = asked(context, options, rows=(2, 0, 1)).tokens
    np.testing.assert_array_equal(other[jnp.array([1, 2, 0])], together)
    again = asked(context.take([0, 1, 0]), options, rows=(2, 0, 1)).tokens
    np.testing.assert_array_equal(again, other)
    for row in range(len(COUNTS)):
        alone = asked(context, options, rows=(row,) * 3).tokens[0]
        np.testing.assert_array_equal(alone, together[row])


@pytest.mark.parametrize(
    "policy",
    [
        pytest.param(
            policy, id=name, marks=[pytest.mark.slow] * (name not in ("snapkv", "dapq"))
        )
        for name, policy in PREFILL.items()
        if policy.heads(4, 2) == 2 and policy != Full()
    ],
)
def test_a_context_is_bounded(policy):
    context = compress(Options(budget=8, prefill=policy), keep=6, question=(5, 6, 7))
    even = policy.same_budgets and getattr(policy, "head_share", 1) == 1
    if even:
        np.testing.assert_array_equal(context.kept, [6, 6])
    for row, length in enumerate(LENGTHS):
        held = context.kept_positions(row)
        assert np.mean([head.size for layer in held for head in layer]) <= 6
        for head in sum(held, ()):
            assert len(set(head.tolist())) == len(head)
            assert head.max() < length  # nothing of the question
            assert len(head) == 6 or not even


def test_the_window_is_the_documents_end_or_the_question():
    policy = SnapKV(window_size=4, kernel_size=3)
    options = Options(budget=8, prefill=policy)
    agnostic = compress(options, keep=8)
    for row, length in enumerate(LENGTHS):
        for head in sum(agnostic.kept_positions(row), ()):
            assert head[-4:].tolist() == list(range(length - 4, length))
    question = (11, 3, 50, 7)
    aware = compress(options, keep=8, question=question)
    # A whole prompt whose window is the question keeps that, and the same beside it.
    tokens = jnp.pad(agnostic.tokens, ((0, 0), (0, QUESTION)))
    for row, length in enumerate(LENGTHS):
        tokens = tokens.at[row, length : length + 4].set(jnp.array(question))
    lengths = agnostic.lengths + 4
    prompt = read(
        *(params(), tokens, lengths, jnp.zeros_like(lengths), jnp.array([12, 12])),
        options=Options(budget=12, prefill=policy),
    )
    for row, length in enumerate(LENGTHS):
        for layer, state in zip(aware.kept_positions(row), prompt.cache, strict=True):
            for head, held in zip(layer, np.asarray(state.positions[row]), strict=True):
                assert held[held >= 0].tolist() == [*head, *range(length, length + 4)]
