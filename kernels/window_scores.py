"""How much attention a window of queries pays to each key: the scores of an eviction.

The softmax is exact, so it takes two passes over the keys: the first finds the
logarithm of every query's sum of exponentials, the second adds the probabilities up.

Axis letters: `B` batch, `W` window, `N` query heads, `K` key/value heads, `G = N / K`,
`T` keys, `H` head size.
"""

from collections.abc import Callable
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int32

from jaxkv.kernels import dispatch
from jaxkv.kernels.per_shard import per_shard
from jaxkv.kernels.shapes import check_groups, checked
from jaxkv.kernels.weighing import capped
from jaxkv.kernels.window_scores_triton import window_scores_triton

Implementation = Literal["reference", "xla", "triton", "pallas_tpu"]
Reduction = Literal["sum", "max"]

_TILE = 1024  # keys of a tile of the XLA version


@checked
def window_scores(
    query: Float[Array, "B W N H"],
    key: Float[Array, "B T K H"],
    start: Int32[Array, " B"],
    count: Int32[Array, " B"] | None = None,
    sink: Float[Array, " N"] | None = None,
    *,
    scale: float,
    length: int,
    cap: float | None = None,
    reduction: Reduction = "sum",
    implementation: Implementation | None = None,
) -> Float32[Array, "B K length"]:
    """Add up the attention that a window of queries pays to each key.

    Args:
      query: head `n` reads key head `n // (N / K)`. Query `w` of row `b` stands at
        index `start[b] + w` of the key axis and sees the keys `0 .. start[b] + w`, so
        the window's own keys belong to `key`.
      key: beyond the last visible key it may hold anything.
      start: not negative, and at most `T - W`.
      count: only the first `count[b]` queries of row `b` contribute, and
        `start[b] + w` must lie below `T` for these only; None is all `W`.
      sink: see `decode.decode_attention`.
      scale: factor on the logits.
      length: keys that are scored, the first ones; at most `T`. The softmax is over
        all visible keys all the same.
      cap: see `decode.decode_attention`.
      reduction: over the window: "sum", or "max" for the most that one query pays.
      implementation: "reference" (float32, `W x T` memory), "xla" (anywhere; memory of
        one tile), "triton" (NVIDIA, through jax-triton), "pallas_tpu" (TPU), or None
        for the best one that can run; `choose` says which.

    Returns:
      Softmax probabilities, averaged over the query heads of each key head and then
      reduced over the window; 0 for keys that nobody sees.

    Raises:
      ValueError: shapes disagree, or the reduction or implementation is unknown.
      NotImplementedError: a named implementation cannot run here.
    """
    where = "window_scores"
    keys, kv_heads = key.shape[1:3]
    check_groups(where, query.shape[2], kv_heads)
    if not 1 <= length <= keys:
        raise ValueError(
            f"{where}: length must be between 1 and the {keys} keys, got {length}."
        )
    if reduction not in get_args(Reduction):
        raise ValueError(
            f"{where}: unknown {reduction=}; choose one of "
            f"{', '.join(get_args(Reduction))}."
        )
    if implementation is None:
        implementation = choose(jax.default_backend(), query, key)
    run = dispatch.resolve(where, implementation, _RUNS)
    if count is None:
        count = jnp.full(start.shape, query.shape[1], jnp.int32)

    def score(query, key, start, count, *sink):
        options = dict(count=count, scale=scale, length=length, reduction=reduction)
        return run(query, key, start, *sink, **options, **dispatch.given(cap=cap))

    score = per_shard(score, window_scores)
    if implementation == "triton":
        # Its kernels know no vmap: copies of a prompt are done one by one.
        score = jax.custom_batching.sequential_vmap(score)
    return score(query, key, start, count, *dispatch.arrays(sink))


def choose(platform: str, query=None, key=None) -> Implementation:
    """Return the implementation that `None` stands for.

    Args:
      platform: of the device, as `jax.default_backend()` names it.
      query: `[B, W, N, H]`, or a `jax.ShapeDtypeStruct`.
      key: `[B, T, K, H]`, likewise; without the two, those that every kernel takes.
    """
    if platform == "gpu" and not dispatch.triton_unavailable():
        return "triton"
    if platform == "tpu":
        from jaxkv.kernels.attend_tpu import unsupported_type

        if query is None or not unsupported_type(query, key):
            return "pallas_tpu"
    return "xla"


def _last_visible(start, window, count):
    """Return the last key that each query sees, int32 `[B, W]`; -1 if it counts not."""
    order = jnp.arange(window, dtype=jnp.int32)[None]
    return jnp.where(order < count[:, None], start[:, None] + order, -1)


