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
