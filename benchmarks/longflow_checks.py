"""What `longflow_device` checks on a GPU before it times anything.

The reference is float32 in the highest precision, written here once more, so that it
shares no line with the library.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxkv.bench.attention import Shape, make_inputs
from jaxkv.kernels.cache import Slots, Token
from jaxkv.kernels.longflow_triton import choose_tiles, longflow_attention_triton
from jaxkv.kernels.window_scores_triton import window_scores_triton

# batch, heads, KV heads, slots, head size, dtype, score, shared, share of occupied
# slots, changes to the shipped tiles
IN_ROWS = dict(splits=1, programs=5)
IN_SPLITS = dict(splits=2, programs=0)
CHECKS = [
    (128, 32, 8, 3200, 128, "bfloat16", "l1", True, 1.0, {}),
    (3, 32, 8, 3199, 128, "bfloat16", "l1", True, 1.0, IN_ROWS),
    (1, 32, 8, 3200, 128, "bfloat16", "l1", True, 1.0, {}),
    (5, 12, 2, 777, 96, "float16", "l2", True, 1.0, IN_SPLITS),
    (5, 12, 2, 777, 96, "float16", "l2", False, 0.7, IN_ROWS),
    (2, 8, 8, 100, 64, "bfloat16", "attention", True, 1.0, IN_ROWS),
    (2, 24, 1, 513, 64, "bfloat16", "l1", True, 1.0, {}),
    (4, 16, 2, 333, 256, "bfloat16", "l1", False, 1.0, IN_SPLITS),
    (3, 8, 2, 250, 128, "float32", "l1", True, 1.0, IN_ROWS),
    (3, 8, 2, 250, 128, "float32", "l1", False, 1.0, {}),
    (2, 4, 1, 7, 64, "float32", "l2", True, 0.6, {}),
]
OUT_TOLERANCE = {"float32": 5e-6, "bfloat16": 1.6e-2, "float16": 2e-3}
# How far above the least importance, relatively, a victim's may be.
VICTIM_TOLERANCE = {"float32": 1e-5, "bfloat16": 1e-3, "float16": 1e-3}

# batch, window, heads, KV heads, keys, head size, dtype
WINDOW_CHECKS = [
    (1, 32, 32, 8, 8192, 128, "bfloat16"),
    (3, 5, 12, 2, 777, 96, "float16"),
    (2, 64, 16, 2, 1000, 64, "bfloat16"),
    (2, 7, 8, 2, 333, 256, "bfloat16"),
    (2, 32, 8, 2, 513, 128, "float32"),
]
SEQUENCES = [(True, IN_ROWS), (True, IN_SPLITS), (False, IN_ROWS), (False, IN_SPLITS)]


def reference(query, token, slots, oldest, newest, **kw):
    """Return output, importance and class of each slot `[B, K, S]`, and the slots.

    Norms are not believed, but computed from the values.
    """
    (key, value, position), (keys, values, positions, target, norms) = token, slots
    batch, kv_heads, length, _ = keys.shape
    group = query.shape[1] // kv_heads
    slot = jnp.where(position[:, None] < 0, length, target)
    where = jnp.arange(batch)[:, None], jnp.arange(kv_heads), slot
    keys = keys.at[where].set(key, mode="drop")
    values = values.at[where].set(value, mode="drop")
    positions = positions.at[where].set(position[:, None], mode="drop")
    free = positions < 0
    k, v = (x.astype(jnp.float32) for x in (keys, values))
    q = query.astype(jnp.float32).reshape(batch, kv_heads, group, -1)
    logits = kw["scale"] * jnp.einsum("bkgh,bksh->bkgs", q, k, precision="highest")
    logits = jnp.where(free[:, :, None], -jnp.inf, logits)
    alpha = jax.nn.softmax(logits, axis=-1)
    v = jnp.where(free[..., None], 0, v)
    out = jnp.einsum("bkgs,bksh->bkgh", alpha, v, precision="highest")
    importance = (alpha * norms_of(v, kw["score"])[:, :, None]).mean(2)
    evictable = (positions >= oldest[:, None, None]) & (
        positions <= newest[:, None, None]
    )
    if kw["shared"]:
        importance, evictable, free = (
            jnp.broadcast_to(x, positions.shape)
            for x in (
                importance.mean(1, keepdims=True),
                evictable.all(1, keepdims=True),
                free[:, :1],
            )
        )
    kind = jnp.where(free, 0, jnp.where(evictable, 1, 2))
    new = norms_of(value.astype(jnp.float32), kw["score"])
    norms = norms.at[where].set(new, mode="drop")
    slots = Slots(keys, values, positions, target, norms)
    return out.reshape(query.shape), importance, kind, slots


def norms_of(v, score):
    """Return the norms of float32 values `[..., H]`."""
    return {
        "l1": jnp.abs(v).sum(-1),
        "l2": jnp.sqrt((v * v).sum(-1)),
        "attention": jnp.ones(v.shape[:-1]),
    }[score]


def victims(importance, kind, target, position):
    """Return the reference's next targets."""
    first = kind == kind.min(-1, keepdims=True)
    order = jnp.where(first, jnp.where(kind == 0, 0, importance), jnp.inf)
    return jnp.where(position[:, None] < 0, target, order.argmin(-1).astype(jnp.int32))


