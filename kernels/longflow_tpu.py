"""LongFlow's decode step on TPUs: attend, score and choose the victim in one kernel.

`attend_tpu` has the picture and the limits.

Axis letters: `B` batch, `N` query heads, `K` key/value heads, `S` slots, `H` head size.
"""

from typing import Any, get_args

import jax
import jax.numpy as jnp

from jaxkv.kernels import attend_tpu
from jaxkv.kernels.cache import LongFlowOutput
from jaxkv.kernels.scores import ProductScore, write_norm
from jaxkv.kernels.victims import choose_victim


def longflow_attention_tpu(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    keys: jax.Array,
    values: jax.Array,
    positions: jax.Array,
    norms: jax.Array,
    target: jax.Array,
    position: jax.Array,
    oldest: jax.Array,
    newest: jax.Array,
    *,
    scale: float,
    score: ProductScore = "l1",
    shared: bool = True,
    axis: str | None = None,
    block: int | None = None,
    interpret: Any = False,
) -> LongFlowOutput:
    """Write one token, attend to all occupied slots, score them, choose the next slot.

    The importance of a slot is the mean over query heads of alpha * norm(v), in float32
    (the paper's LongFlowScore, section 3.3: ||alpha v||_1 = alpha ||v||_1), with alpha
    its attention weight. It is only compared, so the kernel adds and does not divide.

    `keys`, `values` and `positions` are updated in place where XLA lets them be: under
    `jit`, donated or used nowhere else.

    Args:
      query: `[B, N, H]` of the new token, bfloat16 or float32.
      key: `[B, K, H]` of the new token, rotated.
      value: `[B, K, H]` of the new token.
      keys: `[B, K, S, H]`.
      values: `[B, K, S, H]`; free slots of both may hold anything, NaN included.
      positions: int32 `[B, K, S]`, negative where a slot is free.
      norms: float32 `[B, K, S]`, kept for others: the kernel has the values at hand.
      target: int32 `[B, K]`, the slot that the new token overwrites.
      position: int32 `[B]` of the new token; -1 for a finished row, of which nothing
        changes and whose output is finite but means nothing.
      oldest: int32 `[B]`.
      newest: int32 `[B]`; only tokens at positions from `oldest` to `newest` may be
        evicted. Where there is none, any may.
      scale: factor on the logits.
      score: "l1" or "l2", the norm of the value; "attention", no norm.
      shared: one victim for all heads of a sequence, by the mean over all of them (a
        slot is then free if head 0 has nothing in it, and evictable if it is in every
        head); otherwise one for each key/value head, by the mean over its group.
      axis: of the mesh that the heads of a row are spread over, inside a `shard_map`;
        the kernel then leaves the importance, and the choice follows the exchange.
      block: slots per step, a multiple of 128; None chooses.
      interpret: run on the CPU; True, or `pltpu.InterpretParams()` for a simulation of
        the TPU's memories.

    Returns:
      The output, the updated cache, and the next target: the lowest free slot, else
      the evictable one of least importance, the lowest of equals.

    Raises:
      ValueError: unknown score.
      NotImplementedError: dtypes or sizes that the kernel does not take.
    """
    if score not in get_args(ProductScore):
        raise ValueError(
            f"longflow_attention_tpu: unknown {score=}; choose one of "
            f"{', '.join(get_args(ProductScore))}."
        )
    plan = attend_tpu.make_plan(
        query,
        keys,
        scale=scale,
        score=score,
        shared=shared,
        chooses=axis is None,
        block=block,
    )
    bounds = (oldest, newest) if plan.chooses else ()
    out, keys, values, positions, last = attend_tpu.call(
        plan,
        (target, position, *bounds),
        (query, key, value, keys, values, positions),
        interpret=interpret,
    )
    norms = write_norm(value, norms, target, position, score)
    if plan.chooses:
        target = last[:, :, 0]
    else:
        importance = last[:, :, : plan.slots]
        victim = choose_victim(
            importance, positions, oldest, newest, shared=shared, axis=axis
        )
        target = jnp.where(position[:, None] < 0, target, victim)
    return LongFlowOutput(out, keys, values, positions, norms, target)
