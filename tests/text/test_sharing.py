"""Many questions about one document: it is held once, and nothing else changes."""

import dataclasses
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

import jaxkv
from jaxkv import state as kv
from jaxkv.contexts import asking, candidates, sharing
from jaxkv.models.decoder import Decoder
from jaxkv.text import questions as doors

DOCUMENTS = [list(range(5, 75)), list(range(300, 340)), list(range(40, 60))]
QUESTIONS = [[7, 8, 9], [400, 11], [77], [5, 6, 7]]
ABOUT = [1, 0, 1, 1]
NEW = 8


@pytest.fixture(scope="module")
def context(wide_lm):
    policy = jaxkv.SnapKV(window_size=4)
    return jaxkv.compress(wide_lm, DOCUMENTS, budget=16, prefill=policy)


def copied(context, *_, **__):
    return (None,) * len(context.cache)


@pytest.mark.slow
def test_outputs_are_those_of_rows_that_copy(wide_lm, context, monkeypatch):
    asked = dict(context=context, documents=ABOUT, max_new_tokens=NEW)
    drafts = dict(speculate=jaxkv.PromptLookup(ngram_min=1, break_even=0.0))

    def outputs(**more):
        return jaxkv.generate(wide_lm, QUESTIONS, **asked, **more)

    got, drafted = outputs(return_cache=True), outputs(**drafts)
    assert drafted.tokens == got.tokens and drafted.stats.drafts.accepted > 0
    assert outputs().tokens == got.tokens  # no buffer of the context is taken
    monkeypatch.setattr(doors, "shared_of", copied)
    want = outputs(return_cache=True)
    assert got.tokens == want.tokens
    assert got.context.kept.tolist() == want.context.kept.tolist()
    for row in range(len(ABOUT)):
        both = got.context.kept_positions(row), want.context.kept_positions(row)
        jax.tree.map(np.testing.assert_array_equal, *both)
    assert got.stats.decode_implementation == "xla"
    # Two of three documents, and slots for questions and outputs.
    row, document = (kv.num_bytes(x.cache) for x in (got.context.take([0]), context))
    per_slot = row / got.context.cache[0].slots
    slots = 2 * context.cache[0].slots + len(ABOUT) * got.stats.slots
    assert got.stats.cache_bytes == pytest.approx(slots * per_slot, rel=0.01)
    assert document / 3 / context.cache[0].slots == pytest.approx(per_slot, rel=0.01)


def test_scores_are_those_of_rows_that_copy(wide_lm, context, monkeypatch):
    asked = dict(context=context.join(context), documents=[5, 0, 2, 2])  # 3 of 6

    def scores():
        return jaxkv.score(wide_lm, None, QUESTIONS, **asked)

    got = scores()
    monkeypatch.setattr("jaxkv.text.scores.shared_of", copied)
    for one, two in zip(got.logprobs, scores().logprobs, strict=True):
        np.testing.assert_allclose(one, two, rtol=1e-4, atol=1e-4)


def test_few_programs_serve_all_numbers_of_documents(wide_lm, context, monkeypatch):
    several, keys, held = context.join(context), set(), []

    def noted(*args, **kwargs):
        keys.add(candidates.weigh_jit.key(*args, **kwargs))
        held.append(len(kwargs["shared"][0].slots.keys))
        raise InterruptedError

    monkeypatch.setattr("jaxkv.text.scores.weigh_jit", noted)
    for number in range(1, 7):
        about = [0] * 5 + [min(row, number - 1) for row in range(6)]
        given = dict(context=several, documents=about)
        with pytest.raises(InterruptedError):
            jaxkv.score(wide_lm, None, [[7, 8]] * len(about), **given)
    assert held == [1, 2, 4, 4, 6, 6]  # the last two are the context's own
    assert len(keys) == len(set(held))


def test_rows_that_devices_share_out_have_copies(context, monkeypatch):
    documents = np.array(ABOUT, np.int32)

    def shared():
        return sharing.shared_of(context, documents, jaxkv.Options(), None)

    for data, found in ((1, True), (2, False)):
        mesh = types.SimpleNamespace(shape={"data": data, "model": 2})
        monkeypatch.setattr(sharing, "mesh_of", lambda _, mesh=mesh: mesh)
        assert any(shared()) == found


def test_the_compiled_programs_hold_a_document_once():
    """64 questions on 1,000 tokens, by what the compiler says it takes."""
    rows, slots, room = 64, 1024, 32
    config = dataclasses.replace(tiny.CONFIG, num_kv_heads=4, head_dim=32)
    network, weights = Decoder(config), tiny.parameters(config)

    def states(batch, slots):
        return (
            kv.init(batch=batch, kv_heads=4, slots=slots, head_dim=32, dtype="float32"),
        ) * config.num_layers

    whole = jaxkv.Context(
        cache=states(1, slots),
        tokens=jnp.zeros((1, slots), jnp.int32),
        lengths=jnp.full(1, 1000),
        kept=jnp.full(1, 1000),
        logits=jnp.zeros((1, config.vocab_size)),
        likeliest=None,
        identity=tiny.language_model().identity,
        policy="",
    )
    about, counts = np.zeros(rows, np.int32), np.full(rows, 3, np.int32)
    given = (network, weights, whole, about, np.zeros((rows, 8), np.int32), counts)
    keys, stops = jax.random.split(jax.random.key(0), rows), jnp.array([-1])

    shared = sharing.shared_of(whole, about, jaxkv.Options(), weights)
    how = dict(
        options=jaxkv.Options(), slots=(room,) * config.num_layers, max_out=room - 8
    )
    begun = jax.eval_shape(
        lambda *x: asking.ask(network, *x, shared=shared, **how),
        *(*given[1:], keys, stops),
    )
    programs = (
        asking.ask_jit.lower(*given, keys, stops, shared=shared, **how),
        sharing.advance_jit.lower(
            *(network, weights, begun, shared, jnp.int32(9), stops),
            options=jaxkv.Options(),
        ),
    )
    found = [program.compile().memory_analysis() for program in programs]
    read, decoded = (x.temp_size_in_bytes + x.output_size_in_bytes for x in found)
    # Beside the document, which is an argument: what is the rows' own, and logits.
    document, own = (kv.num_bytes(states(*x)) for x in ((1, slots), (rows, room)))
    logits = rows * config.num_heads * slots * 4
    assert decoded < own + document + 3 * logits
    assert read < 2 * own + document + 3 * 8 * logits
    assert max(read, decoded) < rows * document / 4
