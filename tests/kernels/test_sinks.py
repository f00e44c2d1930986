"""Learned sinks and caps on logits, of every operation that attends.

One formula in NumPy is the oracle of all: a logit more in the denominator, and logits
bent by a hyperbolic tangent.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from packed import packed

from jaxkv.kernels import decode, dispatch, longflow, prefill, tree_attention
from jaxkv.kernels.decode import decode_attention
from jaxkv.kernels.longflow_tree import longflow_tree
from jaxkv.kernels.prefill import causal_attention
from jaxkv.kernels.scores import value_norms
from jaxkv.kernels.window_scores import window_scores
from jaxkv.trees import DraftTree, ancestors

HEADS, KV_HEADS, HEAD_DIM, BATCH, SCALE = 4, 2, 8, 2, 0.4
SINK = jnp.asarray([0.5, -1.0, 3.0, 0.0], jnp.float32)
KINDS = {
    "sink": dict(sink=SINK),
    "cap": dict(cap=1.5),
    "both": dict(sink=SINK, cap=1.5),
}
kinds = pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
implementations = pytest.mark.parametrize("implementation", ["reference", "xla"])
CLOSE = dict(atol=3e-6, rtol=3e-6)


def draw(seed, *shape):
    drawn = 2 * np.random.default_rng(seed).standard_normal((BATCH, *shape), np.float32)
    return jnp.asarray(drawn)


def weights_of(logits, head, sink=None, cap=None):
    """Return the weights of one head's logits, in double precision."""
    logits = np.asarray(logits, np.float64)
    if cap is not None:
        logits = cap * np.tanh(logits / cap)
    powers = np.exp(logits)
    own = 0.0 if sink is None else np.exp(float(sink[head]))
    return powers / (powers.sum() + own)


def run(operation, kind, *args, **options):
    """Run an operation as one program."""
    static = {name: x for name, x in kind.items() if name == "cap"}
    compiled = jax.jit(functools.partial(operation, **static, **options))
    arrays = {name: x for name, x in kind.items() if name == "sink"}
    return compiled(*args, **arrays)


def prompt(length):
    return (
        draw(0, length, HEADS, HEAD_DIM),
        draw(1, length, KV_HEADS, HEAD_DIM),
        draw(2, length, KV_HEADS, HEAD_DIM),
    )


