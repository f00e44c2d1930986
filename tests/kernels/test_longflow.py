"""LongFlow's op against an oracle in float64, and what it gives up over 2,000 steps.

A backend joins by one line in `IMPLEMENTATIONS`.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from packed import packed

from jaxkv.kernels import dispatch, longflow
from jaxkv.kernels.longflow import longflow_attention, token_importance
from jaxkv.kernels.scores import value_norms
from jaxkv.kernels.victims import choose_victim, free_least, next_free

IMPLEMENTATIONS = {
    "reference": functools.partial(longflow_attention, implementation="reference"),
    "xla": functools.partial(longflow_attention, implementation="xla"),
}
SCORES = ("l1", "l2", "attention", "deletion")
WITHOUT_DELETION = {"triton", "pallas_tpu"}
HEADS = {"MHA": (3, 3), "GQA": (6, 2), "MQA": (5, 1)}
SCALE = 0.4
TOLERANCE = {"float32": 4e-6, "bfloat16": 4e-2}
implementations = pytest.mark.parametrize("implementation", IMPLEMENTATIONS)


@functools.cache
def compiled(implementation, score, shared):
    function = functools.partial(
        IMPLEMENTATIONS[implementation], scale=SCALE, score=score, shared=shared
    )
    return jax.jit(
        lambda c: function(**packed(c, norms=value_norms(c["values"], score)))
    )


def draw(seed, *shape, dtype="float32"):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), dtype)


def case(heads="GQA", slots=13, dtype="float32", head_dim=8):
    """Four rows: some slots free, none free, few evictable ones, finished.

    In the third, some heads have free slots that another has not.
    """
    num_heads, kv_heads = HEADS[heads]
    rng = np.random.default_rng(slots)
    positions = np.stack(  # every head has its own order, as after prefill
        [[rng.permutation(slots) for _ in range(kv_heads)] for _ in range(4)]
    )
    target = rng.integers(0, slots, (4, kv_heads))
    free = rng.random((4, kv_heads, slots)) < 0.5
    free[1], free[2, -1] = False, False
    positions[free] = -1
    dead = jnp.asarray(positions < 0)[..., None]
    shape = (4, kv_heads, slots, head_dim)
    return dict(
        query=draw(1, 4, num_heads, head_dim, dtype=dtype),
        key=draw(2, 4, kv_heads, head_dim, dtype=dtype),
        value=draw(3, 4, kv_heads, head_dim, dtype=dtype),
        keys=jnp.where(dead, jnp.nan, draw(4, *shape, dtype=dtype)),
        values=jnp.where(dead, jnp.nan, draw(5, *shape, dtype=dtype)),
        positions=jnp.asarray(positions, jnp.int32),
        target=jnp.asarray(target, jnp.int32),
        position=jnp.asarray([slots, slots + 3, slots, -1], jnp.int32),
        oldest=jnp.asarray([2, 0, slots // 2, 0], jnp.int32),
        newest=jnp.asarray([slots, slots + 2, slots - 1, -1], jnp.int32),
    )


def attended(query, keys, values):
    """Return one head's softmax weights and output, float64."""
    logits = SCALE * keys @ query
    weights = np.exp(logits - logits.max())
    weights /= weights.sum()
    return weights, weights @ values


def scores_of(query, keys, values, score):
    """Return one head's score of each token, from its definition in words."""
    weights, out = attended(query, keys, values)
    found = []
    for s in range(len(keys)):
        share = weights[s] * values[s]
        match score:
            case "l1":
                found.append(np.abs(share).sum())
            case "l2":
                found.append(np.linalg.norm(share))
            case "attention":
                found.append(weights[s])
            case "deletion":
                rest = np.arange(len(keys)) != s
                without = attended(query, keys[rest], values[rest])[1]
                found.append(np.linalg.norm(out - without))
    return np.array(found)


def victim(importance, positions, oldest, newest):
    """Choose for heads `[K, S]` that share a slot, in plain Python."""
    slots = range(positions.shape[1])
    free = [s for s in slots if (positions[:, s] < 0).all()]
    if free:
        return free[0]
    allowed = [
        s for s in slots if all(p < 0 or oldest <= p <= newest for p in positions[:, s])
    ]
    return min(allowed or slots, key=lambda s: (importance[:, s].mean(), s))


def oracle(c, score, shared):
    """Return output, cache, importance and target; a loop over all, in float64."""
    c = {name: np.array(x, np.float64) for name, x in c.items()}
    keys, values = c["keys"], c["values"]
    positions, target = c["positions"].astype(int), c["target"].astype(int)
    out = np.zeros(c["query"].shape)
    importance = np.zeros(positions.shape)
    groups = out.shape[1] // keys.shape[1]
    for b in range(len(out)):
        if c["position"][b] < 0:
            continue
        for k in range(keys.shape[1]):
            slot = target[b, k]
            keys[b, k, slot], values[b, k, slot] = c["key"][b, k], c["value"][b, k]
            positions[b, k, slot] = c["position"][b]
            held = np.flatnonzero(positions[b, k] >= 0)
            for n in range(k * groups, (k + 1) * groups):
                arguments = c["query"][b, n], keys[b, k, held], values[b, k, held]
                out[b, n] = attended(*arguments)[1]
                importance[b, k, held] += scores_of(*arguments, score) / groups
        bounds = c["oldest"][b], c["newest"][b]
        if shared:
            target[b] = victim(importance[b], positions[b], *bounds)
        else:
            for k in range(keys.shape[1]):
                one = slice(k, k + 1)
                target[b, k] = victim(importance[b, one], positions[b, one], *bounds)
    return out, keys, values, positions, importance, target


