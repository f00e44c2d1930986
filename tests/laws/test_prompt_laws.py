"""The laws that scoring can break, for every prefill policy; one line in `POLICIES`.

What happens after the prompt is the business of `test_laws.py`, which runs some of
these policies through all of generation. Here each policy has one compiled program, and
what a row may keep is a traced number.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxkv import (
    H2O,
    LAQ,
    TOVA,
    DapQ,
    ExpectedAttention,
    KNorm,
    Options,
    PyramidKV,
    Random,
    SnapKV,
    forward,
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
PROMPT, NEW = 24, 4
FAST = {"xla_backend_optimization_level": 0}  # to compile; nothing here runs long
LENGTHS = [PROMPT, 3, 13]
SMALL = [9, 6, 7]  # what each row may keep, where little is kept

POLICIES = {
    "dapq": DapQ(window_size=6, prefix=2, kernel_size=3),
    "dapq, vocabulary, offset, sinks": DapQ(
        window_size=6, prefix=2, content="vocabulary", offset=3, n_sink=1, n_recent=2
    ),
    "dapq, by query head": DapQ(
        window_size=6,
        prefix=2,
        reduction="sum",
        pooling="none",
        granularity="query_head",
    ),
    "snapkv": SnapKV(window_size=4, kernel_size=3),
    "snapkv, turned ahead": SnapKV(window_size=4, kernel_size=3, offset=4),
    "snapkv, all but one": SnapKV(window_size=10, kernel_size=3),
    "pyramidkv": PyramidKV(window_size=2, kernel_size=3, pooling="avg", beta=4),
    "h2o, windowed": H2O(window_size=4),
    "h2o": H2O(window_size=None),
    "tova": TOVA(),
    "knorm": KNorm(),
    "random": Random(),
    "expected attention": ExpectedAttention(n_future_positions=16, n_sink=2),
    "laq": LAQ(window_size=3, draft_window_size=2, kernel_size=3),
}
SLOW = {"laq", "dapq, vocabulary, offset, sinks", "h2o"}  # to compile
policies = pytest.mark.parametrize(
    "name",
    [pytest.param(x, marks=pytest.mark.slow if x in SLOW else ()) for x in POLICIES],
)


@functools.cache
def program(name):
    """Return the compiled prefill of a policy."""
    options = Options(budget=PROMPT, prefill=POLICIES[name])
    options.check()

    slots = options.layer_slots(PROMPT, NEW, CONFIG.num_layers)
    prefill = functools.partial(forward.prefill, NETWORK, options=options, slots=slots)
    return jax.jit(prefill, compiler_options=FAST)


@functools.cache
def params():
    drawn = random_parameters(CONFIG, jax.random.key(0), jnp.float32)
    return jax.tree.map(lambda x: 12 * x if x.ndim == 2 else x, drawn)


@functools.cache
def full_program():
    return jax.jit(
        functools.partial(
            forward.prefill, NETWORK, options=Options(), slots=PROMPT + NEW
        )
    )


def full(tokens):
    return full_program()(params(), tokens, jnp.asarray(LENGTHS, jnp.int32))


def prompts(seed=0):
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, CONFIG.vocab_size, size=(len(LENGTHS), PROMPT))
    return jnp.asarray(tokens, jnp.int32)


def run(name, tokens, lengths=LENGTHS, keep=SMALL):
    as_array = functools.partial(jnp.asarray, dtype=jnp.int32)
    return program(name)(params(), tokens, as_array(lengths), keep=as_array(keep))


@policies
def test_what_fits_is_kept_whole_and_in_order(name):
    tokens = prompts()
    want_logits, want = full(tokens)
    logits, got = run(name, tokens, keep=[PROMPT] * 3)
    np.testing.assert_allclose(logits, want_logits, rtol=2e-4, atol=2e-4)
    for old, new in zip(want, got, strict=True):
        repeat = new.keys.shape[1] // old.keys.shape[1]
        for field in ("keys", "values", "positions"):
            a, b = np.asarray(getattr(old, field)), np.asarray(getattr(new, field))
            a = a.repeat(repeat, axis=1)
            held = np.asarray(old.positions).repeat(repeat, axis=1) >= 0
            a, b = a[:, :, : PROMPT + NEW], b[:, :, : PROMPT + NEW]
            np.testing.assert_allclose(a[held], b[held], rtol=2e-4, atol=2e-4)
            if field == "positions":
                np.testing.assert_array_equal(a, b)


@policies
def test_pseudo_tokens_leave_no_trace(name):
    """First logits are the full cache's; what is kept is the prompt's own."""
    tokens = prompts(1)
    want_logits, want = full(tokens)
    logits, got = run(name, tokens)
    np.testing.assert_allclose(logits, want_logits, rtol=2e-4, atol=2e-4)
    for old, new in zip(want, got, strict=True):
        repeat = new.keys.shape[1] // old.keys.shape[1]
        positions = np.asarray(new.positions)
        assert (positions < np.asarray(LENGTHS)[:, None, None]).all()
        for field in ("keys", "values"):
            whole = np.asarray(getattr(old, field)).repeat(repeat, axis=1)
            where = np.maximum(positions, 0)[..., None]
            whole = np.take_along_axis(whole, where, axis=2)
            held = positions >= 0
            kept = np.asarray(getattr(new, field))
            np.testing.assert_allclose(whole[held], kept[held], rtol=2e-4, atol=2e-4)


@policies
def test_each_row_keeps_what_it_may(name):
    _, cache = run(name, prompts())
    keeps = POLICIES[name].layer_keeps(
        np.asarray(SMALL), np.asarray(LENGTHS), CONFIG.num_layers
    )
    for state, keep in zip(cache, keeps, strict=True):
        want = np.minimum(keep, LENGTHS)[:, None]
        count = np.asarray(kv.occupancy(state))
        np.testing.assert_array_equal(count, np.broadcast_to(want, count.shape))
        np.testing.assert_array_equal(state.target, count)  # the first free slot
        for row in np.asarray(state.positions).reshape(-1, state.slots):
            real = row[row >= 0]
            assert (np.diff(real) > 0).all()  # in order, hence unique


@policies
def test_a_row_depends_on_no_other(name):
    tokens = prompts()
    _, together = run(name, tokens)
    others = prompts(7).at[1].set(tokens[1])
    _, apart = run(name, others, lengths=[5, 3, PROMPT], keep=[5, 6, 8])
    for old, new in zip(together, apart, strict=True):
        np.testing.assert_array_equal(old.positions[1], new.positions[1])
    # What lies in the padding is nobody's business.
    _, padded = run(name, tokens.at[2, 13:].set(60))
    for old, new in zip(together, padded, strict=True):
        np.testing.assert_array_equal(old.positions, new.positions)


@policies
def test_another_budget_compiles_nothing(name):
    run(name, prompts())
    run(name, prompts(3), lengths=[20, 20, 20], keep=[10, 11, 12])
    assert program(name)._cache_size() == 1


def test_policies_differ():
    """Each line of the table keeps something else, or it would test nothing new."""
    kept = {}
    for name in POLICIES.keys() - SLOW:
        _, cache = run(name, prompts(), lengths=[PROMPT] * 3, keep=[9] * 3)
        kept[name] = b"".join(
            np.asarray(state.positions)[:, :, :9].tobytes() for state in cache[1:]
        )
    assert len(set(kept.values())) == len(kept)
