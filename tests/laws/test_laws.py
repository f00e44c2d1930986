"""The laws of the design, as properties; a policy joins by one line in `POLICIES`."""

import dataclasses

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings

from jaxkv import (
    RKV,
    VATP,
    Categorical,
    DapQ,
    Full,
    Greedy,
    H2ODecode,
    LongFlow,
    Options,
    RandomDecode,
    StreamingLLM,
    TOVADecode,
    forward,
    generation,
)
from jaxkv import state as kv
from jaxkv.models.decoder import Config, Decoder, random_parameters

CONFIG = Config(
    vocab_size=61,
    hidden_size=32,
    intermediate_size=48,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    qk_norm=True,
    tied=True,
)
NETWORK = Decoder(CONFIG)
PROMPT, NEW = 32, 24

DAPQ = DapQ(window_size=4, prefix=1, kernel_size=3)

DAPQ = DapQ(window_size=4, prefix=1, kernel_size=3)

# name: options without their budget. Every law runs over this table.
POLICIES = {
    "full": dict(prefill=Full(), decode=Full()),
    "streaming-llm": dict(prefill=StreamingLLM(), decode=StreamingLLM()),
    "streaming-llm, one sink": dict(
        prefill=StreamingLLM(n_sink=1), decode=StreamingLLM(n_sink=1)
    ),
    "streaming-llm prompt, append": dict(prefill=StreamingLLM(), decode=Full()),
    "full prompt, streaming-llm": dict(prefill=Full(), decode=StreamingLLM()),
    **{
        name: dict(prefill=StreamingLLM(n_sink=1), decode=decode)
        for name, decode in {
            "longflow": LongFlow.paper(),
            "longflow, protected": LongFlow(
                score="deletion",
                n_sink=1,
                n_recent=1,
                protect_prompt=True,
                shared=False,
            ),
            "tova": TOVADecode(),
            "h2o": H2ODecode(),
            "vatp": VATP(n_sink=1, n_recent=2),
            "r-kv": RKV(window_size=2, kernel_size=3, buffer=2),
            "random": RandomDecode(),
        }.items()
    },
    # All other prompt policies stand under the laws of test_prompt_laws.py.
    "dapq prompt, append": dict(prefill=DAPQ, decode=Full()),
    "dapq prompt, streaming-llm": dict(prefill=DAPQ, decode=StreamingLLM()),
    "full prompt, longflow in bulk": dict(
        prefill=Full(), decode=LongFlow(interval=3, n_recent=1)
    ),
}
SAMPLERS = {
    "greedy": Greedy(),
    "penalised": Greedy(repetition_penalty=1.3),
    "drawn": Categorical(temperature=0.9, top_k=20, top_p=0.9, min_p=0.02),
}
# A program takes seconds to compile. How a token is drawn has nothing to do with what
# evicts, so that these prove it for all; the others share one budget and one sampler.
THOROUGH = {"full", "streaming-llm", "longflow"}
policies = pytest.mark.parametrize("name", POLICIES)
prefill = jax.jit(forward.prefill, static_argnames=("network", "options", "slots"))
decode_step = jax.jit(forward.decode_step, static_argnames=("network", "options"))


@pytest.fixture(scope="module")
def params():
    drawn = random_parameters(CONFIG, jax.random.key(0), jnp.float32)
    # Wide enough that no two tokens are nearly as likely.
    return jax.tree.map(lambda x: 12 * x if x.ndim == 2 else x, drawn)


def prompts(seed, lengths):
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, CONFIG.vocab_size, size=(len(lengths), PROMPT))
    return jnp.asarray(tokens, jnp.int32), jnp.asarray(lengths, jnp.int32)


def run(
    params, tokens, lengths, options, *, new=NEW, stop_ids=(-1,), seed=0, keys=None
):
    if keys is None:
        keys = jax.random.split(jax.random.key(seed), len(lengths))
    return generation.generate_jit(
        NETWORK,
        params,
        tokens,
        lengths,
        keys,
        jnp.asarray(stop_ids, jnp.int32),
        jnp.int32(new),
        options=options,
        slots=options.num_slots(PROMPT, NEW),
        max_out=NEW,
    )


def budget_of(name, small):
    keeps_prompt = isinstance(POLICIES[name]["prefill"], Full)
    whole = PROMPT + POLICIES[name]["decode"].spare
    return None if name == "full" else (whole if keeps_prompt else small)


