"""The Triton kernels of the window scores without a GPU: against an oracle, compiled.

Run as a script, this file is its own worker; `triton_on_cpu` says why.
"""

import itertools
import json
import sys

import jax.numpy as jnp
import numpy as np
import pytest
import triton_on_cpu

from jaxkv.kernels import triton_call, window_scores_triton
from jaxkv.kernels.window_scores_triton import (
    Tiles,
    choose_tiles,
    probability_constants,
    statistic_constants,
)

# window, heads, KV heads, keys, length, head size, dtype, reduction, tiles (splits,
# rows, block), and of some, whether there are sinks, and the cap
FAST = [
    (5, 4, 2, 70, 60, 64, "float32", "sum", (2, 32, 16)),
    (9, 4, 2, 70, 70, 64, "bfloat16", "sum", (3, 16, 16)),
    (1, 3, 1, 33, 17, 96, "float16", "sum", (1, 16, 32)),
    (9, 4, 2, 50, 40, 64, "bfloat16", "max", (2, 16, 16)),
    (3, 6, 2, 33, 33, 64, "float32", "max", (1, 16, 16)),
    (2, 24, 1, 20, 18, 64, "float32", "max", (1, 16, 16)),
    (5, 6, 2, 70, 60, 64, "float32", "sum", (2, 16, 16), True, 1.5),
    (9, 4, 2, 50, 40, 64, "bfloat16", "max", (2, 16, 16), True, None),
]
SLOW = [
    (window, kv_heads * group, kv_heads, keys, keys - 3, head_dim, dtype, how, tiles)
    for window, (kv_heads, group), keys, (
        head_dim,
        dtype,
    ), how, tiles in itertools.product(
        [1, 8, 33],
        [(2, 1), (2, 4), (1, 24)],
        [40, 130],
        [(64, "float32"), (96, "float16"), (128, "bfloat16"), (256, "bfloat16")],
        ["sum", "max"],
        [(1, 64, 16), (3, 16, 32)],
    )
]
SLOW += [
    (*case, sinks, cap)
    for case, (sinks, cap) in zip(
        SLOW[::5], itertools.cycle([(True, None), (False, 2.0), (True, 1.0)])
    )
]
# Logits are exact in float32; the statistics and exponentials are float32.
TOLERANCE = 1e-5

# batch, window, heads, KV heads, keys, head size, dtype, reduction: with the shipped
# tiles
SHIPPED = [
    (1, 32, 32, 8, 8192, 128, "bfloat16", "sum"),
    (1, 8, 32, 8, 8192, 128, "bfloat16", "max"),
]
SHIPPED_SLOW = [
    (1, window, 32, 8, 8192, head_dim, dtype, "sum")
    for window, head_dim, dtype in itertools.product(
        [1, 64], [64, 96, 128, 256], ["float16", "float32"]
    )
]


@triton_on_cpu.fast_and_slow
def test_interpreted_kernels_agree_with_the_oracle(cases):
    triton_on_cpu.assert_interpreted(__file__, cases)


@triton_on_cpu.compiled_for(SHIPPED, SHIPPED_SLOW)
def test_shipped_tiles_compile_without_spills(shape, capability, record_property):
    pytest.importorskip("triton")
    from jaxkv.kernels import window_scores_triton_body as body

    batch, window, heads, kv_heads, keys, head_dim, dtype, reduction = shape
    rows = window * heads // kv_heads
    tiles = choose_tiles(batch, kv_heads, rows, keys, head_dim, dtype)
    first = statistic_constants(
        window, heads, kv_heads, keys, head_dim, dtype, 0.1, tiles
    )
    second = probability_constants(first, keys, tiles, reduction)
    dtypes = dict(query_ptr=dtype, key_ptr=dtype, start_ptr="int32", count_ptr="int32")
    dtypes |= dict(statistic_ptr="float32", scores_ptr="float32")
    launches = [
        (body.window_statistic, first | triton_on_cpu.PLAIN),
        (body.window_probabilities, second | dict(CAP=None)),
    ]
    for kernel, constants in launches:
        usage = triton_on_cpu.usage(kernel, dtypes, constants, tiles, capability)
        for key, number in usage.items():
            record_property(f"{kernel.__name__} {key}", number)
        print(f"sm_{capability} {shape} {kernel.__name__} {tiles} {usage}")
        assert usage["stack"] == 0 and usage["local"] == 0
        # A100 gives a program 163 KiB at most.
        assert usage["shared"] <= 160 * 1024


