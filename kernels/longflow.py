"""One decode step of attention that also chooses what the next token overwrites.

LongFlow (arXiv 2603.11504): evict the token whose share `alpha * v` of the current
attention output is smallest. The answer comes out of the attention itself, with no
history and no second pass over the keys.

Axis letters: `B` batch, `N` query heads, `K` key/value heads, `G` query heads per
key/value head, `S` slots, `H` head size.
"""

import functools
from typing import get_args

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

from jaxkv.kernels import decode, dispatch
from jaxkv.kernels.cache import Slots, Token, write
from jaxkv.kernels.decode import Implementation
from jaxkv.kernels.longflow_triton import (
    choose_told_triton,
    longflow_attention_triton,
    tell_triton,
)
from jaxkv.kernels.per_shard import MESH_AXES, devices_per_row, per_shard
from jaxkv.kernels.scores import Score, value_norms, write_norm
from jaxkv.kernels.shapes import check_groups, checked
from jaxkv.kernels.victims import all_heads, choose_victim

# Least `1 - alpha` that a deletion is divided by: where one token has all of the
# attention, float32 cannot tell the rest from 0.
LEAST_REST = 1e-6


@checked
def longflow_attention(
    query: Float[Array, "B N H"],
    token: Token,
    slots: Slots,
    oldest: Int32[Array, " B"],
    newest: Int32[Array, " B"],
    sink: Float[Array, " N"] | None = None,
    *,
    scale: float,
    cap: float | None = None,
    score: Score = "l1",
    shared: bool = True,
    implementation: Implementation | None = None,
) -> tuple[Float[Array, "B N H"], Slots]:
    """Write one token into its slot, attend from it, and choose the next slot.

    With `alpha` the attention weight of a slot for one query head, `v` its value and
    `o` that head's output, the score of a slot is, in float32,

    * "l1": `alpha * ||v||_1`, the paper's;
    * "l2": `alpha * ||v||_2`;
    * "attention": `alpha`;
    * "deletion": `alpha / (1 - alpha) * ||v - o||_2`, which is exactly the distance
      that `o` moves if this token is deleted and the others share its weight.

    The importance of a slot is the mean over the query heads of a key/value head, and
    with `shared` over all heads of the layer, on however many devices they lie. The
    next token goes to the lowest free slot; else to the evictable slot of least
    importance; else, where nothing is evictable, to the slot of least importance. Ties
    go to the lowest slot.
    `jaxkv.kernels.victims` says what free and evictable mean where heads share.

    Args:
      query: of the new token; head `n` reads head `n // (N / K)`.
      token: the new one; of a finished row nothing changes, `target` included, and its
        output is finite but means nothing.
      slots: with norms; `slots.target` is the one that the token overwrites.
      oldest: least position that may be evicted.
      newest: greatest position that may be evicted; `token.position` allows even the
        new token.
      sink: see `decode.decode_attention`; a sink has its share of `alpha`, no more.
      scale: factor on the logits.
      cap: see `decode.decode_attention`.
      score: see above.
      shared: one victim for all heads of a row, or one per key/value head.
      implementation: "reference" (float32), "xla" (anywhere), "triton" (NVIDIA, through
        jax-triton), "pallas_tpu" (TPU), or None for the best one that can run;
        `choose` says which.

    Returns:
      The output, in the dtype of the query, and the slots: with the token in them, and
      the next token's slot as `target`.

    Raises:
      ValueError: shapes disagree, the norms are missing, or the score or the
        implementation is unknown.
      NotImplementedError: a named implementation cannot run here, or has no "deletion".
    """
    where = "longflow_attention"
    check_groups(where, query.shape[1], slots.keys.shape[1])
    check_norms(where, slots)
    if score not in get_args(Score):
        raise ValueError(
            f"{where}: unknown {score=}; choose one of {', '.join(get_args(Score))}."
        )
    if implementation is None:
        implementation = choose(jax.default_backend(), score, query, slots.keys)
    _refuse_deletion(implementation, score)
    run = functools.partial(
        dispatch.resolve(where, implementation, _RUNS),
        scale=scale,
        score=score,
        shared=shared,
        axis=MESH_AXES["K"] if shared and devices_per_row() > 1 else None,
        **dispatch.given(cap=cap),
    )
    arrays = query, token, slots, oldest, newest, *dispatch.arrays(sink)
    return per_shard(run, longflow_attention)(*arrays)


def check_norms(where: str, slots: Slots) -> None:
    """Raise ValueError where slots are to be scored and have no norms."""
    if slots.norms is None:
        raise ValueError(
            f"{where}: slots.norms must be the norms of the values, got None; "
            "`scores.value_norms` computes them."
        )


def choose(platform: str, score: Score = "l1", query=None, keys=None) -> Implementation:
    """Return the implementation that `None` stands for.

    Args:
      platform: of the device, as `jax.default_backend()` names it.
      score: see `longflow_attention`.
      query: `[B, N, H]`, or a `jax.ShapeDtypeStruct`.
      keys: `[B, K, S, H]`, likewise; without the two, those that every kernel takes.
    """
    return "xla" if score == "deletion" else decode.choose(platform, query, keys)


def token_importance(
    query: jax.Array,
    keys: jax.Array,
    values: jax.Array,
    positions: jax.Array,
    *,
    scale: float,
    sink: jax.Array | None = None,
    cap: float | None = None,
    score: Score = "l1",
    exact: bool = False,
) -> jax.Array:
    """Score the slots alone, for a policy that does not choose at every step.

    Args:
      query: `[B, N, H]`.
      keys: `[B, K, S, H]`, the new token's among them.
      values: `[B, K, S, H]`.
      positions: int32 `[B, K, S]`.
      scale: factor on the logits.
      sink: see `longflow_attention`.
      cap: likewise.
      score: likewise.
      exact: in float32 and highest precision, as the reference does.

    Returns:
      Float32 `[B, K, S]`, the mean over the query heads of each key/value head.
    """
    weights = decode.decode_weights(
        query, keys, positions, scale=scale, sink=sink, cap=cap, exact=exact
    )
    out = decode.weigh(weights, values, positions) if score == "deletion" else None
    norms = value_norms(values, score)
    return _importance(weights, values, norms, out, positions, score)


