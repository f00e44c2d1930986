"""The Triton kernels of LongFlow without a GPU: against an oracle, and compiled.

Run as a script, this file is its own worker; `triton_on_cpu` says why.
"""

import itertools
import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import triton_on_cpu

from jaxkv.kernels import longflow_triton, triton_call
from jaxkv.kernels.cache import Slots, Token
from jaxkv.kernels.longflow_triton import (
    Tiles,
    choose_constants,
    choose_tiles,
    score_constants,
    tell_constants,
)
from jaxkv.kernels.scores import value_norms

# heads, KV heads, slots, head size, dtype, score, shared, (splits, block, programs),
# and of some, whether there are sinks, and the cap
FAST = [
    (4, 2, 21, 64, "float32", "l1", True, (2, 16, 0)),
    (4, 2, 37, 64, "float32", "l1", True, (1, 16, 3)),
    (6, 1, 50, 64, "bfloat16", "l1", True, (3, 16, 0)),
    (3, 1, 33, 96, "float16", "l2", True, (1, 32, 2)),
    (4, 2, 40, 128, "bfloat16", "l2", False, (2, 16, 0)),
    (2, 2, 20, 64, "float32", "attention", False, (1, 16, 3)),
    (2, 1, 1, 64, "float32", "l1", True, (1, 16, 0)),
    (6, 2, 40, 64, "float32", "l1", True, (2, 16, 0), True, 1.5),
    (4, 2, 37, 64, "float32", "l2", True, (1, 16, 3), True, None),
    (3, 1, 40, 64, "bfloat16", "l1", False, (3, 16, 0), False, 1.0),
]
SLOW = [
    (kv_heads * group, kv_heads, slots, head_dim, dtype, score, shared, tiles)
    for (kv_heads, group), slots, (head_dim, dtype, score), shared, tiles in (
        itertools.product(
            [(3, 1), (2, 4), (1, 24)],
            [5, 130],
            [
                (64, "float32", "l1"),
                (96, "float16", "l2"),
                (128, "bfloat16", "l1"),
                (256, "bfloat16", "attention"),
            ],
            [True, False],
            [(2, 16, 0), (1, 32, 4)],
        )
    )
]
SLOW += [
    (*case, sinks, cap)
    for case, (sinks, cap) in zip(
        SLOW[::5], itertools.cycle([(True, None), (False, 2.0), (True, 1.0)])
    )
]
# As in test_decode_triton.
TOLERANCE = {"float32": 5e-6, "bfloat16": 2**-6, "float16": 2**-10}

# batch, heads, KV heads, slots, head size, dtype: with the tiles that are shipped
SHIPPED = [
    (128, 32, 8, 3200, 128, "bfloat16"),
    (1, 32, 8, 3200, 128, "bfloat16"),
]
SHIPPED_SLOW = [
    (64, 32, 8, 16384, 128, "bfloat16"),
    *[(8, 32, 8, 3200, 128, "bfloat16"), (128, 16, 8, 3200, 64, "bfloat16")],
    *[(1, 128, 8, 3201, 256, "float16"), (128, 24, 1, 3200, 256, "float16")],
    *[(b, 32, 8, 3200, h, "float32") for b in (1, 128) for h in (64, 128, 256)],
    *[(1, 32, 8, 3200, 96, "bfloat16"), (128, 32, 8, 3200, 96, "bfloat16")],
]


@triton_on_cpu.fast_and_slow
def test_interpreted_kernels_agree_with_the_oracle(cases):
    triton_on_cpu.assert_interpreted(__file__, cases)