@implementations
@pytest.mark.parametrize(
    ("heads", "score", "shared", "dtype"),
    [
        *(("GQA", score, shared, "float32") for score in SCORES for shared in (0, 1)),
        ("MHA", "l1", True, "float32"),
        ("MQA", "l1", False, "float32"),
        ("MHA", "deletion", False, "float32"),
        ("GQA", "l1", True, "bfloat16"),
    ],
)
def test_backend_equals_reference(implementation, heads, score, shared, dtype):
    if score == "deletion" and implementation in WITHOUT_DELETION:
        pytest.skip("refused; see test_refusals")
    c = case(heads, dtype=dtype)
    attended, got = compiled(implementation, score, bool(shared))(c)
    out, keys, values, positions, importance, target = oracle(c, score, shared)
    live = np.asarray(c["position"]) >= 0
    np.testing.assert_allclose(
        np.asarray(attended, np.float64)[live], out[live], atol=TOLERANCE[dtype]
    )
    assert np.isfinite(np.asarray(attended, np.float32)).all()
    assert attended.dtype == c["query"].dtype
    np.testing.assert_array_equal(np.asarray(got.keys, np.float64), keys)
    np.testing.assert_array_equal(np.asarray(got.values, np.float64), values)
    np.testing.assert_array_equal(got.positions, positions)
    np.testing.assert_array_equal(got.target, target)
    held = positions >= 0
    wanted = value_norms(got.values, score)
    np.testing.assert_allclose(got.norms[held], wanted[held], rtol=1e-6)
    if implementation == "xla" and dtype == "float32":  # what interval > 1 is made of
        alone = jax.jit(functools.partial(token_importance, scale=SCALE, score=score))
        alone = alone(c["query"], got.keys, got.values, got.positions)
        np.testing.assert_allclose(alone[live], importance[live], rtol=2e-5)


@implementations
@pytest.mark.parametrize(
    ("score", "wanted"), [("l1", 0), ("l2", 1), ("deletion", 2), ("attention", 3)]
)
def test_by_hand(implementation, score, wanted):
    """Four tokens of weight .4, .3, .2, .1 and a victim for every score.

    The output is (2, 1.125), the third token's value. Shares in l1: .5 .6 .625 1.4;
    in l2: .5 .424 .459 1.
    """
    if score == "deletion" and implementation in WITHOUT_DELETION:
        pytest.skip("refused; see test_refusals")
    weights = jnp.asarray([0.4, 0.3, 0.2, 0.1])
    keys = jnp.stack([jnp.log(weights) / SCALE, jnp.zeros(4)], -1)
    values = jnp.asarray([[1.25, 0.0], [1, 1], [2, 1.125], [8, 6]])
    out, got = compiled(implementation, score, True)(
        dict(
            query=jnp.asarray([[[1.0, 5.0]]]),
            key=keys[None, 3:],
            value=values[None, 3:],
            keys=keys.at[3].set(jnp.nan)[None, None],
            values=values.at[3].set(jnp.nan)[None, None],
            positions=jnp.asarray([[[0, 1, 2, -1]]], jnp.int32),
            target=jnp.asarray([[3]], jnp.int32),
            position=jnp.asarray([3], jnp.int32),
            oldest=jnp.asarray([0], jnp.int32),
            newest=jnp.asarray([3], jnp.int32),
        )
    )
    np.testing.assert_allclose(out, [[[2, 1.125]]], rtol=1e-5)
    assert got.target.tolist() == [[wanted]]


@implementations
def test_ties_go_to_the_lowest_slot(implementation):
    c = case("GQA")
    same = {name: jnp.ones_like(c[name]) for name in ("key", "value", "keys", "values")}
    same |= {"query": jnp.zeros_like(c["query"]), "newest": jnp.full(4, 99, jnp.int32)}
    full = jnp.arange(c["positions"].shape[2], dtype=jnp.int32)[None, None]
    same["positions"] = jnp.broadcast_to(full, c["positions"].shape)
    _, got = compiled(implementation, "l1", True)(c | same)
    positions = np.asarray(got.positions)
    assert got.target[1].tolist() == [0, 0]
    lowest = np.flatnonzero((positions[2] >= c["oldest"][2]).all(0))[0]
    assert got.target[2].tolist() == [lowest] * 2


