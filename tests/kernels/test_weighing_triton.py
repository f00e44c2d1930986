"""Sinks and caps in the Triton kernels, without a GPU: against the float32 references.

Whatever is called by name is asked for by name, so dispatch is tested, too. Run as a
script, this file is its own worker; `triton_on_cpu` says why.
"""

import functools
import itertools
import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import triton_on_cpu

from jaxkv import state as kv
from jaxkv.attention import attend_cache
from jaxkv.kernels import (
    decode_triton,
    dispatch,
    longflow_triton,
    triton_call,
    window_scores_triton,
)
from jaxkv.kernels.cache import Slots, Token
from jaxkv.kernels.decode import decode_attention
from jaxkv.kernels.decode_triton import decode_attention_triton
from jaxkv.kernels.weighing import Weighing
from jaxkv.policies.full import Full

SINK = np.asarray([0.5, -1.0, 3.0, 0.0, 8.0, 1.5], np.float32)
KINDS = {"sink": (True, None), "cap": (False, 2.0), "both": (True, 30.0)}
HEADS = {"MHA": (2, 2), "GQA": (6, 2), "MQA": (5, 1)}
# Twice what rounding weights and output costs; see `test_decode_triton`.
TOLERANCE = {"float32": 5e-6, "bfloat16": 2**-6, "float16": 2**-10}
# kind, heads, dtype, slots, splits (0: as shipped)
FAST = [
    ("sink", "GQA", "bfloat16", 40, 2),
    ("both", "MQA", "float32", 37, 1),
]
SLOW = [
    (*case, *cut)
    for case in itertools.product(KINDS, HEADS, TOLERANCE)
    for cut in ((1, 0), (65, 3))
]


@triton_on_cpu.fast_and_slow
def test_interpreted_kernels_agree_with_the_reference(cases):
    triton_on_cpu.assert_interpreted(__file__, cases)


@pytest.mark.gpu
def test_on_a_gpu_they_agree_with_the_reference():
    failures = [f for case in [*FAST, *SLOW[::5]] for f in check(case)] + check_ring()
    assert not failures, "\n".join(failures)


def launches(head_dim, batch, dtype):
    """Return kernel, compile-time arguments and tiles of what attends first."""
    from jaxkv.kernels import decode_triton_body as decoding
    from jaxkv.kernels import longflow_triton_body as longflow
    from jaxkv.kernels import window_scores_triton_body as windows

    heads, kv_heads, slots, keys = 32, 8, 3200, 8192
    sizes = heads, kv_heads, slots, head_dim
    tiles = decode_triton.choose_tiles(batch, *sizes[1:], dtype)
    constants = decode_triton.attend_constants(*sizes, dtype, 0.1, tiles)
    constants |= decode_triton.newest_constants(slots, tiles)
    yield decoding.attend_split, constants, tiles
    tiles = longflow_triton.choose_tiles(batch, *sizes, dtype)
    kernel = longflow.score_rows if tiles.programs else longflow.score_split
    options = dtype, 0.1, "l1", True, tiles, batch
    yield kernel, longflow_triton.score_constants(*sizes, *options), tiles
    window, sizes = 32, (heads, kv_heads, keys, head_dim)
    tiles = window_scores_triton.choose_tiles(
        1, kv_heads, 4 * window, *sizes[2:], dtype
    )
    constants = window_scores_triton.statistic_constants(
        window, *sizes, dtype, 0.1, tiles
    )
    yield windows.window_statistic, constants, tiles
    constants = window_scores_triton.probability_constants(
        constants, keys, tiles, "sum"
    )
    yield windows.window_probabilities, constants, tiles


@pytest.mark.parametrize(
    ("head_dim", "batch", "dtype"),
    [
        (128, 1, "bfloat16"),
        *[
            pytest.param(*shape, marks=pytest.mark.slow)
            for shape in itertools.product([64, 128, 256], [1, 128], TOLERANCE)
        ],
    ],
)
def test_they_compile_without_spills(head_dim, batch, dtype, record_property):
    pytest.importorskip("triton")
    for kernel, constants, tiles in launches(head_dim, batch, dtype):
        name = kernel.__name__
        integers = "positions target position start count oldest newest arrivals"
        floats = "statistic logits importance norms _norms_out scores"
        dtypes = dict.fromkeys(kernel.arg_names, dtype)
        dtypes |= {f"{name}_ptr": "int32" for name in integers.split()}
        dtypes |= {f"{name}_ptr": "float32" for name in floats.split()}
        if name in ("attend_split", "score_split"):
            dtypes["out_ptr"] = "float32"
        weighing = triton_call.weighing(SINK, 50.0)
        known = {name: x for name, x in weighing.items() if name in kernel.arg_names}
        used = triton_on_cpu.usage(kernel, dtypes, constants | known, tiles, 90)
        for key, number in used.items():
            record_property(f"{name} {key}", number)
        print(f"sm_90 {head_dim} {batch} {dtype} {name} {used}")
        assert used["stack"] == 0 and used["local"] == 0
        assert used["shared"] <= 160 * 1024