@pytest.mark.parametrize(
    ("name", "sampler"),
    [
        (name, sampler)
        for name in POLICIES
        for sampler in SAMPLERS
        if sampler == "greedy" or name in THOROUGH
    ],
)
@settings(max_examples=5)
@given(seed=st.integers(0, 2**16), data=st.data())
def test_full_budget_is_exact(params, name, sampler, seed, data):
    lengths = data.draw(st.lists(st.integers(1, PROMPT), min_size=3, max_size=3))
    tokens, lengths = prompts(seed, lengths)
    plain = run(params, tokens, lengths, Options(sampler=SAMPLERS[sampler]))
    budget = None if name == "full" else PROMPT + NEW
    options = Options(budget=budget, sampler=SAMPLERS[sampler], **POLICIES[name])
    np.testing.assert_array_equal(
        run(params, tokens, lengths, options).tokens, plain.tokens
    )


@policies
@settings(max_examples=8)
@given(seed=st.integers(0, 2**16), data=st.data())
def test_bounded(params, name, seed, data):
    small = data.draw(st.sampled_from((6, 9) if name in THOROUGH else (9,)))
    lengths = data.draw(st.lists(st.integers(1, PROMPT), min_size=3, max_size=3))
    tokens, lengths = prompts(seed, lengths)
    options = Options(budget=budget_of(name, small), **POLICIES[name])
    for state in run(params, tokens, lengths, options).cache:
        held = np.asarray(state.positions)
        occupied = held >= 0
        if options.decode.evicts:
            assert occupied.sum(-1).max() <= options.budget
        assert held.max() < int(lengths.max()) + NEW
        for row in held.reshape(-1, held.shape[-1]):
            real = row[row >= 0]
            assert len(set(real.tolist())) == len(real)
        # The newest token that was fed is never missing.
        newest = np.asarray(lengths) + NEW - 2
        assert (held == newest[:, None, None]).any(-1).all()


def test_streaming_llm_keeps_sinks_and_recent_ones(params):
    tokens, lengths = prompts(0, [30, 9, 3])
    options = Options(budget=12, **POLICIES["streaming-llm"])
    cache = run(params, tokens, lengths, options).cache
    for row, length in enumerate([30, 9, 3]):
        end = length + NEW - 1
        wanted = sorted({*range(4), *range(end - 8, end)})
        for state in cache:
            for head in np.asarray(state.positions)[row]:
                assert sorted(head.tolist()) == wanted


@policies
@settings(max_examples=4)
@given(seed=st.integers(0, 2**16))
def test_batch_equals_singles(params, name, seed):
    tokens, lengths = prompts(seed, [PROMPT, 3, 17])
    for sampler in SAMPLERS if name in THOROUGH else ("greedy",):
        options = Options(
            budget=budget_of(name, 9), sampler=SAMPLERS[sampler], **POLICIES[name]
        )
        keys = jax.random.split(jax.random.key(seed), 3)
        together = run(params, tokens, lengths, options, keys=keys).tokens
        for row in range(3):
            one = slice(row, row + 1)
            alone = run(params, tokens[one], lengths[one], options, keys=keys[one])
            np.testing.assert_array_equal(alone.tokens[0], together[row])


def cache_after_prefill(params, name, seed=0):
    tokens, lengths = prompts(seed, [PROMPT, 3, 17])
    options = Options(
        budget=budget_of(name, 9), decode_implementation="xla", **POLICIES[name]
    )
    slots = options.num_slots(PROMPT, NEW)
    _, cache = prefill(NETWORK, params, tokens, lengths, options=options, slots=slots)
    return options, lengths, cache


def by_slot(state, change):
    """Return the memory with what it holds for each slot changed."""
    shape = state.positions.shape
    return jax.tree.map(lambda x: change(x) if x.shape == shape else x, state.memory)


def next_victim(state):
    """Return the position of the token that is overwritten next, -1 if it is none."""
    return np.take_along_axis(
        np.asarray(state.positions), np.asarray(state.target)[..., None], axis=2
    )


@policies
@settings(max_examples=5)
@given(seed=st.integers(0, 2**16))
def test_order_of_slots_has_no_meaning(params, name, seed):
    options, lengths, cache = cache_after_prefill(params, name)
    order = np.random.default_rng(seed).permutation(cache[0].slots)
    place = jnp.asarray(np.argsort(order), jnp.int32)
    permuted = tuple(
        dataclasses.replace(
            s,
            keys=s.keys[:, :, order],
            values=s.values[:, :, order],
            positions=s.positions[:, :, order],
            target=place[s.target],
            memory=by_slot(s, lambda x: x[:, :, order]),
        )
        for s in cache
    )
    token = jnp.asarray([1, 2, 3], jnp.int32)
    plain, after = decode_step(NETWORK, params, token, lengths, cache, options=options)
    other, moved = decode_step(
        NETWORK, params, token, lengths, permuted, options=options
    )
    np.testing.assert_allclose(plain, other, rtol=2e-4, atol=2e-4)
    if options.decode.evicts:  # then the same token goes next
        for one, two in zip(after, moved, strict=True):
            np.testing.assert_array_equal(next_victim(one), next_victim(two))


