"""The TPU's decode kernels without a TPU: interpreted, against an oracle in float64.

Interpreting costs seconds per compiled program and nothing per call, so a test that CI
runs puts as many cases as it can into the rows and the draws of one program.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu
from packed import packed

from jaxkv.kernels.attend_tpu import choose_block, make_plan
from jaxkv.kernels.decode_tpu import decode_attention_tpu
from jaxkv.kernels.longflow_tpu import longflow_attention_tpu
from jaxkv.kernels.scores import value_norms

SCALE = 0.09
TOLERANCE = {"float32": 2e-6, "bfloat16": 2e-2}
HEADS = {"MHA": (2, 2), "GQA": (6, 2), "MQA": (5, 1)}


@functools.partial(
    jax.jit, static_argnames=("score", "shared", "block", "interpret", "cap")
)
def longflow(c, score="l1", **kwargs):
    """Run the op on norms as they are before the step."""
    c = packed(c, norms=value_norms(c["values"], score))
    return longflow_attention_tpu(**c, score=score, scale=SCALE, **kwargs)


@functools.partial(jax.jit, static_argnames=("block", "interpret", "cap"))
def attend(c, **kwargs):
    return decode_attention_tpu(**packed(without_choice(c)), scale=SCALE, **kwargs)


def draw(heads, slots, dtype="float32", *, head_dim=128, seed=0):
    """Return arguments whose free slots are full of NaN.

    Rows: a ragged one, one in which no slot is free in all heads, a finished one, and a
    full one with nothing that may be evicted.
    """
    num_heads, kv_heads = HEADS[heads]
    rng = np.random.default_rng(seed)
    shape = (4, kv_heads, slots)

    def normal(*sizes):
        return jnp.asarray(rng.standard_normal((*sizes, head_dim)), dtype)

    occupied = rng.random(shape) < 0.5
    occupied[1, -1], occupied[3] = True, True
    order = np.argsort(rng.random(shape), axis=-1)
    positions = np.where(occupied, order, -1).astype(np.int32)
    target = rng.integers(0, slots, shape[:2])
    free = jnp.asarray(~occupied)[..., None]
    return dict(
        query=normal(4, num_heads),
        key=normal(4, kv_heads),
        value=normal(4, kv_heads),
        keys=jnp.where(free, jnp.nan, normal(*shape)),
        values=jnp.where(free, jnp.nan, normal(*shape)),
        positions=jnp.asarray(positions),
        target=jnp.asarray(target, jnp.int32),
        position=jnp.asarray([slots + 3, slots, -1, slots + 1], jnp.int32),
        oldest=jnp.asarray([2, slots // 4, 0, slots + 5], jnp.int32),
        newest=jnp.asarray([slots, slots - 1, slots, slots + 9], jnp.int32),
    )


def without_choice(c):
    return {name: x for name, x in c.items() if name not in ("oldest", "newest")}


def wide(x):
    return np.array(x, np.float64)


def oracle(c, *, score="l1", shared=True, cap=None):
    """One softmax after another, one slot after another."""
    keys, values = wide(c["keys"]), wide(c["values"])
    positions, target = np.array(c["positions"]), np.array(c["target"])
    kv_heads, slots = positions.shape[1:]
    out = np.zeros(c["query"].shape)
    group = out.shape[1] // kv_heads
    for b, position in enumerate(np.array(c["position"])):
        if position < 0:
            continue
        importance = np.zeros((kv_heads, slots))
        for k in range(kv_heads):
            slot = target[b, k]
            keys[b, k, slot] = wide(c["key"].astype(c["keys"].dtype))[b, k]
            values[b, k, slot] = wide(c["value"].astype(c["keys"].dtype))[b, k]
            positions[b, k, slot] = position
            held = positions[b, k] >= 0
            v = values[b, k, held]
            norm = dict(
                l1=np.abs(v).sum(-1),
                l2=np.sqrt(np.square(v).sum(-1)),
                attention=np.ones(len(v)),
            )[score]
            for n in range(k * group, (k + 1) * group):
                logits = SCALE * keys[b, k, held] @ wide(c["query"])[b, n]
                if cap is not None:
                    logits = cap * np.tanh(logits / cap)
                own = wide(c["sink"])[n] if "sink" in c else -np.inf
                top = max(logits.max(), own)
                weights = np.exp(logits - top)
                weights /= weights.sum() + np.exp(own - top)
                out[b, n] = weights @ v
                importance[k, held] += weights * norm
        occupied = positions[b] >= 0
        low, high = int(c["oldest"][b]), int(c["newest"][b])
        inside = (positions[b] >= low) & (positions[b] <= high)
        for k in range(kv_heads):
            of = slice(None) if shared else slice(k, k + 1)
            target[b, k] = choice(
                importance[of].sum(0),
                occupied[of].any(0),
                (inside | ~occupied)[of].all(0),
            )
    return out, keys, values, positions, target


def choice(importance, occupied, evictable):
    if not occupied.all():
        return np.flatnonzero(~occupied)[0]
    among = evictable if evictable.any() else occupied
    return np.argmin(np.where(among, importance, np.inf))


def check(c, result, **options):
    got, slots = result
    out, *cache, target = oracle(c, **options)
    live = np.asarray(c["position"]) >= 0
    tolerance = 2 * TOLERANCE[c["keys"].dtype.name]
    np.testing.assert_allclose(wide(got)[live], out[live], atol=tolerance)
    assert got.dtype == c["query"].dtype
    assert np.isfinite(wide(got)).all()
    for name, wanted in zip(("keys", "values", "positions"), cache, strict=True):
        np.testing.assert_array_equal(wide(getattr(slots, name)), wanted, err_msg=name)
    if slots.norms is None:  # without a score nothing is chosen
        target = c["target"]
    np.testing.assert_array_equal(slots.target, target)


def test_shared_victim_over_several_blocks():
    """300 slots in blocks of 128: the last block reaches beyond the slots."""
    run = functools.partial(longflow, block=128, interpret=True)
    for seed in range(3):
        c = draw("GQA", 300, seed=seed)
        check(c, run(c))
    again = run(c)
    jax.tree.map(np.testing.assert_array_equal, run(c), again)
    # Equal importances: the lowest slot that may go.
    zeros = "query", "keys", "values", "value"
    same = c | {name: jnp.zeros_like(c[name]) for name in zeros}
    same["positions"] = jnp.broadcast_to(jnp.arange(300), c["positions"].shape)
    _, got = run(same | {"target": jnp.full_like(c["target"], 290)})
    assert got.target[1].tolist() == [75, 75]
    assert got.target[3].tolist() == [0, 0]
    # What these checks are worth: they must notice a mistake.
    swapped = run(c | {"keys": c["values"], "values": c["keys"]})
    shifted = run(c | {"positions": jnp.roll(c["positions"], 1, axis=-1)})
    recent = run(c | {"oldest": jnp.full_like(c["oldest"], 260)})
    for wrong in (swapped, shifted, recent):
        with pytest.raises(AssertionError):
            check(c, wrong)


def test_a_victim_for_each_head_in_bfloat16():
    for seed in range(2):
        c = draw("MHA", 37, "bfloat16", seed=seed)
        got = longflow(c, score="l2", shared=False, interpret=True)
        check(c, got, score="l2", shared=False)


def test_attention_without_a_score():
    for seed in range(2):
        c = draw("MQA", 141, "bfloat16", seed=seed)
        check(c, attend(c, block=128, interpret=True))


def sinks(c):
    """Return the arguments with a sink for each head, some of them above all logits."""
    return c | dict(sink=jnp.linspace(-2, 6, c["query"].shape[1]).astype(jnp.bfloat16))


def test_sinks_and_caps():
    for seed in range(2):
        c = sinks(draw("GQA", 141, seed=seed))
        got = longflow(c, cap=0.7, block=128, interpret=True)
        check(c, got, cap=0.7)
    for wrong in (c | dict(sink=c["sink"][::-1]), c | dict(sink=c["sink"] - 1)):
        with pytest.raises(AssertionError):
            check(wrong, got, cap=0.7)
    with pytest.raises(AssertionError):
        check(c, got)
    jax.tree.map(
        np.testing.assert_array_equal,
        got,
        longflow(c, cap=0.7, block=128, interpret=True),
    )
    c = sinks(draw("MQA", 37, "bfloat16"))
    check(c, attend(c, interpret=True))


@pytest.mark.slow
@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("cap", [None, 0.5])
@pytest.mark.parametrize("sink", [True, False])
def test_sinks_and_caps_against_oracle(heads, dtype, cap, sink):
    for seed in range(2):
        c = draw(heads, 300, dtype, seed=seed, head_dim=64)
        c = sinks(c) if sink else c
        check(c, attend(c, cap=cap, block=128, interpret=True), cap=cap)
        for shared in (True, False):
            got = longflow(c, shared=shared, cap=cap, block=128, interpret=True)
            check(c, got, shared=shared, cap=cap)


@pytest.mark.slow
@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize(
    ("slots", "head_dim", "score"),
    [(1, 128, "l1"), (7, 64, "l2"), (128, 256, "attention"), (1001, 96, "l1")],
)
def test_against_oracle(heads, dtype, shared, slots, head_dim, score):
    options = dict(score=score, shared=shared)
    for seed in range(4):
        c = draw(heads, slots, dtype, head_dim=head_dim, seed=seed)
        check(c, longflow(c, **options, block=256, interpret=True), **options)
        got = attend(c, interpret=True)
        check(c, got, **options)


@pytest.mark.slow
@pytest.mark.parametrize("shared", [True, False])
def test_the_simulation_sees_no_race(shared, capfd):
    """A simulation of the TPU's memories; it wants slots that fill the blocks."""
    interpret = pltpu.InterpretParams(uninitialized_memory="nan", detect_races=True)
    c = draw("GQA", 256)
    got = longflow(c, shared=shared, block=128, interpret=interpret)
    check(c, got, shared=shared)
    assert "RACE" not in capfd.readouterr().out.upper()


