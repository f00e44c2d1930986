"""Check and time sinks and caps in the Triton kernels on a GPU.

    python benchmarks/weighing_device.py weighing.json [--seconds 150]

Checked against the float32 references: decoding, LongFlow and the scores of a window,
of shapes of gpt-oss (a sink for each head), Gemma 2 (a cap) and others, rings among
them; and cuDNN's prefill with a window. Every time is the median over calls of the loop
that `jaxkv.bench.attention` has. What matters most comes first; where the time is up,
the rest is left out.
"""

import functools
import pathlib
import statistics
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import typer

from jaxkv.bench import attention as timing
from jaxkv.bench.clock import copy_bandwidth, time_loop
from jaxkv.kernels.decode import decode_attention
from jaxkv.kernels.longflow import longflow_attention
from jaxkv.kernels.prefill import causal_attention
from jaxkv.kernels.scores import value_norms
from jaxkv.kernels.window_scores import window_scores
from jaxkv.provenance import provenance, write_json

CAP = 50.0  # Gemma 2's
# batch, heads, KV heads, slots, head size, dtype, share of occupied slots; kinds of
# decoding, and of LongFlow
CHECKS = [
    ((5, 64, 8, 3200, 64, "bfloat16", 0.6), ("sink", "cap"), ("both",)),
    # The ring of a layer of gpt-oss.
    ((5, 64, 8, 128, 64, "bfloat16", 1.0), ("sink",), ()),
    ((3, 16, 8, 3200, 256, "bfloat16", 1.0), ("cap",), ()),
    ((3, 8, 8, 333, 128, "float16", 0.6), ("both",), ()),
    ((3, 6, 1, 250, 64, "float32", 0.6), ("both",), ("both",)),
]
TOLERANCE = {"float32": 5e-6, "bfloat16": 1.6e-2, "float16": 2e-3}
# What a sink and a cap may be: the cap of a check is low, so that it matters.
KINDS = {"sink": (True, None), "cap": (False, 2.0), "both": (True, 2.0)}

# batch, heads, KV heads, slots, head size; versions
TIMINGS = [
    (decode_attention, (8, 64, 8, 3200, 64), ("plain", "sink", "xla: sink")),
    (decode_attention, (8, 16, 8, 3200, 256), ("plain", "cap", "xla: cap")),
    (decode_attention, (32, 32, 8, 3200, 128), ("plain", "sink", "cap")),
    (longflow_attention, (8, 32, 8, 3200, 128), ("plain", "sink", "cap")),
    (decode_attention, (8, 64, 8, 128, 64), ("plain", "sink", "xla: sink")),
    (longflow_attention, (64, 32, 8, 3200, 128), ("plain", "both")),
    (decode_attention, (1, 32, 8, 3200, 128), ("plain", "both")),
]


def weighing(kind: str, heads: int, dtype="bfloat16") -> dict:
    """Return sink and cap of a kind, as operations take them."""
    found: dict[str, Any] = {}
    if "sink" in kind or "both" in kind:
        drawn = 3 * np.random.default_rng(heads).standard_normal(heads)
        found["sink"] = jnp.asarray(drawn, dtype)
    if "cap" in kind or "both" in kind:
        found["cap"] = CAP
    return found


def same_bits(one, two) -> bool:
    """Return whether two trees of arrays are equal to the bit, NaN included."""
    leaves = zip(jax.tree.leaves(one), jax.tree.leaves(two), strict=True)
    return all(np.asarray(x).tobytes() == np.asarray(y).tobytes() for x, y in leaves)


def inputs(batch, heads, kv_heads, slots, head_dim, dtype, share):
    """Return query, token and slots: the second row a ring, the last finished."""
    shape = timing.Shape(
        batch=batch,
        slots=slots,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        dtype=dtype,
    )
    query, token, cache = timing.make_inputs(shape, share)
    first = slots // 3
    ring = slots + (jnp.arange(slots, dtype=jnp.int32) - first) % slots
    keys, values = (x.at[1].set(jnp.nan_to_num(x[1])) for x in cache[:2])
    cache = cache._replace(
        keys=keys,
        values=values,
        positions=cache.positions.at[1].set(ring),
        target=cache.target.at[1].set(first),
        norms=value_norms(values, "l1"),
    )
    position = token.position.at[1].set(2 * slots).at[-1].set(-1)
    return query, token._replace(position=position), cache