@kinds
@implementations
@pytest.mark.parametrize("window", [None, 37])
def test_prompts(kind, implementation, window):
    q, k, v = prompt(300)  # more than a tile of the XLA version
    how = dict(scale=SCALE, window=window, implementation=implementation)
    got = run(causal_attention, kind, q, k, v, **how)
    for b, n, t in [(0, 0, 0), (1, 1, 5), (0, 2, 299), (1, 3, 256), (1, 0, 100)]:
        first = 0 if window is None else max(t + 1 - window, 0)
        keys, values = (x[b, first : t + 1, n // 2] for x in (k, v))
        weights = weights_of(SCALE * keys @ q[b, t, n], n, **kind)
        np.testing.assert_allclose(got[b, t, n], weights @ np.asarray(values), **CLOSE)


@pytest.mark.parametrize("kind", [{}, KINDS["both"]], ids=["plain", "both"])
@pytest.mark.parametrize("window", [None, 9, 30])
def test_tokens_behind_prompts(kind, window):
    """They attend as in a prompt that has them at its end, whoever else is beside."""
    starts, width, length = [31, 4], 6, 40
    more, whole = (prompt(n) for n in (width, length))
    start, how = jnp.asarray(starts, jnp.int32), dict(scale=SCALE, window=window)
    keys, values = (prefill.put_behind(whole[i], more[i], start) for i in (1, 2))
    got = run(prefill.attention_behind, kind, more[0], keys, values, start, **how)
    for b, first in enumerate(starts):
        q, k, v = (
            jnp.concatenate([x[b : b + 1, :first], y[b : b + 1]], axis=1)
            for x, y in zip(whole, more, strict=True)
        )
        want = run(causal_attention, kind, q, k, v, implementation="reference", **how)
        np.testing.assert_allclose(got[b], want[0, first:], **CLOSE)
        for placed, x in ((keys, k), (values, v)):
            np.testing.assert_array_equal(placed[b, : first + width], x[0])


@pytest.mark.slow
@kinds
def test_prompts_by_splash(kind):
    q, k, v = (jnp.pad(x, ((0, 0), (0, 0), (0, 0), (0, 120))) for x in prompt(256))
    how = dict(scale=SCALE, window=70)
    ours = prefill._splash(q, k, v, **how, **kind, interpret=True)
    want = causal_attention(q, k, v, **how, **kind, implementation="reference")
    np.testing.assert_allclose(ours, want, atol=2e-5)


def cache(slots=7):
    rng = np.random.default_rng(1)
    positions = np.where(rng.random((BATCH, KV_HEADS, slots)) < 0.7, slots, -1)
    positions[:, :, :3] = np.arange(3)
    nan = jnp.asarray(np.where(positions < 0, np.nan, 0), jnp.float32)[..., None]
    return dict(
        keys=draw(3, KV_HEADS, slots, HEAD_DIM) + nan,
        values=draw(4, KV_HEADS, slots, HEAD_DIM) + nan,
        positions=jnp.asarray(positions, jnp.int32),
        target=jnp.asarray(rng.integers(0, slots, (BATCH, KV_HEADS)), jnp.int32),
        position=jnp.asarray([slots, slots + 1], jnp.int32),
    )


def step():
    """Return the arguments of a decode step, by name."""
    token = dict(key=draw(6, KV_HEADS, HEAD_DIM), value=draw(7, KV_HEADS, HEAD_DIM))
    return packed(cache() | token | dict(query=draw(5, HEADS, HEAD_DIM)))


@kinds
@implementations
def test_a_decode_step(kind, implementation):
    given = step()
    operation = functools.partial(decode_attention, **given)
    how = dict(scale=SCALE, implementation=implementation)
    got, slots = run(operation, kind, **how)
    for b in range(BATCH):
        for n in range(HEADS):
            held = np.asarray(slots.positions[b, n // 2]) >= 0
            keys, values = (
                np.asarray(x[b, n // 2])[held] for x in (slots.keys, slots.values)
            )
            query = np.asarray(given["query"][b, n])
            weights = weights_of(SCALE * keys @ query, n, **kind)
            np.testing.assert_allclose(got[b, n], weights @ values, **CLOSE)
    exact = implementation == "reference"
    weights = decode.decode_weights(
        *(given["query"], slots.keys, slots.positions),
        scale=SCALE,
        exact=exact,
        **kind,
    )
    assert (weights.sum(-1) < 0.999).any() == ("sink" in kind)


@kinds
def test_longflow(kind):
    given = step()
    slots = given["slots"]
    slots = slots._replace(norms=value_norms(slots.values, "l1"))
    newest = given["token"].position
    arrays = given["query"], given["token"], slots, jnp.zeros_like(newest), newest
    operation = longflow.longflow_attention
    want, wanted = run(
        operation, kind, *arrays, scale=SCALE, implementation="reference"
    )
    got, after = run(operation, kind, *arrays, scale=SCALE, implementation="xla")
    np.testing.assert_allclose(got, want, **CLOSE)
    np.testing.assert_array_equal(after.target, wanted.target)
    plain = functools.partial(decode_attention, **given)
    out, _ = run(plain, kind, scale=SCALE, implementation="reference")
    np.testing.assert_allclose(want, out, **CLOSE)
    importance = longflow.token_importance(
        *(given["query"], after.keys, after.values, after.positions),
        scale=SCALE,
        **kind,
    )
    weights = decode.decode_weights(
        given["query"], after.keys, after.positions, scale=SCALE, **kind
    )
    norms = jnp.where(after.positions >= 0, after.norms, 0)
    np.testing.assert_allclose(importance, weights.mean(2) * norms, **CLOSE)


PARENTS, DEPTHS = [0, 0, 1, 0], [0, 1, 2, 1]


def tree():
    """Return the arguments of a pass over trees, by name."""
    nodes = len(PARENTS)
    slots = cache()
    slots["norms"] = value_norms(slots["values"], "l1")
    return slots | dict(
        query=draw(8, nodes, HEADS, HEAD_DIM),
        key=draw(9, nodes, KV_HEADS, HEAD_DIM),
        value=draw(10, nodes, KV_HEADS, HEAD_DIM),
        depths=jnp.asarray([DEPTHS] * BATCH, jnp.int32),
    )


@kinds
def test_trees(kind):
    parents = jnp.asarray([PARENTS] * BATCH, jnp.int32)
    given = tree()
    above = ancestors(
        DraftTree(parents, parents, given["depths"], parents >= 0, parents), depth=2
    )
    upcoming = jnp.asarray([[[4, 0, 4], [1, 2, 3]]] * BATCH, jnp.int32)
    plain = packed(given, ancestors=above, upcoming=upcoming)
    evicting = packed(given, oldest=jnp.zeros(BATCH, jnp.int32), parents=parents)
    for operation, arrays, options in (
        (tree_attention.tree_attention, plain, {}),
        (longflow_tree, evicting, dict(n_recent=0, depth=2)),
    ):
        operation = functools.partial(operation, **arrays, **options)
        how = dict(scale=SCALE)
        want = run(operation, kind, **how, implementation="reference")
        got = run(operation, kind, **how, implementation="xla")
        jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, **CLOSE), got, want)


@kinds
@implementations
@pytest.mark.parametrize("reduction", ["sum", "max"])
def test_scores_of_a_window(kind, implementation, reduction):
    query, key = draw(11, 3, HEADS, HEAD_DIM), draw(12, 20, KV_HEADS, HEAD_DIM)
    start = jnp.asarray([17, 5], jnp.int32)
    got = run(
        *(window_scores, kind, query, key, start),
        scale=SCALE,
        length=20,
        reduction=reduction,
        implementation=implementation,
    )
    for b in range(BATCH):
        for k in range(KV_HEADS):
            each = np.zeros((3, 20))
            for w in range(3):
                seen = int(start[b]) + w + 1
                for n in (2 * k, 2 * k + 1):
                    logits = SCALE * key[b, :seen, k] @ query[b, w, n]
                    each[w, :seen] += weights_of(logits, n, **kind) / 2
            want = each.sum(0) if reduction == "sum" else each.max(0)
            np.testing.assert_allclose(got[b, k], want, **CLOSE)


def test_what_knows_no_sink_is_not_chosen_and_refused_by_name(monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(dispatch, "triton_unavailable", lambda: "")
    q, k, v = prompt(16)
    for kind in (KINDS["sink"], KINDS["cap"]):
        halves = [x.astype(jnp.bfloat16) for x in (q, k, v)]
        assert causal_attention(*halves, scale=SCALE, **kind) is not None
        with pytest.raises(NotImplementedError, match="takes neither sink nor cap"):
            causal_attention(*halves, scale=SCALE, implementation="cudnn", **kind)