@pytest.mark.slow
def test_two_thousand_evictions():
    """In float32 each evicted slot is the oracle's, from an empty cache on."""
    steps, slots = 2000, 40
    c = draw("GQA", slots)
    keys = jax.random.split(jax.random.key(0), 3)
    shapes = [(steps, 1, heads, 128) for heads in (6, 2, 2)]
    tokens = [jax.random.normal(k, s) for k, s in zip(keys, shapes, strict=True)]
    empty = {name: c[name][:1] for name in ("keys", "values", "positions", "target")}
    empty |= dict(positions=jnp.full_like(empty["positions"], -1))
    empty |= dict(target=jnp.zeros_like(empty["target"]))
    window = dict(oldest=jnp.asarray([0]), newest=jnp.asarray([steps]))

    def step(cache, token):
        query, key, value, position = token
        new = dict(query=query, key=key, value=value, position=position)
        _, got = longflow(cache | window | new, interpret=True)
        return {name: getattr(got, name) for name in cache}, got.target

    order = jnp.arange(steps, dtype=jnp.int32)[:, None]
    _, targets = jax.jit(functools.partial(jax.lax.scan, step))(empty, (*tokens, order))
    cache = empty
    for i in range(steps):
        query, key, value = (x[i] for x in tokens)
        c = cache | window | dict(query=query, key=key, value=value, position=order[i])
        _, *new, target = oracle(c)
        np.testing.assert_array_equal(targets[i], target, err_msg=f"step {i}")
        names = ("keys", "values", "positions")
        cache = dict(zip(names, new, strict=True)) | dict(target=target)
        cache |= {name: np.float32(cache[name]) for name in ("keys", "values")}