@policies
@pytest.mark.parametrize("implementation", ["reference", "xla"])
def test_free_slots_are_never_read(params, name, implementation):
    options, lengths, cache = cache_after_prefill(params, name)
    options = dataclasses.replace(options, decode_implementation=implementation)
    poisoned = tuple(
        dataclasses.replace(
            s,
            keys=jnp.where(kv.occupied(s)[..., None], s.keys, jnp.nan),
            values=jnp.where(kv.occupied(s)[..., None], s.values, jnp.nan),
            memory=by_slot(s, lambda x, s=s: jnp.where(kv.occupied(s), x, jnp.nan)),
        )
        for s in cache
    )
    token = jnp.asarray([1, 2, 3], jnp.int32)
    plain, poisoned = (
        decode_step(NETWORK, params, token, lengths, c, options=options)[0]
        for c in (cache, poisoned)
    )
    np.testing.assert_array_equal(plain, poisoned)


@policies
def test_pure_and_of_one_shape(params, name):
    options, lengths, cache = cache_after_prefill(params, name)
    before = jax.tree.map(np.asarray, cache)
    token = jnp.asarray([1, 2, 3], jnp.int32)
    first, after = decode_step(NETWORK, params, token, lengths, cache, options=options)
    second, _ = decode_step(NETWORK, params, token, lengths, cache, options=options)
    np.testing.assert_array_equal(first, second)
    jax.tree.map(np.testing.assert_array_equal, before, cache)
    assert jax.tree.structure(after) == jax.tree.structure(cache)
    for old, new in zip(jax.tree.leaves(cache), jax.tree.leaves(after), strict=True):
        assert (old.shape, old.dtype) == (new.shape, new.dtype)


@policies
def test_finished_rows_do_not_change(params, name):
    options, lengths, cache = cache_after_prefill(params, name)
    position = lengths.at[1].set(-1)
    token = jnp.asarray([1, 2, 3], jnp.int32)
    logits, after = decode_step(
        NETWORK, params, token, position, cache, options=options
    )
    assert np.isfinite(logits).all()
    jax.tree.map(
        lambda old, new: np.testing.assert_array_equal(old[1], new[1]), cache, after
    )


@policies
def test_no_recompilation(params, name):
    options = Options(budget=budget_of(name, 9), **POLICIES[name])
    rebuilt = Options(
        budget=budget_of(name, 9),
        **{key: dataclasses.replace(v) for key, v in POLICIES[name].items()},
    )
    run(params, *prompts(0, [5, 6, 7]), options, new=3)
    traced = generation.generate_jit._cache_size()
    run(params, *prompts(1, [32, 1, 9]), rebuilt, new=NEW)
    assert generation.generate_jit._cache_size() == traced


def test_stop_ids_end_rows_apart(params):
    tokens, lengths = prompts(3, [20, 11, 4])
    free = np.asarray(run(params, tokens, lengths, Options()).tokens)
    stop = (int(free[0, 4]), int(free[1, 9]))
    out = run(params, tokens, lengths, Options(), stop_ids=stop)
    for row in range(3):
        hits = np.flatnonzero(np.isin(free[row], stop))
        end = hits[0] + 1 if len(hits) else NEW
        assert int(out.lengths[row]) == end
        assert bool(out.stopped[row]) == bool(len(hits))
        np.testing.assert_array_equal(out.tokens[row, :end], free[row, :end])
        assert (np.asarray(out.tokens)[row, end:] == -1).all()


def test_cached_decoding_equals_full_recomputation(params):
    tokens, lengths = prompts(5, [12, 7, 31])
    out = np.asarray(run(params, tokens, lengths, Options(), new=8).tokens)
    for row, length in enumerate([12, 7, 31]):
        sequence = np.asarray(tokens)[row, :length].tolist()
        for step in range(8):
            padded = (
                jnp.zeros((1, 48), jnp.int32)
                .at[0, : len(sequence)]
                .set(jnp.asarray(sequence))
            )
            logits, _ = prefill(
                NETWORK,
                params,
                padded,
                jnp.asarray([len(sequence)], jnp.int32),
                options=Options(prefill_implementation="reference"),
                slots=48,
            )
            assert int(logits[0].argmax()) == out[row, step]
            sequence.append(int(out[row, step]))