def _reference(
    query, key, start, sink=None, *, scale, length, count, reduction, cap=None
):
    """Everything at once in float32 and highest precision: the definition."""
    _, window, heads, _ = query.shape
    keys, kv_heads = key.shape[1:3]
    last = _last_visible(start, window, count)
    seen = (jnp.arange(keys, dtype=jnp.int32)[None, None] <= last[..., None])[
        :, None
    ]  # [B, 1, W, T]
    k = jnp.repeat(key.astype(jnp.float32), heads // kv_heads, axis=2)
    q = query.astype(jnp.float32)
    logits = scale * jnp.einsum("bwnh,btnh->bnwt", q, k, precision="highest")
    logits = jnp.where(seen, capped(logits, cap), -jnp.inf)
    if sink is not None:
        own = sink.astype(jnp.float32)[None, :, None, None]
        own = jnp.broadcast_to(own, (*logits.shape[:3], 1))
        logits = jnp.concatenate([logits, own], axis=-1)
    weights = jax.nn.softmax(logits, axis=-1)[..., :keys]
    weights = jnp.where(seen, weights, 0.0)  # a query that counts not gives NaN
    grouped = weights.reshape(-1, kv_heads, heads // kv_heads, window, keys).mean(2)
    return (grouped.sum(2) if reduction == "sum" else grouped.max(2))[..., :length]


def _xla(query, key, start, sink=None, *, scale, length, count, reduction, cap=None):
    """Two passes over tiles of keys; nothing larger than `[B, N, W, tile]` exists."""
    batch, window, heads, head_dim = query.shape
    keys, kv_heads = key.shape[1:3]
    groups = heads // kv_heads
    rows = groups * window
    grouped = query.reshape(batch, window, kv_heads, groups, head_dim)
    grouped = grouped.transpose(0, 2, 3, 1, 4).reshape(batch, kv_heads, rows, head_dim)
    last = _last_visible(start, window, count)
    last = jnp.tile(last, (1, groups))[:, None]  # [B, 1, G x W], as the rows lie

    def logits(first, size):
        """Return the logits of the tile that starts at `first`, -inf if not seen."""
        tile = jax.lax.dynamic_slice_in_dim(key, first, size, axis=1)
        out = scale * jnp.einsum(
            "bkrh,bskh->bkrs", grouped, tile, preferred_element_type=jnp.float32
        )
        out = capped(out, cap)
        index = first + jnp.arange(size, dtype=jnp.int32)
        return jnp.where(index[None, None, None] <= last[..., None], out, -jnp.inf)

    def add_up(i, carry):
        maximum, total = carry
        # The last tile is moved to the left to fit, and skips what it has in common
        # with the one before; padding would copy all keys.
        first = jnp.minimum(i * size, keys - size)
        tile = logits(first, size)
        fresh = first + jnp.arange(size, dtype=jnp.int32) >= i * size
        tile = jnp.where(fresh, tile, -jnp.inf)
        new = jnp.maximum(maximum, tile.max(-1))
        return new, total * jnp.exp(maximum - new) + jnp.exp(tile - new[..., None]).sum(
            -1
        )

    # The lowest finite number, so that a row that sees nothing gives 0 and not NaN.
    shape = (batch, kv_heads, rows)
    lowest = jnp.full(shape, jnp.finfo(jnp.float32).min, jnp.float32)
    nothing = jnp.zeros(shape, jnp.float32)
    if sink is not None:  # what has been seen before the first tile
        own = sink.astype(jnp.float32).reshape(kv_heads, groups)
        lowest = jnp.broadcast_to(jnp.repeat(own, window, axis=1)[None], shape)
        nothing = jnp.ones(shape, jnp.float32)
    size = min(_TILE, keys)
    tiles = jnp.minimum(last.max() // size + 1, -(-keys // size))
    maximum, total = jax.lax.fori_loop(0, tiles, add_up, (lowest, nothing))
    normaliser = maximum + jnp.log(jnp.maximum(total, 1e-30))

    scored = min(_TILE, length)

    def write(i, out):
        first = jnp.minimum(i * scored, length - scored)
        weights = jnp.exp(logits(first, scored) - normaliser[..., None])
        if reduction == "max":  # over queries, of the sum over the heads of a group
            weights = weights.reshape(batch, kv_heads, groups, window, scored)
            weights = weights.sum(2).max(2)
        else:
            weights = weights.sum(2)
        return jax.lax.dynamic_update_slice_in_dim(out, weights / groups, first, axis=2)

    out = jnp.zeros((batch, kv_heads, length), jnp.float32)
    return jax.lax.fori_loop(0, -(-length // scored), write, out)


def _pallas_tpu(*arguments, **options):
    from jaxkv.kernels.window_scores_tpu import window_scores_tpu

    return window_scores_tpu(*arguments, **options)


_RUNS: dict[str, Callable[..., Any]] = {
    "reference": _reference,
    "xla": _xla,
    "triton": window_scores_triton,
    "pallas_tpu": _pallas_tpu,
}