def step(heads, dtype, slots, head_dim=64, seed=0):
    """Return query, token, slots and sink; rows are full, ragged, a ring, and finished.

    The ring has gone round, so that its newest tokens lie around its end.
    """
    num_heads, kv_heads = HEADS[heads]
    rng = np.random.default_rng(seed)
    batch, shape = 4, (4, kv_heads, slots)

    def normal(*sizes):
        drawn = 2 * rng.standard_normal((*sizes, head_dim))
        return jnp.asarray(drawn, dtype)

    order = rng.permuted(np.broadcast_to(np.arange(slots), shape), axis=-1)
    positions = np.where(rng.random(shape) < 0.6, order, -1)
    positions[0] = np.arange(slots)
    target = rng.integers(0, slots, shape[:2])
    first = slots // 3  # of the ring's slots, the oldest
    positions[2] = slots + (np.arange(slots) - first) % slots
    target[2] = first
    free = jnp.asarray(np.where(positions < 0, np.nan, 0)[..., None], dtype)
    position = jnp.asarray([slots, slots + 1, 2 * slots, -1], jnp.int32)
    token = Token(normal(batch, kv_heads), normal(batch, kv_heads), position)
    integers = (jnp.asarray(x, jnp.int32) for x in (positions, target))
    held = Slots(normal(*shape) + free, normal(*shape) + free, *integers)
    return normal(batch, num_heads), token, held, jnp.asarray(SINK[:num_heads], dtype)


def wrong(case, name, got, want, atol) -> list[str]:
    """Return what is wrong with an array."""
    error = np.abs(np.asarray(got, np.float64) - np.asarray(want, np.float64)).max()
    return [] if error <= atol else [f"{case}: {name} is off by {error:.3g}"]


def equal(one, two) -> bool:
    return all(
        np.asarray(x).tobytes() == np.asarray(y).tobytes()
        for x, y in zip(jax.tree.leaves(one), jax.tree.leaves(two), strict=True)
    )


def check(case, change=lambda sink: sink) -> list[str]:
    """Run one case under the interpreter and return what is wrong with it.

    `change` is of the kernel's sink, to be noticed.
    """
    kind, heads, dtype, slots, splits = case
    has_sink, cap = KINDS[kind]
    *arrays, sink = step(heads, dtype, slots, seed=slots)
    sinks = [sink] if has_sink else []
    how = dict(scale=0.15) if cap is None else dict(scale=0.15, cap=cap)
    run = functools.partial(decode_attention, **how, implementation="triton")
    if splits:
        tiles = decode_triton.Tiles(splits=splits, block=16, warps=4, stages=3)
        run = functools.partial(decode_attention_triton, **how, tiles=tiles)
    got, after = run(*arrays, *map(change, sinks))
    exact = functools.partial(decode_attention, **how, implementation="reference")
    want, wanted = jax.jit(exact)(*arrays, *sinks)
    live = np.asarray(arrays[1].position) >= 0
    largest = np.abs(np.asarray(want, np.float32)[live]).max()
    failures = wrong(case, "out", got[live], want[live], TOLERANCE[dtype] * largest)
    if not np.isfinite(np.asarray(got, np.float32)).all():
        failures.append(f"{case}: out is not finite")
    if not equal(after, wanted):
        failures.append(f"{case}: the cache differs")
    if not failures and not equal((got, after), run(*arrays, *map(change, sinks))):
        failures.append(f"{case}: two runs differ")
    return failures


def check_ring(steps=14, window=8) -> list[str]:
    """Decode in a layer with a window and return where it is not the last tokens'."""
    rng = np.random.default_rng(0)
    heads, kv_heads, head_dim = 4, 2, 32
    weighing = Weighing(window=window, sink=jnp.asarray(SINK[:heads]), cap=3.0)
    sizes = dict(kv_heads=kv_heads, slots=window, head_dim=head_dim)
    state = kv.init(batch=1, **sizes, dtype=jnp.float32, window=window)
    shape = (1, steps, kv_heads, head_dim)
    k, v = (jnp.asarray(2 * rng.standard_normal(shape), jnp.float32) for _ in range(2))
    failures = []
    for t in range(steps):
        q = 2 * rng.standard_normal((1, 1, heads, head_dim)).astype(np.float32)
        position = jnp.asarray([t], jnp.int32)
        attend = attend_cache(Full(), position=position, implementation="triton")
        token = k[:, t : t + 1], v[:, t : t + 1]
        got, state = attend(jnp.asarray(q), *token, state, weighing)
        if t % 6 != 1:
            continue
        seen = slice(max(0, t + 1 - window), t + 1)
        for n in range(heads):
            keys, values = (np.asarray(x[0, seen, n // 2], np.float64) for x in (k, v))
            logits = 3 * np.tanh(head_dim**-0.5 * keys @ q[0, 0, n] / 3)
            powers = np.exp(logits)
            want = powers @ values / (powers.sum() + np.exp(SINK[n]))
            failures += wrong(("ring", t, n), "out", got[0, 0, n], want, 1e-5)
    return failures


if __name__ == "__main__":
    triton_on_cpu.teach_bfloat16_dot()
    triton_call.call = triton_on_cpu.call
    dispatch.triton_unavailable = lambda: ""
    cases = {"FAST": FAST, "SLOW": SLOW}[sys.argv[1]]
    failures = [f for case in cases for f in check(case)] + check_ring()
    if not any("is off" in f for f in check(FAST[0], lambda sink: sink[::-1])):
        failures.append("sinks of other heads: went unnoticed")
    print(json.dumps(failures))
