"""LongFlow's decode step on TPUs: attend, score and choose the victim in one kernel.

`attend_tpu` has the picture and the limits.

Axis letters: `B` batch, `N` query heads, `K` key/value heads, `S` slots, `H` head size.
"""

from typing import Any, get_args

import jax
import jax.numpy as jnp

from jaxkv.kernels import attend_tpu
from jaxkv.kernels.cache import Slots, Token
from jaxkv.kernels.scores import ProductScore, write_norm
from jaxkv.kernels.victims import choose_victim


def longflow_attention_tpu(
    query: jax.Array,
    token: Token,
    slots: Slots,
    oldest: jax.Array,
    newest: jax.Array,
    sink: jax.Array | None = None,
    *,
    scale: float,
    cap: float | None = None,
    score: ProductScore = "l1",
    shared: bool = True,
    axis: str | None = None,
    block: int | None = None,
    interpret: Any = False,
) -> tuple[jax.Array, Slots]:
    """Do `longflow.longflow_attention`, whose arguments these are.

    The importance of a slot is the mean over query heads of alpha * norm(v), in float32
    (the paper's LongFlowScore, section 3.3: ||alpha v||_1 = alpha ||v||_1), with alpha
    its attention weight. It is only compared, so the kernel adds and does not divide.

    Keys, values and positions are updated in place where XLA lets them be: under `jit`,
    donated or used nowhere else.

    Args:
      query: `[B, N, H]` of the new token, bfloat16 or float32.
      token: the new one.
      slots: of the cache; its norms are kept for others, for the kernel has the values
        at hand.
      oldest: int32 `[B]`.
      newest: int32 `[B]`; only tokens at positions from `oldest` to `newest` may be
        evicted. Where there is none, any may.
      sink: `[N]`, or None.
      scale: factor on the logits.
      cap: bound of the logits, or None.
      score: "l1" or "l2", the norm of the value; "attention", no norm.
      shared: one victim for all heads of a sequence, by the mean over all of them;
        otherwise one for each key/value head, by the mean over its group.
      axis: of the mesh that the heads of a row are spread over, inside a `shard_map`;
        the kernel then leaves the importance, and the choice follows the exchange.
      block: slots per step, a multiple of 128; None chooses.
      interpret: run on the CPU; True, or `pltpu.InterpretParams()` for a simulation of
        the TPU's memories.

    Returns:
      The output `[B, N, H]` and the slots; `target` is the lowest free slot, else the
      evictable one of least importance, the lowest of equals.

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
        slots.keys,
        scale=scale,
        score=score,
        shared=shared,
        chooses=axis is None,
        block=block,
        sink=sink is not None,
        cap=cap,
    )
    bounds = (oldest, newest) if plan.chooses else ()
    norms = write_norm(token, slots, score)
    out, slots, last = attend_tpu.call(
        plan, query, token, slots, bounds, sink, interpret=interpret
    )
    if plan.chooses:
        target = last[:, :, 0]
    else:
        importance = last[:, :, : plan.slots]
        victim = choose_victim(
            importance, slots.positions, oldest, newest, shared=shared, axis=axis
        )
        target = jnp.where(token.position[:, None] < 0, slots.target, victim)
    return out, slots._replace(norms=norms, target=target)
