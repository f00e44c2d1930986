"""One decode step of attention on TPUs, in Pallas: LongFlow's kernel without the score.

`attend_tpu` has the picture and the limits.
"""

from typing import Any

import jax

from jaxkv.kernels import attend_tpu
from jaxkv.kernels.cache import DecodeOutput


def decode_attention_tpu(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    keys: jax.Array,
    values: jax.Array,
    positions: jax.Array,
    target: jax.Array,
    position: jax.Array,
    *,
    scale: float,
    block: int | None = None,
    interpret: Any = False,
) -> DecodeOutput:
    """Write one token into its slot, then attend from it to all occupied slots.

    Arguments and results are those of `decode.decode_attention`, which checks them.
    `keys`, `values` and `positions` are updated in place where XLA lets them be: under
    `jit`, donated or used nowhere else.

    Args:
      query: `[B, N, H]`, bfloat16 or float32.
      key: `[B, K, H]`.
      value: `[B, K, H]`.
      keys: `[B, K, S, H]`.
      values: `[B, K, S, H]`.
      positions: int32 `[B, K, S]`.
      target: int32 `[B, K]`.
      position: int32 `[B]`.
      scale: factor on the logits.
      block: slots per step, a multiple of 128; None chooses.
      interpret: see `longflow_tpu.longflow_attention_tpu`.

    Returns:
      The output and the updated cache.

    Raises:
      NotImplementedError: dtypes or sizes that the kernel does not take.
    """
    plan = attend_tpu.make_plan(query, keys, scale=scale, score=None, block=block)
    outputs = attend_tpu.call(
        plan,
        (target, position),
        (query, key, value, keys, values, positions),
        interpret=interpret,
    )
    return DecodeOutput(*outputs)