def check_step(operation, arrays, kind, cap, **options) -> dict:
    """Compare a step with the reference; a sink of no weight must change no bit."""
    query, token, slots, *bounds = arrays
    has_sink, cap = cap
    sink = weighing("sink", query.shape[1], query.dtype)["sink"] if has_sink else None
    how = dict(options, cap=cap, scale=query.shape[-1] ** -0.5)
    step = functools.partial(operation, **how, implementation="triton")
    exact = functools.partial(operation, **how, implementation="reference")
    want, wanted = jax.jit(exact)(query, token, slots, *bounds, sink)
    run = jax.jit(step, donate_argnums=2)
    runs, in_place = [], True
    for _ in range(2):
        mine = jax.tree.map(jnp.copy, slots)
        before = [x.unsafe_buffer_pointer() for x in mine[:3]]
        runs.append(run(query, token, mine, *bounds, sink))
        after = [x.unsafe_buffer_pointer() for x in runs[-1][1][:3]]
        in_place &= before == after
    got, after = runs[0]
    live = np.asarray(token.position) >= 0
    out, right = (np.asarray(x).astype(np.float32)[live] for x in (got, want))
    error = float((np.abs(out - right) / np.maximum(1, np.abs(right))).max())
    record = dict(operation=operation.__name__, shape=slots.keys.shape, kind=kind)
    record |= dict(dtype=query.dtype.name, error=error)
    record |= dict(close=error <= TOLERANCE[query.dtype.name], in_place=in_place)
    record |= dict(same=same_bits(after[:3], wanted[:3]), repeats=same_bits(*runs))
    if kind == "sink" and sink is not None:
        nothing = jnp.full_like(sink, -1e30)
        alone = [
            jax.jit(step)(query, token, slots, *bounds, x) for x in (None, nothing)
        ]
        record |= dict(weightless=same_bits(*alone))
    if query.dtype == jnp.float32 and bounds:
        record |= dict(victims=same_bits(after.target, wanted.target))
    return record


def check_window(kind, weighing_kind) -> dict:
    """Compare the scores of a window with the reference."""
    has_sink, cap = weighing_kind
    draw = jax.random.split(jax.random.key(3), 2)
    query = jax.random.normal(draw[0], (2, 16, 32, 128), jnp.bfloat16)
    key = jax.random.normal(draw[1], (2, 4096, 8, 128), jnp.bfloat16)
    start = jnp.asarray([4080, 1000], jnp.int32)
    sink = weighing("sink", 32)["sink"] if has_sink else None
    score = functools.partial(window_scores, scale=0.09, length=4000, cap=cap)

    def run(implementation):
        run = functools.partial(score, implementation=implementation)
        return jax.jit(run)(query, key, start, None, sink)

    got, again, want = run("triton"), run("triton"), run("reference")
    error = float(jnp.abs(got - want).max())
    record = dict(operation="window_scores", kind=kind, error=error)
    return record | dict(close=error <= 1.6e-4, repeats=same_bits(got, again))


def check_cudnn(window: int) -> dict:
    """Compare cuDNN's attention with a window to the reference."""
    draw = jax.random.split(jax.random.key(window), 3)
    sizes = (2, 700, 8, 128), (2, 700, 2, 128), (2, 700, 2, 128)
    arrays = [
        jax.random.normal(d, s, jnp.bfloat16) for d, s in zip(draw, sizes, strict=True)
    ]
    attend = functools.partial(causal_attention, scale=0.1, window=window)
    got, want = (
        jax.jit(functools.partial(attend, implementation=name))(*arrays)
        for name in ("cudnn", "reference")
    )
    error = float(jnp.abs(got.astype(jnp.float32) - want.astype(jnp.float32)).max())
    record = dict(operation="cudnn", window=window, error=error)
    return record | dict(close=error <= TOLERANCE["bfloat16"])