def reference(
    query,
    token,
    slots,
    oldest,
    newest,
    sink=None,
    *,
    scale,
    score,
    shared,
    axis,
    cap=None,
):
    """Do `longflow_attention` in float32, one query head after another: its definition.

    It keeps the norms, but computes its own from the values.

    Args:
      query: as there, and so are the other arrays and options.
      token: the new one.
      slots: with norms.
      oldest: least position that may be evicted.
      newest: greatest position that may be evicted.
      sink: of each head, or None.
      scale: factor on the logits.
      score: what a slot is worth.
      shared: one victim for all heads of a row.
      axis: see `victims.choose_victim`.
      cap: bound of the logits, or None.

    Returns:
      The output, and the slots.
    """
    norms = write_norm(token, slots, score)
    slots = write(token, slots)
    keys, values, positions, target, _ = slots
    out, weights, v = decode.attend_exactly(
        query, keys, values, positions, scale, sink, cap
    )
    match score:
        case "l1":
            scores = weights * jnp.abs(v).sum(-1)
        case "l2":
            scores = weights * jnp.sqrt(jnp.square(v).sum(-1))
        case "attention":
            scores = weights
        case "deletion":
            moved = jnp.sqrt(jnp.square(v - out[:, :, None]).sum(-1))
            scores = weights / jnp.maximum(1 - weights, LEAST_REST) * moved
    batch, kv_heads, length = positions.shape
    importance = scores.reshape(batch, kv_heads, -1, length).mean(axis=2)
    importance = jnp.where(positions >= 0, importance, 0)
    importance, held = all_heads(importance, positions, axis)
    free = held < 0
    allowed = (held >= oldest[:, None, None]) & (held <= newest[:, None, None])
    if shared:
        importance = importance.mean(axis=1, keepdims=True)
        # A head that holds nothing there has nothing to say.
        allowed = (free | allowed).all(axis=1, keepdims=True)
        free = free.all(axis=1, keepdims=True)
    rank = jnp.where(free, 0, jnp.where(allowed, 1, 2))
    first = jnp.lexsort((importance, rank), axis=-1)[..., 0].astype(jnp.int32)
    target = jnp.where(token.position[:, None] < 0, target, first)
    return out.astype(query.dtype), slots._replace(norms=norms, target=target)


def _xla(
    query,
    token,
    slots,
    oldest,
    newest,
    sink=None,
    *,
    scale,
    score,
    shared,
    axis,
    cap=None,
):
    """Two contractions per key/value head, and a norm per slot: `a |v|` is `|a v|`."""
    norms = write_norm(token, slots, score)
    slots = write(token, slots)
    keys, values, positions, _, _ = slots
    weights = decode.decode_weights(
        query, keys, positions, scale=scale, sink=sink, cap=cap
    )
    weighed = decode.weigh(weights, values, positions)
    importance = _importance(weights, values, norms, weighed, positions, score)
    slots = _choose(
        *(importance, token, slots._replace(norms=norms), oldest, newest),
        shared=shared,
        axis=axis,
    )
    return weighed.reshape(query.shape).astype(query.dtype), slots


def _choose(importance, token, slots, oldest, newest, *, shared, axis):
    """Return the slots with the next target; that of a finished row stays."""
    victim = choose_victim(
        *(importance, slots.positions, oldest, newest), shared=shared, axis=axis
    )
    target = jnp.where(token.position[:, None] < 0, slots.target, victim)
    return slots._replace(target=target)


def _triton(*arguments, axis, shared, **options):
    if axis is None:
        return longflow_attention_triton(*arguments, shared=shared, **options)
    # The other devices are asked at the end. Nothing else in the step waits for their
    # answer, so that XLA makes one exchange of those of all layers.
    out, told, arrivals, slots = tell_triton(*arguments, **options)
    told = jax.lax.all_gather(told, axis)
    return out, choose_told_triton(told, arrivals, arguments[1], slots)


def _pallas_tpu(*arguments, **options):
    from jaxkv.kernels.longflow_tpu import longflow_attention_tpu

    return longflow_attention_tpu(*arguments, **options)


_RUNS = {
    "reference": reference,
    "xla": _xla,
    "triton": _triton,
    "pallas_tpu": _pallas_tpu,
}


def _refuse_deletion(implementation, score):
    # It needs the finished output before the first score: a second pass over values.
    if score == "deletion" and implementation in ("triton", "pallas_tpu"):
        raise NotImplementedError(
            f'longflow_attention: implementation="{implementation}" does not do '
            'score="deletion"; use "xla", None, or another score.'
        )


def _importance(weights, values, norms, out, positions, score):
    """Average the scores `[B, K, G, S]` over the group: float32 `[B, K, S]`.

    `values` and `out` `[B, K, G, H]` are read for "deletion" only, `norms` for the
    others.
    """
    held = positions >= 0
    if score != "deletion":
        return weights.mean(axis=2) * jnp.where(held, norms, 0)
    v = jnp.where(held[..., None], values, 0).astype(jnp.float32)
    moved = v[:, :, None] - out[..., None, :]
    moved = jnp.sqrt(jnp.square(moved).sum(-1))
    return (weights / jnp.maximum(1 - weights, LEAST_REST) * moved).mean(axis=2)
