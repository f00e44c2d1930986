"""Sampling against numbers by hand and against transformers' processors."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxkv import Categorical, Greedy
from jaxkv.fields import check_types
from jaxkv.sampling import penalize

LOGITS = jnp.log(jnp.array([[0.5, 0.25, 0.15, 0.1]]))


def kept(sampler):
    return np.isfinite(np.asarray(sampler.filter(LOGITS)))[0].tolist()


@pytest.mark.parametrize(
    ("options", "wanted"),
    [
        (dict(), [True, True, True, True]),
        (dict(top_k=2), [True, True, False, False]),
        (dict(top_k=9), [True, True, True, True]),
        (dict(top_p=0.5), [True, False, False, False]),
        (dict(top_p=0.6), [True, True, False, False]),
        (dict(top_p=1e-6), [True, False, False, False]),
        (dict(min_p=0.25), [True, True, True, False]),
        (dict(min_p=1.0), [True, False, False, False]),
        (dict(temperature=0.5, min_p=0.25), [True, True, False, False]),
    ],
)
def test_filters_by_hand(options, wanted):
    assert kept(Categorical(**options)) == wanted


def test_penalty_by_hand():
    logits = jnp.array([[2.0, -2.0, 2.0, -2.0]])
    seen = jnp.array([[True, True, False, False]])
    np.testing.assert_allclose(penalize(logits, seen, 2.0), [[1.0, -4.0, 2.0, -2.0]])


def test_greedy_takes_the_lowest_id_on_ties():
    assert int(Greedy().pick(jnp.array([[1.0, 3.0, 3.0]]), None)[0]) == 1


def test_draws_follow_the_distribution():
    keys = jax.random.split(jax.random.key(0), 4000)
    drawn = Categorical(top_k=2).pick(jnp.repeat(LOGITS, 4000, axis=0), keys)
    share = np.bincount(np.asarray(drawn), minlength=4) / 4000
    np.testing.assert_allclose(share, [2 / 3, 1 / 3, 0, 0], atol=0.03)


@given(
    rows=st.lists(
        st.lists(st.floats(-1e4, 1e4, width=32), min_size=5, max_size=5, unique=True),
        min_size=3,
        max_size=3,
    ),
    temperature=st.floats(1.2e-38, 1e-30),
    cut=st.sampled_from([dict(), dict(top_k=3), dict(top_p=0.9), dict(min_p=0.5)]),
)
def test_a_temperature_near_0_is_greedy(rows, temperature, cut):
    """Also of logits that are all below 0, or so large that the quotients overflow."""
    logits = jnp.asarray(rows, jnp.float32).round()
    best = logits == logits.max(-1, keepdims=True)
    sampler = Categorical(temperature=temperature, **cut)
    for seed in range(3):
        drawn = sampler.pick(logits, jax.random.split(jax.random.key(seed), 3))
        assert np.take_along_axis(np.asarray(best), drawn[:, None], axis=1).all()


@pytest.mark.parametrize("penalty", [1.2e-38, 3e38])
@pytest.mark.parametrize("temperature", [1.2e-38, 1.0])
def test_a_penalty_without_measure_leaves_numbers(penalty, temperature):
    logits = jnp.array([[30.0, -30.0, 20.0, 10.0]])
    seen = jnp.array([[True, True, False, False]])
    penalized = penalize(logits, seen, penalty)
    assert jnp.isfinite(penalized).all()
    sampler = Categorical(temperature=temperature)
    drawn = int(sampler.pick(penalized, jax.random.split(jax.random.key(0), 1))[0])
    assert drawn == (0 if penalty < 1 else 2)


def test_what_is_no_number_stays_so():
    """So that it is told apart by what was chosen."""
    bad = jnp.array([[jnp.inf, 1.0], [jnp.nan, 1.0]])
    kept = penalize(bad, jnp.ones((2, 2), bool), 2.0)
    np.testing.assert_array_equal(np.isfinite(kept), [[False, True], [False, True]])
    keys = jax.random.split(jax.random.key(0), 2)
    drawn = Categorical(temperature=1e-38 * 2).pick(bad, keys)
    np.testing.assert_array_equal(drawn, [0, 0])


@given(
    seed=st.integers(0, 2**16),
    temperature=st.floats(0.2, 3),
    top_k=st.integers(1, 40),
    top_p=st.floats(0.05, 0.99),
    min_p=st.floats(0.0, 0.5),
)
def test_filters_agree_with_transformers(seed, temperature, top_k, top_p, min_p):
    torch = pytest.importorskip("torch")
    from transformers.generation import logits_process as hf

    logits = np.random.default_rng(seed).normal(size=(2, 40)).astype(np.float32) * 3
    theirs = torch.tensor(logits)
    for warper in (
        hf.TemperatureLogitsWarper(temperature),
        hf.TopKLogitsWarper(top_k),
        hf.TopPLogitsWarper(top_p),
        hf.MinPLogitsWarper(min_p),
    ):
        theirs = warper(None, theirs)
    ours = Categorical(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    ours = np.asarray(ours.filter(jnp.asarray(logits)))
    np.testing.assert_array_equal(np.isfinite(ours), np.isfinite(theirs.numpy()))


@given(seed=st.integers(0, 2**16), penalty=st.floats(0.5, 2))
def test_penalty_agrees_with_transformers(seed, penalty):
    torch = pytest.importorskip("torch")
    from transformers.generation import logits_process as hf

    rng = np.random.default_rng(seed)
    logits = rng.normal(size=(2, 40)).astype(np.float32)
    ids = rng.integers(0, 40, size=(2, 15))
    theirs = hf.RepetitionPenaltyLogitsProcessor(penalty)(
        torch.tensor(ids), torch.tensor(logits)
    )
    seen = np.zeros((2, 40), bool)
    seen[np.arange(2)[:, None], ids] = True
    ours = penalize(jnp.asarray(logits), jnp.asarray(seen), penalty)
    np.testing.assert_allclose(ours, theirs.numpy(), rtol=1e-6)


@pytest.mark.parametrize(
    ("sampler", "message"),
    [
        (Categorical(temperature=0), "temperature must be above 0, got 0"),
        (Categorical(temperature=float("nan")), "temperature takes a number, got nan"),
        (Categorical(top_k=-1), "top_k must be at least 0"),
        (Categorical(top_p=0), "top_p must be above 0 and at most 1"),
        (Categorical(min_p=2), "min_p must be at least 0 and at most 1"),
        (Greedy(repetition_penalty=0), "repetition_penalty must be above 0"),
    ],
)
def test_options_that_mean_nothing(sampler, message):
    with pytest.raises(ValueError, match=message):
        check_types(sampler)