@triton_on_cpu.compiled_for(SHIPPED, SHIPPED_SLOW)
def test_shipped_tiles_compile_without_spills(shape, capability, record_property):
    pytest.importorskip("triton")
    from jaxkv.kernels import longflow_choice_body as choice
    from jaxkv.kernels import longflow_triton_body as body

    batch, heads, kv_heads, slots, head_dim, dtype = shape
    sizes = heads, kv_heads, slots, head_dim
    tiles = choose_tiles(batch, *sizes, dtype)
    first = score_constants(*sizes, dtype, 0.1, "l1", True, tiles, batch)
    first |= triton_on_cpu.PLAIN
    second = choose_constants(*sizes, True, tiles)
    small = Tiles(splits=1, block=16, warps=4, stages=1)
    launches = [
        (body.score_split, first, tiles),
        (choice.finish_splits, second, small),
    ]
    if tiles.programs:
        launches = [
            (body.score_rows, first, tiles),
            (choice.choose_victims, second, small),
        ]
    else:
        launches.append((choice.tell_splits, tell_constants(*sizes, tiles), small))
    for kernel, constants, launch in launches:
        name = kernel.__name__
        dtypes = dict.fromkeys(kernel.arg_names, "int32")
        dtypes |= dict.fromkeys(
            ["query_ptr", "key_ptr", "value_ptr", "keys_ptr", "values_ptr"], dtype
        )
        dtypes |= dict(_keys_out_ptr=dtype, _values_out_ptr=dtype)
        dtypes |= dict.fromkeys(
            ["statistic_ptr", "logits_ptr", "importance_ptr", "parts_ptr"], "float32"
        )
        dtypes |= dict(told_ptr="float32")
        dtypes |= dict(norms_ptr="float32", _norms_out_ptr="float32")
        dtypes["out_ptr"] = "float32" if name == "score_split" else dtype
        usage = triton_on_cpu.usage(kernel, dtypes, constants, launch, capability)
        for key, number in usage.items():
            record_property(f"{name} {key}", number)
        print(f"sm_{capability} {shape} {name} {launch} {usage}")
        assert usage["stack"] == 0 and usage["local"] == 0
        # Room for two programs per processor on A100, for three on H100 with 4 warps.
        assert usage["shared"] <= 83 * 1024