def test_refusals_name_their_reason():
    c = draw("GQA", 8)
    with pytest.raises(ValueError, match="unknown score='l3'"):
        longflow(c, score="l3")
    half = {name: c[name].astype("float16") for name in ("query", "keys")}
    with pytest.raises(NotImplementedError, match="bfloat16 or float32, got float16"):
        longflow(c | half)
    with pytest.raises(NotImplementedError, match="multiple of 32, got H=72"):
        longflow(draw("GQA", 8, head_dim=72))
    query = jax.ShapeDtypeStruct((1, 32, 128), jnp.bfloat16)
    keys = jax.ShapeDtypeStruct((1, 8, 1 << 19, 128), jnp.bfloat16)
    with pytest.raises(NotImplementedError, match="524288 slots of 8 heads need"):
        make_plan(query, keys, scale=1.0, score="l1")


@pytest.mark.parametrize(
    ("slots", "head_dim", "dtype", "wanted"),
    [
        (3200, 128, "bfloat16", 3200),
        (3201, 128, "bfloat16", 3328),
        (65536, 128, "bfloat16", 4096),
        (16384, 128, "float32", 2048),
        (7, 64, "float32", 128),
        (128 * 37, 128, "bfloat16", 2432),
    ],
)
def test_blocks_divide_the_slots_where_they_can(slots, head_dim, dtype, wanted):
    assert choose_block(slots, head_dim, dtype) == wanted