def checks():
    """Yield a record for each check."""
    for sizes, decoding, scoring in CHECKS:
        arrays = inputs(*sizes)
        newest = jnp.full_like(arrays[1].position, 2**31 - 1)
        scored = *arrays, jnp.zeros_like(newest), newest
        for kind in decoding:
            yield check_step(decode_attention, arrays, kind, KINDS[kind])
        for kind in scoring:
            how = KINDS[kind]
            yield check_step(longflow_attention, scored, kind, how, shared=False)
    yield check_window("both", KINDS["both"])
    for window in (128, 500):
        yield check_cudnn(window)


def steps_of(operation, version, heads, scale):
    """Return one layer's step of a version; see `jaxkv.bench.attention.Step`."""
    how = weighing(version, heads)
    implementation = "xla" if version.startswith("xla") else "triton"

    def step(query, token, slots):
        bounds: tuple[jax.Array, ...] = ()
        if operation is longflow_attention:
            bounds = jnp.zeros_like(token.position), token.position
        return operation(
            *(query, token, slots, *bounds),
            scale=scale,
            implementation=implementation,
            **how,
        )

    return step


def time_versions(operation, sizes, versions, bandwidth, left):
    """Yield a record for each version of a shape, while there is time."""
    batch, heads, kv_heads, slots, head_dim = sizes
    shape = timing.Shape(
        batch=batch, slots=slots, heads=heads, kv_heads=kv_heads, head_dim=head_dim
    )
    layers = timing.Layers(shape, bandwidth)
    plain = None
    for version in versions:
        if left() <= 0:
            return
        step = steps_of(operation, version, heads, shape.scale)
        us = 1e6 * statistics.median(layers.time(step).seconds)
        plain = plain or us
        record = dict(operation=operation.__name__, sizes=sizes, version=version)
        yield record | dict(
            us=us, percent=100 * (us / plain - 1), floor_us=1e6 * layers.floor
        )


def time_window(version: str) -> dict:
    """Time the window scores of one layer: 32 queries, 32 heads, 8 KV heads of 128."""
    keys, how = 32768, weighing(version, 32)
    draw = jax.random.split(jax.random.key(0), 2)
    query = jax.random.normal(draw[0], (1, 32, 32, 128), jnp.bfloat16)
    key = jax.random.normal(draw[1], (1, keys, 8, 128), jnp.bfloat16)

    def step(start):
        scores = window_scores(
            *(query, key, start),
            scale=0.088,
            length=keys - 32,
            implementation="triton",
            **how,
        )
        return start + (scores[:, 0, 0] < 0).astype(jnp.int32)

    start = jnp.full((1,), keys - 32, jnp.int32)
    us = 1e6 * statistics.median(time_loop(step, start, 100)[0])
    return dict(operation="window_scores", sizes=keys, version=version, us=us)


def main(out: pathlib.Path, seconds: float = 55.0) -> None:
    """Check, then time what is shipped until the time is up."""
    deadline = time.perf_counter() + seconds
    report = provenance() | dict(checks=[], timings=[])
    for record in checks():
        report["checks"].append(record)
        print(*record.values(), flush=True)
    failed = [r for r in report["checks"] if any(x is False for x in r.values())]
    print(f"{len(failed)} of {len(report['checks'])} checks failed", flush=True)

    def save(record):
        report["timings"].append(record)
        print(*record.values(), flush=True)
        write_json(out, report)

    def left() -> float:
        return deadline - time.perf_counter()

    bandwidth = copy_bandwidth(2**30)
    for case in TIMINGS:
        for record in time_versions(*case, bandwidth, left):
            save(record)
    for version in ("plain", "both"):
        if left() > 0:
            save(time_window(version))
    if failed:
        raise SystemExit(f"FAILED: {failed}")


if __name__ == "__main__":
    typer.run(main)
