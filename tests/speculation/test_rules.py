"""The rules of acceptance, against numbers worked out by hand."""

import math

import jax.numpy as jnp
import numpy as np
import pytest

from jaxkv.fields import check_types
from jaxkv.speculation.rules import (
    Conditional,
    Exact,
    FixedThreshold,
    TopK,
    Typical,
    View,
)
from jaxkv.speculation.verdict import view
from jaxkv.trees import DraftTree


def seen(*, probability, highest=0.6, entropy=1.0, rank=0, stop=0.0, vocabulary=8):
    one = {"probability": probability, "highest": highest, "entropy": entropy}
    return View(
        chosen=jnp.asarray([[rank == 0]]),
        rank=jnp.asarray([[rank]]),
        stop=jnp.asarray([[stop]]),
        vocabulary=vocabulary,
        **{name: jnp.asarray([[x]], jnp.float32) for name, x in one.items()},
    )


@pytest.mark.parametrize(
    ("rule", "threshold", "situation"),
    [
        (Conditional(form="F1"), 0.05, dict(entropy=0.5)),
        (Conditional(form="F1", alpha=0.05), 0.075, dict(entropy=0.5)),
        (Conditional(form="F1"), 0.0, dict(entropy=2.0)),  # never below tau_min
        (Conditional(form="F1", tau_min=0.02), 0.02, dict(entropy=2.0)),
        # H / ln V = 1 / ln 8
        (Conditional(form="F2"), 0.1 - 0.1 / math.log(8), dict(entropy=1.0)),
        (Conditional(form="F3"), 0.3, dict(entropy=2.0)),
        (Conditional(form="F3"), 0.25, dict(entropy=2.0, highest=0.25)),
        (Conditional(form="F4"), 0.3, dict(entropy=2.0)),
        (Conditional(form="F4"), 0.2, dict(entropy=2.0, highest=0.2)),
        (Conditional(form="F1", beta=0.4), 0.2, dict(entropy=2.0)),
    ],
)
def test_conditional_thresholds(rule, threshold, situation):
    rule.check()
    got = rule.threshold(seen(probability=0.0, **situation))
    assert float(got[0, 0]) == pytest.approx(threshold, abs=1e-6)
    for probability in (threshold - 0.01, threshold + 0.01):
        if probability >= 0:
            passes = rule.passes(seen(probability=probability, **situation))
            assert bool(passes) == (probability > threshold)


@pytest.mark.parametrize(
    ("rule", "situation", "passes"),
    [
        (Exact(), dict(probability=0.4, rank=0), True),
        (Exact(), dict(probability=0.4, rank=1), False),
        (FixedThreshold(), dict(probability=0.11), True),
        (FixedThreshold(), dict(probability=0.09), False),
        (FixedThreshold(threshold=0.05), dict(probability=0.09), True),
        (FixedThreshold(), dict(probability=0.11, stop=0.2), False),
        (FixedThreshold(eos_guard=False), dict(probability=0.11, stop=0.2), True),
        (Conditional(), dict(probability=0.2, stop=0.3), False),
        (Conditional(eos_guard=False), dict(probability=0.2, stop=0.3), True),
        (TopK(), dict(probability=0.1, rank=1), True),
        (TopK(), dict(probability=0.1, rank=2), False),
        (TopK(k=3), dict(probability=0.1, rank=2), True),
        (TopK(k=2**31 - 1), dict(probability=0.0, rank=7), True),
        # min(0.09, 0.3 e^-2) = 0.0406
        (Typical(), dict(probability=0.05, entropy=2.0, rank=5), True),
        (Typical(), dict(probability=0.04, entropy=2.0, rank=5), False),
        (Typical(epsilon=0.03), dict(probability=0.04, entropy=2.0, rank=5), True),
        (Typical(delta=0.2), dict(probability=0.03, entropy=2.0, rank=5), True),
        (Typical(), dict(probability=0.04, entropy=2.0, rank=0), True),
    ],
)
def test_rules(rule, situation, passes):
    rule.check()
    assert bool(rule.passes(seen(**situation))) == passes


def test_view_by_hand():
    p = np.array([[0.5, 0.25, 0.125, 0.125], [0.1, 0.2, 0.3, 0.4], [0.25] * 4])
    tree = DraftTree(
        tokens=jnp.asarray([[0, 1, 2]]),
        parents=jnp.asarray([[0, 0, 1]]),
        depths=jnp.asarray([[0, 1, 2]]),
        valid=jnp.ones((1, 3), bool),
        kinds=jnp.zeros((1, 3), int),
    )
    # Logits are known up to a constant of each node.
    logits = jnp.asarray(np.log(p) + np.array([[3.0], [-2.0], [0.0]]), jnp.float32)
    picks = jnp.argmax(logits, -1)[None]
    got = view(logits[None], tree, picks, jnp.asarray([3, -1]))
    np.testing.assert_allclose(got.probability[0, 1:], [0.25, 0.3], rtol=1e-5)
    np.testing.assert_allclose(got.highest[0, 1:], [0.5, 0.4], rtol=1e-5)
    np.testing.assert_allclose(got.stop[0, 1:], [0.125, 0.4], rtol=1e-5)
    entropy = -(p * np.log(p)).sum(-1)
    np.testing.assert_allclose(got.entropy[0, 1:], entropy[:2], rtol=1e-5)
    assert got.rank[0, 1:].tolist() == [1, 1]
    assert got.chosen[0, 1:].tolist() == [False, False]
    assert got.vocabulary == 4
    # Ids that the vocabulary does not have stop nothing.
    none = view(logits[None], tree, picks, jnp.asarray([-1, 4]))
    assert (none.stop == 0).all()
    # Each row may have its own.
    two = [jnp.concatenate([x, x]) for x in (logits[None], picks, *tree)]
    own = jnp.asarray([[3, -1], [-1, 1]])
    rows = view(two[0], DraftTree(*two[2:]), two[1], own)
    np.testing.assert_allclose(rows.stop[:, 1:], [[0.125, 0.4], [0.25, 0.2]], rtol=1e-5)


def test_forms_that_the_digest_finds_degenerate():
    """F1's cap never binds with the defaults, and beyond one nat everything passes."""
    for size in (2, 10, 1000):
        flat = seen(probability=0.0, highest=1 / size, entropy=math.log(size))
        tau = Conditional(form="F1").threshold(flat)
        assert (tau < 1 / size).all()
    assert Conditional(form="F1").passes(seen(probability=0.0, entropy=1.01)).all()


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        (Conditional(alpha=-0.1), "alpha must be at least 0 and finite, got -0.1"),
        (Conditional(alpha=float("nan")), "alpha takes a number, got nan"),
        (Conditional(alpha=float("inf")), "at least 0 and finite, got inf"),
        (Conditional(beta=1.5), "beta must be at least 0 and at most 1"),
        (Conditional(tau_min=-1), "tau_min must be at least 0"),
        (FixedThreshold(threshold=2), "threshold must be .* at most 1, got 2"),
        (FixedThreshold(threshold=float("nan")), "threshold takes a number, got nan"),
        (TopK(k=0), "k must be at least 1"),
        (Typical(epsilon=-1), "epsilon must be at least 0"),
        (Typical(delta=2), "delta must be .* at most 1"),
    ],
)
def test_bad_options(rule, message):
    with pytest.raises(ValueError, match=message):
        check_types(rule)