def test_chosen_tiles_are_possible_everywhere():
    for batch, kv_heads, slots, head_dim, dtype in itertools.product(
        [1, 7, 300], [1, 8], [1, 17, 3201], [64, 96, 128, 256], ["float32", "float16"]
    ):
        tiles = choose_tiles(batch, 4 * kv_heads, kv_heads, slots, head_dim, dtype)
        assert 1 <= tiles.splits <= -(-slots // tiles.block)
        assert tiles.programs <= batch * kv_heads
        assert not tiles.programs or tiles.splits == 1


def make_case(case, seed):
    """Return one case's arguments of the op."""
    heads, kv_heads, slots, head_dim, dtype = case[:5]
    batch = 5
    rng = np.random.default_rng(seed)

    def normal(*shape):
        return rng.standard_normal(shape, dtype=np.float32)

    q = normal(batch, heads, head_dim)
    k_new, v_new = normal(2, batch, kv_heads, head_dim)
    keys, values = normal(2, batch, kv_heads, slots, head_dim)
    values *= np.exp(normal(batch, kv_heads, slots, 1))  # for the norm to matter
    # In row 0 no slot is free in all heads, row 1 is full, in row 2 some slots are free
    # in all heads and others in some, row 3 is finished, row 4 empty.
    free = rng.random((batch, kv_heads, slots)) < 0.5
    free[0, -1], free[1], free[4] = False, False, True
    order = rng.permuted(np.broadcast_to(np.arange(slots), free.shape), axis=-1)
    positions = np.where(free, -1, order)
    keys[free], values[free] = np.nan, np.nan
    target = rng.integers(0, slots, (batch, kv_heads))
    target[0] = slots - 1
    target[3] = rng.choice([-1, slots, 2**31 - 1])  # means nothing in a finished row
    position = np.array([slots, slots + 1, slots, -1, 0])
    # Row 0 protects some, row 1 all of its slots, the others none.
    oldest = np.array([slots // 4, slots + 2, 0, 0, 0])
    newest = np.array([slots - slots // 4, *[2**31 - 1] * 4])
    floats = [jnp.asarray(x, dtype) for x in (q, k_new, v_new, keys, values)]
    norms = value_norms(floats[4], case[5])
    integers = (positions, target, position, oldest, newest)
    positions, *integers = (jnp.asarray(x, jnp.int32) for x in integers)
    return (*floats, positions, norms, *integers)


def packed(args):
    """Return these arguments as the op takes them."""
    query, key, value, keys, values, positions, norms, target, position, *bounds = args
    slots = Slots(keys, values, positions, target, norms)
    return query, Token(key, value, position), slots, *bounds


def weighing_of(case):
    """Return the sink and cap of a case, as the op takes them; some rise above all."""
    has_sink, cap = case[8:] or (False, None)
    sink = jnp.linspace(-1, 4, case[0]).astype(case[4]) if has_sink else None
    return dict(sink=sink, cap=cap)


def oracle(
    q, k_new, v_new, keys, values, positions, target, position, scale, score, sink, cap
):
    """Attention and importance in float64, one query head after the other.

    Returns the output, the same mean of the values' magnitudes, the cache, and the
    weighted norms `[B, N, S]`, zero where a slot is free.
    """
    keys, values, positions = keys.copy(), values.copy(), positions.copy()
    batch, heads, _ = q.shape
    group = heads // keys.shape[1]
    out, magnitude = np.zeros(q.shape), np.zeros(q.shape)
    weighted = np.zeros((batch, heads, keys.shape[2]))
    for b in np.flatnonzero(position >= 0):
        for k in range(keys.shape[1]):
            keys[b, k, target[b, k]] = k_new[b, k]
            values[b, k, target[b, k]] = v_new[b, k]
            positions[b, k, target[b, k]] = position[b]
        for n in range(heads):
            occupied = positions[b, n // group] >= 0
            logits = scale * keys[b, n // group, occupied] @ q[b, n]
            if cap is not None:
                logits = cap * np.tanh(logits / cap)
            own = -np.inf if sink is None else float(sink[n])
            top = max(logits.max(), own)
            alpha = np.exp(logits - top)
            alpha /= alpha.sum() + np.exp(own - top)
            v = values[b, n // group, occupied]
            out[b, n], magnitude[b, n] = alpha @ v, alpha @ abs(v)
            norm = {"l1": abs(v).sum(1), "l2": (v * v).sum(1) ** 0.5, "attention": 1}
            weighted[b, n, occupied] = alpha * norm[score]
    return out, magnitude, (keys, values, positions), weighted


def wrong_victim(got, weighted, positions, oldest, newest, tolerance) -> str:
    """Say what is wrong with the victim of a row that is not finished, if anything.

    `weighted` is `[heads, S]`, `positions` `[KV heads, S]`, of those who share it.
    """
    free = positions < 0
    if free.all(0).any():
        want = np.flatnonzero(free.all(0))[0]
        return "" if got == want else f"not the first free slot {want}"
    importance = weighted.mean(0)
    evictable = (free | (positions >= oldest) & (positions <= newest)).all(0)
    candidates = evictable if evictable.any() else ~free.all(0)
    if not candidates[got]:
        return "protected"
    least = importance[candidates].min()
    if importance[got] > least * (1 + tolerance):
        return f"importance {importance[got]:.4g} where {least:.4g} is the least"
    return ""


def check_interpreted(
    case, seed, mutate=lambda args: args, score=None, told=True
) -> list[str]:
    """Run one case under the interpreter and return what is wrong with it.

    `mutate` changes the arguments of the op and `score` the oracle's, to be noticed,
    as is an oracle that is not `told` of sink and cap.
    """
    dtype, shared, (splits, block, programs) = case[4], case[6], case[7]
    tiles = Tiles(
        splits=splits, block=block, warps=4, stages=3, programs=programs, chunk=128
    )

    def exact(array):
        return np.asarray(array.astype(jnp.float32)).astype(np.float64)

    args = make_case(case, seed)
    positions, _, target, position, oldest, newest = map(np.asarray, args[5:])
    scale, weighing = case[3] ** -0.5, weighing_of(case)
    want_out, magnitude, want_cache, weighted = oracle(
        *(*map(exact, args[:5]), positions, target, position, scale, score or case[5]),
        **weighing if told else dict(sink=None, cap=None),
    )
    out, got = longflow_triton.longflow_attention_triton(
        *packed(mutate(args)),
        **dict(scale=scale, score=case[5], shared=shared, tiles=tiles),
        **weighing,
    )
    failures = []
    if shared and dtype == "float32" and case[1] == 2:
        args = mutate(args)
        failures += check_together(args, case, tiles, out, want_cache, weighted)
    error = np.abs(exact(out) - want_out)[position >= 0]
    error = (error / magnitude[position >= 0]).max()
    if not (error <= TOLERANCE[dtype] and np.isfinite(exact(out)).all()):
        failures.append(f"{case}: out is off by {error:.3g} of its magnitude")
    names = ["keys", "values", "positions"]
    for name, want in zip(names, want_cache, strict=True):
        if not np.array_equal(exact(getattr(got, name)), want, equal_nan=True):
            failures.append(f"{case}: {name} differ")
    batch, kv_heads = target.shape
    held = want_cache[2] >= 0
    want_norms = np.where(held, value_norms(jnp.asarray(want_cache[1]), case[5]), 0)
    if not np.allclose(np.where(held, got.norms, 0), want_norms, rtol=1e-5):
        failures.append(f"{case}: norms differ")
    group = case[0] // kv_heads
    new_target = np.asarray(got.target)
    tolerance = 2e-6 if dtype == "float32" else 2e-3
    for b, k in itertools.product(range(batch), range(kv_heads)):
        mine = slice(None) if shared else slice(k, k + 1)
        heads = slice(None) if shared else slice(k * group, (k + 1) * group)
        if position[b] < 0:
            wrong = "" if new_target[b, k] == target[b, k] else "of a finished row"
        else:
            wrong = wrong_victim(
                *(new_target[b, k], weighted[b, heads], want_cache[2][b, mine]),
                *(oldest[b], newest[b], tolerance),
            )
        if wrong:
            failures.append(f"{case}: victim {new_target[b, k]} of {b, k}: {wrong}")
    return failures


def check_together(args, case, tiles, want_out, cache, weighted) -> list[str]:
    """Let two devices with half of the heads each choose; return what is wrong."""
    q, *rest = packed(args)
    token, slots, oldest, newest = rest
    devices = 2
    weighing = weighing_of(case)
    sinks = weighing.pop("sink")

    def part(tree, device, axis=1):
        return jax.tree.map(
            lambda x: jnp.split(x, devices, axis)[device] if x.ndim > 1 else x, tree
        )

    outs, founds, rests = [], [], []
    for device in range(devices):
        sink = None if sinks is None else jnp.split(sinks, devices)[device]
        out, found, arrivals, held = longflow_triton.tell_triton(
            *(part(q, device), part(token, device), part(slots, device)),
            *(oldest, newest, sink),
            **dict(scale=case[3] ** -0.5, score=case[5], tiles=tiles),
            **weighing,
        )
        outs.append(out)
        founds.append(found)
        rests.append((arrivals, part(token, device), held))
    failures = []
    if not np.allclose(jnp.concatenate(outs, 1), want_out, rtol=0, atol=2e-6):
        failures.append(f"{case}: out of those who choose together differs")
    found = jnp.stack(founds)
    alive = np.asarray(token.position) >= 0
    length = cache[2].shape[2]
    told = np.where(np.isinf(found), 0, np.abs(found))[:, alive, 0, :length].sum(0)
    if tiles.programs:  # a mean over the heads of keys and values
        told = told * (cache[2].shape[1] // devices)
    want = weighted[alive].sum(1)
    if not np.allclose(told, want, rtol=1e-5, atol=1e-5 * want.max()):
        failures.append(f"{case}: importance of those who choose together differs")
    chosen = [
        longflow_triton.choose_told_triton(found, *held, chunk=32).target
        for held in rests
    ]
    for b, target in enumerate(np.concatenate(chosen, 1)):
        if np.asarray(token.position)[b] < 0:
            same = np.array_equal(target, np.asarray(slots.target)[b])
            wrong = "" if same else "of a finished row"
        else:
            bounds = np.asarray(oldest)[b], np.asarray(newest)[b], 2e-6
            wrong = wrong_victim(target[0], weighted[b], cache[2][b], *bounds)
            wrong = wrong or ("" if len(set(target)) == 1 else "differs among heads")
        if wrong:
            failures.append(f"{case}: together, victims {target} of {b}: {wrong}")
    return failures


MUTATIONS = {  # name: change of the arguments, score of the oracle, what must be said
    "keys and values swapped": (
        lambda x: (x[0], x[2], x[1], x[4], x[3], *x[5:]),
        None,
        "out is off",
    ),
    "mask shifted": (lambda x: (*x[:5], jnp.roll(x[5], 1, -1), *x[6:]), None, "victim"),
    "norm dropped": (lambda x: x, "attention", "victim"),
    "norm dropped in what is shared": (lambda x: x, "attention", "together"),
    "norms shifted": (lambda x: (*x[:6], jnp.roll(x[6], 1, -1), *x[7:]), None, "norms"),
    "protection shifted": (
        lambda x: (*x[:9], x[9] - 18, x[10] - 18),
        None,
        "protected",
    ),
}


if __name__ == "__main__":
    triton_on_cpu.teach_bfloat16_dot()
    triton_call.call = triton_on_cpu.call
    cases = {"FAST": FAST, "SLOW": SLOW}[sys.argv[1]]
    failures = [f for i, case in enumerate(cases) for f in check_interpreted(case, i)]
    if sys.argv[1] == "FAST":
        for name, (mutate, score, said) in MUTATIONS.items():
            case = FAST[1 if said == "together" else 3]
            if not any(said in f for f in check_interpreted(case, 3, mutate, score)):
                failures.append(f"{name}: went unnoticed")
        for case in FAST[-3:]:
            untold = " ".join(check_interpreted(case, 3, told=False))
            if "out is off" not in untold:
                failures.append(f"{case}: sink or cap: went unnoticed")
        if "importance" not in " ".join(check_interpreted(FAST[-2], 3, told=False)):
            failures.append("the sinks of those who choose together: went unnoticed")
    print(json.dumps(failures))
