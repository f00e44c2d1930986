"""One decode step of attention on TPUs, in Pallas: LongFlow's kernel without the score.

`attend_tpu` has the picture and the limits.
"""

from typing import Any

import jax

from jaxkv.kernels import attend_tpu
from jaxkv.kernels.cache import Slots, Token


def decode_attention_tpu(
    query: jax.Array,
    token: Token,
    slots: Slots,
    sink: jax.Array | None = None,
    *,
    scale: float,
    cap: float | None = None,
    block: int | None = None,
    interpret: Any = False,
) -> tuple[jax.Array, Slots]:
    """Do `decode.decode_attention`, whose arguments these are.

    Keys, values and positions are updated in place where XLA lets them be: under `jit`,
    donated or used nowhere else.

    Args:
      query: `[B, N, H]`, bfloat16 or float32.
      token: the new one.
      slots: of the cache.
      sink: `[N]`, or None.
      scale: factor on the logits.
      cap: bound of the logits, or None.
      block: slots per step, a multiple of 128; None chooses.
      interpret: see `longflow_tpu.longflow_attention_tpu`.

    Returns:
      The output `[B, N, H]` and the slots.

    Raises:
      NotImplementedError: dtypes or sizes that the kernel does not take.
    """
    plan = attend_tpu.make_plan(
        query,
        slots.keys,
        scale=scale,
        score=None,
        block=block,
        sink=sink is not None,
        cap=cap,
    )
    out, slots = attend_tpu.call(
        plan, query, token, slots, sink=sink, interpret=interpret
    )
    return out, slots