def longflow_inputs(
    batch, heads, kv_heads, slots, head_dim, dtype, share, shared, score
):
    """Return random arguments of the op, the last row of several finished."""
    shape = Shape(
        batch=batch,
        slots=slots,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        dtype=dtype,
    )
    query, token, (keys, values, positions, target, _) = make_inputs(
        shape, share, seed=1
    )
    if shared:
        positions = jnp.broadcast_to(positions[:, :1], positions.shape)
        target = jnp.broadcast_to(target[:, :1], target.shape)
        dead = (positions < 0)[..., None]
        keys, values = (
            jnp.where(dead, jnp.nan, jnp.nan_to_num(x)) for x in (keys, values)
        )
    scale = jnp.exp(jax.random.normal(jax.random.key(2), values.shape[:-1]))
    values = values * scale[..., None].astype(values.dtype)
    if batch > 1:
        token = token._replace(position=token.position.at[-1].set(-1))
    oldest = jnp.where(jnp.arange(batch) % 2 == 0, slots // 4, 0).astype(jnp.int32)
    newest = jnp.where(jnp.arange(batch) % 3 == 0, slots * 3 // 4, 2**31 - 1)
    norms = norms_of(values.astype(jnp.float32), score)
    slots = Slots(keys, values, positions, target, norms)
    return query, token, slots, oldest, newest.astype(jnp.int32)


def check(batch, heads, kv_heads, slots, head_dim, dtype, score, shared, share, tiles):
    """Compare with the reference, and check aliasing and that two runs are equal."""
    args = longflow_inputs(
        batch, heads, kv_heads, slots, head_dim, dtype, share, shared, score
    )
    options = dict(scale=head_dim**-0.5, score=score, shared=shared)
    query, token, before, *bounds = args
    out, importance, kind, cache = jax.jit(functools.partial(reference, **options))(
        *args
    )
    tiles = dataclasses.replace(
        choose_tiles(batch, heads, kv_heads, slots, head_dim, dtype), **tiles
    )
    step = functools.partial(longflow_attention_triton, **options, tiles=tiles)
    run = jax.jit(step, donate_argnums=2)
    runs = []
    for _ in range(2):
        cache_of_run = jax.tree.map(jnp.copy, before)
        pointers = [x.unsafe_buffer_pointer() for x in jax.tree.leaves(cache_of_run)]
        got = run(query, token, cache_of_run, *bounds)
        in_place = pointers == [x.unsafe_buffer_pointer() for x in got[1]]
        runs.append(jax.tree.map(np.asarray, got))
    raw = [[x.tobytes() for x in (out, *slots)] for out, slots in runs]
    mine, after = runs[0]
    same = raw[0][1:4] == [np.asarray(x).tobytes() for x in cache[:3]]
    same &= np.allclose(after.norms, cache.norms, rtol=1e-5, equal_nan=True)
    unfinished = np.asarray(token.position) >= 0
    mine, right = (np.asarray(x).astype(np.float32) for x in (mine, out))
    error = (np.abs(mine - right) / np.maximum(1, np.abs(right)))[unfinished].max()
    target = after.target
    chosen, importance, kind = (
        np.asarray(x)[unfinished] for x in (target, importance, kind)
    )
    first = kind.min(-1)
    least = np.where(kind == first[..., None], importance, np.inf).min(-1)
    got = np.take_along_axis(importance, chosen[..., None], -1)[..., 0]
    kinds = np.take_along_axis(kind, chosen[..., None], -1)[..., 0]
    is_first = chosen == (kind == 0).argmax(-1)
    good = np.where(
        first == 0, is_first, got <= least * (1 + VICTIM_TOLERANCE[dtype])
    ) & (kinds == first)
    kept = (target[~unfinished] == np.asarray(before.target)[~unfinished]).all()
    record = dict(shape=before.keys.shape, heads=heads, dtype=dtype, score=score)
    record |= dict(shared=shared, tiles=str(tiles), error=float(error))
    record |= dict(close=bool(error <= OUT_TOLERANCE[dtype]), same=same)
    record |= dict(victims=bool(good.all()), kept=bool(kept), in_place=in_place)
    return record | dict(finite=bool(np.isfinite(mine).all()), repeats=raw[0] == raw[1])


def check_sequence(shared: bool, changes: dict, steps: int = 200) -> dict:
    """Compare the victims of many steps in float32, each side on a cache of its own."""
    batch, heads, kv_heads, slots, head_dim = 4, 8, 2, 100, 64
    options = dict(scale=head_dim**-0.5, score="l1", shared=shared)
    tiles = dataclasses.replace(
        choose_tiles(batch, heads, kv_heads, slots, head_dim, "float32"), **changes
    )
    zeros = jnp.zeros((batch,), jnp.int32)
    bounds = zeros, zeros + (2**31 - 1)

    def by_reference(query, token, slots, *bounds):
        out, importance, kind, slots = reference(
            query, token, slots, *bounds, **options
        )
        target = victims(importance, kind, slots.target, token.position)
        return out, slots._replace(target=target)

    by_triton = functools.partial(longflow_attention_triton, **options, tiles=tiles)

    def run(step):
        def body(slots, t):
            draw = jax.random.split(jax.random.key(t), 3)
            q = jax.random.normal(draw[0], (batch, heads, head_dim))
            k, v = (jax.random.normal(d, (batch, kv_heads, head_dim)) for d in draw[1:])
            _, slots = step(q, Token(k, v, zeros + t), slots, *bounds)
            return slots, slots.target

        keys = jnp.full((batch, kv_heads, slots, head_dim), jnp.nan)
        positions = jnp.full((batch, kv_heads, slots), -1, jnp.int32)
        norms = jnp.full(positions.shape, jnp.nan)
        target = jnp.zeros((batch, kv_heads), jnp.int32)
        empty = Slots(keys, keys, positions, target, norms)
        return jax.lax.scan(body, empty, jnp.arange(steps))[1]

    sides = by_reference, by_triton
    want, got = (np.asarray(jax.jit(functools.partial(run, x))()) for x in sides)
    differ = np.flatnonzero((want != got).any((1, 2)))
    record = dict(steps=steps, shared=shared, tiles=str(tiles))
    record |= dict(first_difference=int(differ[0]) if len(differ) else steps)
    return record | dict(equal=not len(differ))


def check_window(batch, window, heads, kv_heads, keys, head_dim, dtype) -> dict:
    """Compare the window scores with all queries' softmax in float32."""
    draw = jax.random.split(jax.random.key(3), 2)
    q = jax.random.normal(draw[0], (batch, window, heads, head_dim), dtype)
    k = jax.random.normal(draw[1], (batch, keys, kv_heads, head_dim), dtype)
    start = jnp.asarray([keys - window, *[keys // 3] * (batch - 1)], jnp.int32)
    count = jnp.asarray([window, *[max(1, window // 2)] * (batch - 1)], jnp.int32)
    index = jnp.arange(keys)
    dead = index >= (start + count)[:, None]
    k = jnp.where(dead[..., None, None], jnp.nan, k)
    options: dict[str, Any] = dict(scale=0.09, length=keys - 1, count=count)
    score = jax.jit(functools.partial(window_scores_triton, **options))
    got, again = (np.asarray(score(q, k, start)) for _ in range(2))
    clean = jnp.where(dead[..., None, None], 0, k).astype(jnp.float32)
    grouped = q.astype(jnp.float32).reshape(batch, window, kv_heads, -1, head_dim)
    logits = 0.09 * jnp.einsum("bwkgh,btkh->bkgwt", grouped, clean, precision="highest")
    w = jnp.arange(window)
    seen = index <= (start[:, None] + w)[..., None]
    weights = jax.nn.softmax(jnp.where(seen[:, None, None], logits, -jnp.inf), axis=-1)
    weights = jnp.where((w < count[:, None])[:, None, None, :, None], weights, 0)
    want = np.asarray(weights.sum(3).mean(2))[..., : keys - 1]
    error = np.abs(got - want).max()
    record = dict(shape=(batch, window, heads, kv_heads, keys, head_dim), dtype=dtype)
    record |= dict(error=float(error), close=bool(error <= 1e-5 * window))
    return record | dict(repeats=got.tobytes() == again.tobytes())


def run_checks():
    """Yield one record per check."""
    for case in CHECKS:
        yield check(*case)
    for shared, changes in SEQUENCES:
        yield check_sequence(shared, changes)
    for window in WINDOW_CHECKS:
        yield check_window(*window)