@implementations
def test_two_runs_are_bit_equal(implementation):
    c = case("GQA")
    first, second = (compiled(implementation, "l1", True)(c) for _ in range(2))
    jax.tree.map(np.testing.assert_array_equal, first, second)


def test_refusals():
    c = case("GQA")
    c["norms"] = value_norms(c["values"], "l1")
    with pytest.raises(ValueError, match=r"newest must be Int32\[B\] with B=4, got"):
        longflow_attention(**packed(c, newest=c["newest"][:3]), scale=1.0)
    with pytest.raises(ValueError, match=r"slots\.norms must be the norms of the"):
        longflow_attention(**packed(c, norms=None), scale=1.0)
    with pytest.raises(ValueError, match="5 query heads must be a multiple of 2"):
        longflow_attention(**packed(c, query=c["query"][:, :5]), scale=1.0)
    with pytest.raises(ValueError, match="unknown score='l3'"):
        longflow_attention(**packed(c), scale=1.0, score="l3")
    with pytest.raises(ValueError, match="unknown implementation='fast'"):
        longflow_attention(**packed(c), scale=1.0, implementation="fast")
    for name in ("triton", "pallas_tpu"):
        with pytest.raises(NotImplementedError, match=f'"{name}" does not do score='):
            longflow_attention(
                **packed(c), scale=1.0, implementation=name, score="deletion"
            )
    if jax.default_backend() == "cpu":
        with pytest.raises(NotImplementedError, match="needs an NVIDIA GPU"):
            longflow_attention(**packed(c), scale=1.0, implementation="triton")
        with pytest.raises(NotImplementedError, match="needs a TPU"):
            longflow_attention(**packed(c), scale=1.0, implementation="pallas_tpu")


@pytest.mark.parametrize(
    ("platform", "score", "wanted"),
    [
        ("cpu", "l1", "xla"),
        ("gpu", "l1", "triton"),
        ("gpu", "deletion", "xla"),
        ("tpu", "l2", "pallas_tpu"),
        ("tpu", "deletion", "xla"),
    ],
)
def test_choice(monkeypatch, platform, score, wanted):
    monkeypatch.setattr(dispatch, "triton_unavailable", lambda: "")
    assert longflow.choose(platform, score) == wanted


def test_choice_without_the_libraries():
    if jax.default_backend() == "cpu":
        assert longflow.choose("gpu") == "xla"


def test_choice_on_a_tpu_depends_on_the_arrays():
    query, keys = (
        jnp.zeros((1, 4, 64), jnp.float16),
        jnp.zeros((1, 2, 9, 64), "float16"),
    )
    assert longflow.choose("tpu", "l1", query, keys) == "xla"
    query, keys = query.astype(jnp.bfloat16), keys.astype(jnp.bfloat16)
    assert longflow.choose("tpu", "l1", query, keys) == "pallas_tpu"


def test_heads_that_share_free_no_slot_of_another():
    """A slot that is free in one head only is neither free nor protected."""
    positions = jnp.asarray([[[-1, 1, 2, 3], [0, 1, 2, 3]]], jnp.int32)
    importance = jnp.asarray([[[9.0, 2, 3, 4], [2.5, 2, 3, 4]]])

    def choose(oldest, shared=True):
        bounds = jnp.asarray([oldest]), jnp.asarray([3])
        return choose_victim(importance, positions, *bounds, shared=shared).tolist()

    # What lies in a free slot has no importance: 2.5 / 2 < 2.
    assert choose(0) == [[0, 0]]
    assert choose(1) == [[1, 1]]  # the second head's token is protected there
    assert choose(4) == [[0, 0]]  # nothing is evictable: the least of all
    assert choose(0, shared=False) == [[0, 1]]
    assert next_free(positions, shared=False).tolist() == [[0, 0]]
    positions = positions.at[:, :, 2].set(-1)
    assert choose(0) == [[2, 2]]
    assert next_free(positions, shared=True).tolist() == [[2, 2]]


def test_freeing_several_at_once():
    positions = jnp.asarray([[[3, 0, 2, 1], [0, 1, 2, 3]]], jnp.int32)
    importance = jnp.asarray([[[1.0, 1, 4, 5], [1, 2, 9, 0]]])

    def left(oldest, count, shared, positions=positions):
        bounds = jnp.asarray([oldest]), jnp.asarray([3])
        return free_least(
            importance, positions, *bounds, count=count, shared=shared
        ).tolist()[0]

    assert left(0, 2, False) == [[-1, -1, 2, 1], [-1, 1, 2, -1]]
    assert left(0, 2, True) == [[-1, -1, 2, 1], [-1, -1, 2, 3]]
    assert left(2, 1, False) == [[-1, 0, 2, 1], [0, 1, 2, -1]]
    # Too few are evictable: the least of the others make up for them.
    assert left(2, 3, False) == [[-1, -1, -1, 1], [-1, 1, -1, -1]]
    # A head that has a free slot frees no other.
    some = positions.at[0, 0, 3].set(-1)
    assert left(0, 1, False, some) == [[3, 0, 2, -1], [0, 1, 2, -1]]
