"""Scores of a window of queries against all keys on TPUs, in Pallas.

Two passes over the keys, as exact softmax needs: the first finds the logarithm of every
query's sum of exponentials, the second adds the probabilities up. Queries of a group
lie below each other as the rows of one matrix, so keys are read once for all of them.

```
rows [G x W of one key/value head] x keys of one block -> a tile of logits in VMEM
first pass   grid (B, K, blocks of rows, blocks of keys): sum of exponentials per row
second pass  grid (B, K, blocks of keys, blocks of rows): sum of probabilities per key
```

Axis letters: `B` batch, `W` window, `N` query heads, `K` key/value heads, `G` query
heads per key/value head, `T` keys, `H` head size.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from jaxkv.kernels.attend_tpu import unsupported_type
from jaxkv.kernels.weighing import capped

_LOWEST = -1e30  # below every logit, and finite: a row that sees nothing gives zeros
_ROWS = 256  # of queries per tile
_KEYS = 1024  # per tile; 1 MiB of float32 logits
_VMEM_BYTES = 32 << 20


def window_scores_tpu(
    query: jax.Array,
    key: jax.Array,
    start: jax.Array,
    sink: jax.Array | None = None,
    *,
    scale: float,
    length: int,
    cap: float | None = None,
    count: jax.Array | None = None,
    reduction: str = "sum",
    interpret: Any = False,
) -> jax.Array:
    """Sum the attention that a window of queries pays to each key.

    Args:
      query: `[B, W, N, H]`, bfloat16 or float32; query `w` of row `b` stands at index
        `start[b] + w` of the key axis and sees the keys `0 .. start[b] + w`.
      key: `[B, T, K, H]`; beyond the last visible key it may hold anything, NaN
        included.
      start: int32 `[B]`.
      sink: `[N]`, or None.
      scale: factor on the logits.
      length: keys that are scored, at most `T`.
      cap: bound of the logits, or None.
      count: int32 `[B]`, queries of each row that count; None is all `W`.
      reduction: "sum", or "max" over the queries, which then pass one by one.
      interpret: run on the CPU; True, or `pltpu.InterpretParams()` for a simulation of
        the TPU's memories.

    Returns:
      Float32 `[B, K, length]`: softmax probability over all visible keys, summed over
      the window and averaged over the query heads of each key/value head; 0 for keys
      that no query sees.

    Raises:
      NotImplementedError: a dtype or head size that the kernel does not take.
    """
    reason = unsupported_type(query, key)
    if reason:
        raise NotImplementedError(f"window_scores_tpu: {reason}")
    if count is None:
        count = jnp.full(start.shape, query.shape[1], jnp.int32)
    run = functools.partial(
        _run,
        sink=sink,
        scale=scale,
        length=length,
        cap=cap,
        interpret=interpret,
    )
    if reduction == "sum":
        return run(query, key, start, count)

    def look(i, best):
        one = jax.lax.dynamic_slice_in_dim(query, i, 1, axis=1)
        # Probabilities are not negative, so queries that do not count lose.
        return jnp.maximum(
            best, run(one, key, start + i, (i < count).astype(jnp.int32))
        )

    nothing = jnp.zeros((*key.shape[:3:2], length), jnp.float32)
    return jax.lax.fori_loop(0, query.shape[1], look, nothing)


def _run(query, key, start, count, *, sink, scale, length, cap, interpret):
    """Lay queries and keys out as rows and blocks, and run both passes."""
    batch, window, heads, head_dim = query.shape
    keys, kv_heads = key.shape[1:3]
    group = heads // kv_heads
    rows = group * window
    tile_rows = min(_ROWS, -(-rows // 16) * 16)
    padding = -rows % tile_rows
    # The last key that each row sees; -1 for rows that do not count, and for padding.
    order = jnp.arange(window, dtype=jnp.int32)[None]
    last = jnp.where(order < count[:, None], start[:, None] + order, -1)
    last = jnp.minimum(last, keys - 1).astype(jnp.int32)
    end = last.max(1) // _KEYS  # the last block of keys that anybody sees
    last = jnp.pad(
        jnp.tile(last, (1, group)), ((0, 0), (0, padding)), constant_values=-1
    )
    queries = query.reshape(batch, window, kv_heads, group, head_dim)
    queries = queries.transpose(0, 2, 3, 1, 4).reshape(batch, kv_heads, rows, head_dim)
    queries = jnp.pad(queries, ((0, 0), (0, 0), (0, padding), (0, 0)))
    # Under jit this is the same transposition as the one for the cache.
    arrays = end, last[..., None], queries.astype(key.dtype), key.swapaxes(1, 2)
    exact = key.dtype == jnp.float32
    options = dict(
        scale=float(scale),
        cap=cap,
        precision=jax.lax.Precision.HIGHEST if exact else jax.lax.Precision.DEFAULT,
    )
    if sink is not None:
        sink = jnp.repeat(sink.astype(jnp.float32).reshape(kv_heads, group), window, 1)
        sink = jnp.pad(sink, ((0, 0), (0, padding)))[..., None]
    with jax.enable_x64(False):  # Mosaic has no 64 bits
        statistic = _statistics(arrays, sink, tile_rows, options, interpret)
        scores = _scores(arrays, statistic, tile_rows, length, options, interpret)
    return scores[:, :, 0] / group


def _specs(tile_rows: int, head_dim: int, index):
    """Return the specs of `last`, `queries`, `keys` and `statistic` of one tile.

    Args:
      tile_rows: static.
      head_dim: `H`.
      index: from the two inner grid axes to (block of rows, block of keys).
    """

    def rows(columns):
        return pl.BlockSpec(
            (1, 1, tile_rows, columns),
            lambda b, k, i, j, end: (b, k, index(i, j)[0], 0),
        )

    def of_keys(b, k, i, j, end):
        # Blocks that nobody sees are not fetched: the index stands still.
        return b, k, jnp.clip(index(i, j)[1], 0, jnp.maximum(end[b], 0)), 0

    last = pl.BlockSpec(
        (1, tile_rows, 1), lambda b, k, i, j, end: (b, index(i, j)[0], 0)
    )
    return last, rows(head_dim), pl.BlockSpec((1, 1, _KEYS, head_dim), of_keys), rows(1)


def _statistics(arrays, sink, tile_rows, options, interpret):
    """First pass: log of the sum of exponentials of each row, `[B, K, rows, 1]`.

    `sink` is `[K, rows, 1]`, or None.
    """
    _, _, queries, keys = arrays
    batch, kv_heads, rows, head_dim = queries.shape
    *inputs, out = _specs(tile_rows, head_dim, lambda r, t: (r, t))
    if sink is not None:
        own = pl.BlockSpec((1, tile_rows, 1), lambda b, k, r, t, end: (k, r, 0))
        inputs, arrays = [*inputs, own], (*arrays, sink)
    return pl.pallas_call(
        functools.partial(_statistics_kernel, **options),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(batch, kv_heads, rows // tile_rows, pl.cdiv(keys.shape[2], _KEYS)),
            in_specs=inputs,
            out_specs=out,
            scratch_shapes=[pltpu.VMEM((tile_rows, 1), jnp.float32)] * 2,
        ),
        out_shape=jax.ShapeDtypeStruct((batch, kv_heads, rows, 1), jnp.float32),
        compiler_params=_compiler_params(),
        name="window_statistics",
        interpret=interpret,
    )(*arrays)


def _scores(arrays, statistic, tile_rows, length, options, interpret):
    """Second pass: sum of the probabilities of each key, `[B, K, 1, length]`."""
    queries = arrays[2]
    batch, kv_heads, rows, head_dim = queries.shape
    return pl.pallas_call(
        functools.partial(_scores_kernel, **options),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(batch, kv_heads, pl.cdiv(length, _KEYS), rows // tile_rows),
            in_specs=_specs(tile_rows, head_dim, lambda t, r: (r, t)),
            out_specs=pl.BlockSpec(
                (1, 1, 1, _KEYS), lambda b, k, t, r, end: (b, k, 0, t)
            ),
        ),
        out_shape=jax.ShapeDtypeStruct((batch, kv_heads, 1, length), jnp.float32),
        compiler_params=_compiler_params(),
        name="window_scores",
        interpret=interpret,
    )(*arrays, statistic)


def _compiler_params():
    return pltpu.CompilerParams(
        dimension_semantics=("parallel", "parallel", "arbitrary", "arbitrary"),
        vmem_limit_bytes=_VMEM_BYTES,
    )


def _statistics_kernel(end_ref, last_ref, query_ref, key_ref, *refs, **options):
    block = pl.program_id(3)
    *sinks, out_ref, maximum_ref, total_ref = refs

    @pl.when(block == 0)
    def _():
        if sinks:  # what has been seen before the first block
            maximum_ref[...] = sinks[0][0]
            total_ref[...] = jnp.ones(total_ref.shape, jnp.float32)
            return
        maximum_ref[...] = jnp.full(maximum_ref.shape, _LOWEST, jnp.float32)
        total_ref[...] = jnp.zeros(total_ref.shape, jnp.float32)

    @pl.when(block <= end_ref[pl.program_id(0)])
    def _():
        logits = _logits(last_ref, query_ref, key_ref, block, **options)
        maximum = maximum_ref[...]
        new_maximum = jnp.maximum(maximum, jnp.max(logits, 1, keepdims=True))
        weights = jnp.exp(logits - new_maximum)
        total = total_ref[...] * jnp.exp(maximum - new_maximum)
        total_ref[...] = total + jnp.sum(weights, 1, keepdims=True)
        maximum_ref[...] = new_maximum

    @pl.when(block == pl.num_programs(3) - 1)
    def _():
        out_ref[0, 0] = maximum_ref[...] + jnp.log(jnp.maximum(total_ref[...], 1e-30))


def _scores_kernel(
    end_ref, last_ref, query_ref, key_ref, statistic_ref, out_ref, **options
):
    block = pl.program_id(2)

    @pl.when(pl.program_id(3) == 0)
    def _():
        out_ref[...] = jnp.zeros(out_ref.shape, jnp.float32)

    @pl.when(block <= end_ref[pl.program_id(0)])
    def _():
        logits = _logits(last_ref, query_ref, key_ref, block, **options)
        # A row that sees nothing has no finite logit, hence no probability.
        weights = jnp.exp(logits - statistic_ref[0, 0])
        out_ref[0, 0] += jnp.sum(weights, 0, keepdims=True)


def _logits(last_ref, query_ref, key_ref, block, *, scale, cap, precision):
    """Return the logits of a tile, `[rows, keys]`, -inf where a row does not see."""
    logits = scale * jax.lax.dot_general(
        query_ref[0, 0],
        key_ref[0, 0],
        (((1,), (1,)), ((), ())),
        precision=precision,
        preferred_element_type=jnp.float32,
    )
    logits = capped(logits, cap)
    index = jax.lax.broadcasted_iota(jnp.int32, logits.shape, 1) + block * _KEYS
    # NaN beyond the last visible key stays in its own column, and is masked here.
    return jnp.where(index <= last_ref[0], logits, -jnp.inf)
