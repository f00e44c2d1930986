"""LongFlow's decode step on TPUs: attend, score and choose the victim in one kernel.

`attend_tpu` has the picture and the limits.

Axis letters: `B` batch, `N` query heads, `K` key/value heads, `S` slots, `H` head size.
"""

from typing import Any, get_args

import jax

from jaxkv.kernels import attend_tpu, longflow
from jaxkv.kernels.outputs import LongFlowOutput
from jaxkv.kernels.per_shard import devices_per_row, per_shard


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
    score: attend_tpu.Score = "l1",
    shared: bool = True,
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
      block: slots per step, a multiple of 128; None chooses.
      interpret: run on the CPU; True, or `pltpu.InterpretParams()` for a simulation of
        the TPU's memories.

    Returns:
      The output, the updated cache, and the next target: the lowest free slot, else
      the evictable one of least importance, the lowest of equals.

    Raises:
      ValueError: unknown score.
      NotImplementedError: dtypes or sizes that the kernel does not take, or a shared
        victim of heads that lie on several devices.
    """
    if score not in get_args(attend_tpu.Score):
        raise ValueError(
            f"longflow_attention_tpu: unknown {score=}; choose one of "
            f"{', '.join(get_args(attend_tpu.Score))}."
        )
    if shared and devices_per_row() > 1:
        raise NotImplementedError(
            "longflow_attention_tpu: shared=True needs all heads of a row on one "
            f"device, but the mesh spreads them over {devices_per_row()}; use "
            'shared=False, a mesh whose axis "model" is 1, or "xla".'
        )

    def run(norms, *arguments):
        plan = attend_tpu.make_plan(
            arguments[0],
            arguments[3],
            scale=scale,
            score=score,
            shared=shared,
            block=block,
        )
        out, *cache, chosen = attend_tpu.call(
            plan, arguments[6:], arguments[:6], interpret=interpret
        )
        value, target, position = arguments[2], *arguments[6:8]
        norms = longflow.write_norm(value, norms, target, position, score)
        return out, *cache, norms, chosen[:, :, 0]

    cache = ("B K S H", "B K S H", "B K S")
    run = per_shard(
        run,
        ("B K S", "B N H", "B K H", "B K H", *cache, "B K", "B", "B", "B"),
        ("B N H", *cache, "B K S", "B K"),
    )
    return LongFlowOutput(
        *run(
            norms,
            query,
            key,
            value,
            keys,
            values,
            positions,
            target,
            position,
            oldest,
            newest,
        )
    )