def check_interpreted(case, seed, mutate=lambda args: args, told=True) -> list[str]:
    """Run one case under the interpreter and return what is wrong with it.

    What is not `told` of sink and cap is to be noticed, and so is what is mutated.
    """
    window, heads, kv_heads, keys, length, head_dim, dtype, reduction, tiles = case[:9]
    has_sink, cap = case[9:] or (False, None)
    sink = jnp.linspace(-1, 5, heads).astype(dtype) if has_sink else None
    splits, rows, block = tiles
    tiles = Tiles(splits=splits, rows=rows, block=block, warps=4, stages=3)
    batch, group, scale = 3, heads // kv_heads, head_dim**-0.5
    rng = np.random.default_rng(seed)
    # The window at the end, at the front, and somewhere with few queries that count.
    start = np.array([keys - window, 0, (keys - window) // 2], np.int32)
    count = np.array([window, window, max(1, window // 3)], np.int32)
    q = jnp.asarray(rng.standard_normal((batch, window, heads, head_dim)), dtype)
    k = jnp.asarray(rng.standard_normal((batch, keys, kv_heads, head_dim)), dtype)
    dead = np.arange(keys) >= (start + count)[:, None]
    k = jnp.where(dead[..., None, None], jnp.nan, k)
    want = np.zeros((batch, kv_heads, keys))
    exact_q, exact_k = (np.asarray(x.astype(jnp.float32), np.float64) for x in (q, k))
    combine = {"sum": np.add, "max": np.maximum}[reduction]
    for b in range(batch):
        for w in range(count[b]):
            mine = np.zeros((kv_heads, keys))
            for n in range(heads):
                seen = exact_k[b, : start[b] + w + 1, n // group]
                logits = scale * seen @ exact_q[b, w, n]
                if cap is not None:
                    logits = cap * np.tanh(logits / cap)
                own = float(sink[n]) if has_sink else -np.inf
                weights = np.exp(logits - max(logits.max(), own))
                whole = weights.sum() + np.exp(own - max(logits.max(), own))
                mine[n // group, : len(seen)] += weights / whole / group
            want[b] = combine(want[b], mine)
    q, k, start, count = mutate((q, k, jnp.asarray(start), jnp.asarray(count)))
    scores = window_scores_triton.window_scores_triton(
        *(q, k, start, sink if told else None),
        scale=scale,
        cap=cap if told else None,
        length=length,
        count=count,
        reduction=reduction,
        tiles=tiles,
    )
    error = np.abs(np.asarray(scores) - want[..., :length]).max()
    return [] if error <= TOLERANCE * window else [f"{case}: off by {error:.3g}"]


MUTATIONS = {
    "start shifted": lambda x: (*x[:2], x[2] - 1, x[3]),
    "count shifted": lambda x: (*x[:3], x[3] - 1),
    "heads swapped": lambda x: (x[0][:, :, ::-1], *x[1:]),
}


if __name__ == "__main__":
    triton_on_cpu.teach_bfloat16_dot()
    triton_call.call = triton_on_cpu.call
    cases = {"FAST": FAST, "SLOW": SLOW}[sys.argv[1]]
    failures = [f for i, case in enumerate(cases) for f in check_interpreted(case, i)]
    if sys.argv[1] == "FAST":
        for name, mutate in MUTATIONS.items():
            if not check_interpreted(FAST[0], 0, mutate):
                failures.append(f"{name}: went unnoticed")
        for case in FAST[-2:]:
            if not check_interpreted(case, 0, told=False):
                failures.append(f"{case}: sink or cap: went unnoticed")
    print(json.dumps(failures))
