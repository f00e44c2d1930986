"""Decode attention on TPUs in Pallas, with or without LongFlow's score.

```
grid (B, K, T), in this order; T blocks of slots for one (sequence, key/value head)

 HBM -> VMEM, each byte once    keys, values: one block a step; positions: one [K, S] a
                                sequence
 kept in VMEM                   logits [G, S] and norms [1, S] of this head;
                                importance [1, S] over the heads so far
 VMEM -> HBM                    out, positions, target, and one tile of rows of keys and
                                values, the one that holds the target slot
```

The last step of a head turns its logits into attention weights and adds its share of
the importance; the last step of a sequence takes the argmin. `attend_tpu_body` has the
kernels; `decode_tpu` and `longflow_tpu` are the operations.

Axis letters: `B` batch, `N` query heads, `K` key/value heads, `G` query heads per
key/value head, `S` slots, `H` head size.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from jaxkv.kernels import attend_tpu_body as body
from jaxkv.kernels.cache import Slots, Token
from jaxkv.kernels.scores import ProductScore

_LANES = body.LANES
_MAX_BLOCK_BYTES = 1 << 20  # of keys; as much of values, and both are double-buffered
MAX_VMEM_BYTES = 48 << 20  # the smallest chip of those supported has 64 MiB


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """What is static about one call.

    Attributes:
      batch: `B`.
      kv_heads: `K`.
      group: `G`.
      slots: `S`.
      head_dim: `H`.
      dtype: of keys and values.
      block: slots per step, a multiple of 128.
      tile: rows that lie together in memory; keys and values are written by these.
      scale: factor on the logits.
      score: norm of the value in the importance; None only attends.
      shared: whether all heads of a sequence share one victim.
      chooses: whether the kernel chooses the victim; else it gives the importance.
      sink: whether there is a logit more for each head.
      cap: bound of the logits, or None.
    """

    batch: int
    kv_heads: int
    group: int
    slots: int
    head_dim: int
    dtype: jnp.dtype
    block: int
    tile: int
    scale: float
    score: ProductScore | None
    shared: bool
    chooses: bool
    sink: bool
    cap: float | None

    @property
    def steps(self) -> int:
        """Blocks `T` of one head."""
        return -(-self.slots // self.block)

    @property
    def padded(self) -> int:
        """Slots of all blocks."""
        return self.steps * self.block

    @property
    def precision(self) -> jax.lax.Precision:
        """Of products; float32 would otherwise be rounded to bfloat16."""
        exact = self.dtype == jnp.float32
        return jax.lax.Precision.HIGHEST if exact else jax.lax.Precision.DEFAULT

    def vmem_bytes(self) -> int:
        """Return an upper bound of the memory that a step needs."""
        lanes = -(-self.head_dim // _LANES) * _LANES
        block = self.block * lanes
        rows = -(-self.kv_heads // 8) * 8
        cache = 4 * block * self.dtype.itemsize  # keys and values, twice each
        masked = 3 * block * 4  # float32 copies of a block with free slots
        positions = 4 * rows * self.padded * 4  # in and out, twice each
        logits = -(-self.group // 8) * 8 * (self.padded + 8 * self.block) * 4
        # Norms, importance and what is barred; or norms, and the importance twice.
        scores = 3 * 8 * self.padded * 4
        if not self.chooses:
            scores = (8 + 2 * rows) * self.padded * 4
        sink = 2 * -(-self.group // 8) * 8 * _LANES * 4 * self.sink
        return cache + masked + positions + logits + scores + sink + (1 << 20)


def make_plan(
    query: jax.Array,
    keys: jax.Array,
    *,
    scale: float,
    score: ProductScore | None,
    shared: bool = True,
    chooses: bool = True,
    block: int | None = None,
    sink: bool = False,
    cap: float | None = None,
) -> Plan:
    """Return the plan of a call, or raise NotImplementedError for what cannot run."""
    reason = unsupported(query, keys, chooses=chooses, block=block)
    if reason:
        raise NotImplementedError(f"pallas_tpu: {reason}")
    return _plan(
        query,
        keys,
        scale=scale,
        score=score,
        shared=shared,
        chooses=chooses,
        block=block,
        sink=sink,
        cap=cap,
    )


def unsupported(query, keys, *, chooses: bool = True, block: int | None = None) -> str:
    """Return why the kernels cannot run on these, or an empty string.

    Args:
      query: `[B, N, H]`; only shape and dtype are looked at.
      keys: `[B, K, S, H]`, likewise.
      chooses: see `Plan`.
      block: see `longflow_attention_tpu`.
    """
    reason = unsupported_type(query, keys)
    if reason:
        return reason
    need = _plan(query, keys, chooses=chooses, block=block).vmem_bytes()
    if need <= MAX_VMEM_BYTES:
        return ""
    return (
        f"{keys.shape[2]} slots of {keys.shape[1]} heads need {need >> 20} MiB of "
        f"on-chip memory, but {MAX_VMEM_BYTES >> 20} MiB are there; use fewer slots, "
        'or "xla".'
    )


def unsupported_type(*arrays) -> str:
    """Return why the kernels take no such arrays `[..., H]`, or an empty string."""
    for array in arrays:
        if jnp.dtype(array.dtype) not in (jnp.bfloat16, jnp.float32):
            return f'takes bfloat16 or float32, got {array.dtype}; use "xla".'
        if array.shape[-1] % 32:
            return (
                f'needs H to be a multiple of 32, got H={array.shape[-1]}; use "xla".'
            )
    return ""


def _plan(
    query,
    keys,
    *,
    chooses,
    scale=1.0,
    score="l1",
    shared=True,
    block=None,
    sink=False,
    cap=None,
) -> Plan:
    batch, kv_heads, slots, head_dim = keys.shape
    return Plan(
        batch=batch,
        kv_heads=kv_heads,
        group=query.shape[1] // kv_heads,
        slots=slots,
        head_dim=head_dim,
        dtype=jnp.dtype(keys.dtype),
        block=block or choose_block(slots, head_dim, keys.dtype),
        tile=32 // jnp.dtype(keys.dtype).itemsize,
        scale=float(scale),
        score=score,
        shared=shared,
        chooses=chooses,
        sink=sink,
        cap=None if cap is None else float(cap),
    )


def choose_block(slots: int, head_dim: int, dtype: jax.typing.DTypeLike) -> int:
    """Return the slots per step: at most 1 MiB of keys, and a divisor if there is one.

    A last block that reaches beyond the slots is masked, which costs a little more.
    """
    row = -(-head_dim // _LANES) * _LANES * jnp.dtype(dtype).itemsize
    most = max(_MAX_BLOCK_BYTES // row // _LANES, 1)
    units = -(-slots // _LANES)
    if slots % _LANES == 0:
        divisors = [d for d in range(1, most + 1) if units % d == 0]
        if divisors[-1] * 4 >= min(most, units):
            return divisors[-1] * _LANES
    return -(-units // -(-units // most)) * _LANES


def call(
    plan: Plan,
    query: jax.Array,
    token: Token,
    slots: Slots,
    bounds: tuple[jax.Array, ...] = (),
    sink: jax.Array | None = None,
    *,
    interpret: Any,
) -> tuple[Any, ...]:
    """Launch the kernel of `plan`.

    Args:
      plan: static.
      query: `[B, N, H]`.
      token: the new one.
      slots: of the cache.
      bounds: of a choice, `oldest` and `newest`.
      sink: `[N]`, where the plan has one.
      interpret: see `longflow_attention_tpu`.

    Returns:
      `out [B, N, H]`, the slots with `target` and `norms` as they were, and with a
      score the next target, int32 `[B, K, 128]`, in every lane; or, where the kernel
      does not choose, the importance, float32 `[B, K, padded]`.
    """
    if interpret and plan.slots % plan.block:
        # Interpreters pad aliased inputs and outputs, each to a multiple of its own
        # block, and then want their shapes to be equal.
        plan = dataclasses.replace(plan, tile=plan.block)
    keys, values, positions, target, _ = slots
    b, k, g, h = plan.batch, plan.kv_heads, plan.group, plan.head_dim
    heads, new = (b, k, g, h), (b, k, 1, h)
    scalars = target, token.position, *bounds
    sinks = []
    if sink is not None:
        of_heads = sink.astype(jnp.float32).reshape(k, g, 1)
        sinks = [jnp.broadcast_to(of_heads, (k, g, _LANES))]
    n = len(scalars) + len(sinks)
    kernel, inputs, outputs, scratch = _layout(plan)
    out_shape = [jax.ShapeDtypeStruct(heads, query.dtype)]
    out_shape += [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in slots[:3]]
    if plan.chooses and plan.score is not None:
        out_shape += [jax.ShapeDtypeStruct((b, k, _LANES), jnp.int32)]
    elif plan.score is not None:
        out_shape += [jax.ShapeDtypeStruct((b, k, plan.padded), jnp.float32)]
    with jax.enable_x64(False):  # Mosaic has no 64 bits
        out, keys, values, positions, *last = pl.pallas_call(
            functools.partial(kernel, plan=plan),
            grid_spec=pltpu.PrefetchScalarGridSpec(
                num_scalar_prefetch=len(scalars),
                grid=(b, k, plan.steps),
                in_specs=inputs,
                out_specs=outputs,
                scratch_shapes=scratch,
            ),
            out_shape=out_shape,
            input_output_aliases={n + 3: 1, n + 4: 2, n + 5: 3},
            compiler_params=pltpu.CompilerParams(
                dimension_semantics=("parallel", "arbitrary", "arbitrary"),
                vmem_limit_bytes=plan.vmem_bytes(),
            ),
            name="decode_attention" if plan.score is None else "longflow_attention",
            interpret=interpret,
        )(
            *(*scalars, *sinks),
            query.reshape(heads),
            token.key.astype(keys.dtype).reshape(new),
            token.value.astype(values.dtype).reshape(new),
            *(keys, values, positions),
        )
    slots = slots._replace(keys=keys, values=values, positions=positions)
    return out.reshape(query.shape), slots, *last


def _layout(plan: Plan):
    """Return the kernel, specs of its inputs and outputs, and its scratch memory."""
    k, g, h = plan.kv_heads, plan.group, plan.head_dim

    def of_head(rows):
        return pl.BlockSpec((1, 1, rows, h), lambda b, k, t, *_: (b, k, 0, 0))

    def tile_of_target(b, k, t, target, *_):
        return b, k, body.divide(body.clamp(target[b, k], plan), plan.tile), 0

    block = pl.BlockSpec((1, 1, plan.block, h), lambda b, k, t, *_: (b, k, t, 0))
    written = pl.BlockSpec((1, 1, plan.tile, h), tile_of_target)
    held = pl.BlockSpec((1, k, plan.padded), lambda b, k, t, *_: (b, 0, 0))
    chosen = pl.BlockSpec((1, k, _LANES), lambda b, k, t, *_: (b, 0, 0))
    inputs = [of_head(g), of_head(1), of_head(1), block, block, held]
    if plan.sink:
        of_group = pl.BlockSpec((1, g, _LANES), lambda b, k, t, *_: (k, 0, 0))
        inputs = [of_group, *inputs]
    outputs = [of_head(g), written, written, held]
    f32 = jnp.float32
    scratch = [pltpu.VMEM((g, _LANES), f32)] * 2 + [pltpu.VMEM((g, h), f32)]
    if plan.score is None:
        return body.attend, inputs, outputs, scratch
    scratch += [pltpu.VMEM((g, plan.padded), f32)]
    scratch += [pltpu.VMEM((1, plan.padded), f32)] * (3 if plan.chooses else 1)
    if plan.chooses:
        return body.longflow, inputs, [*outputs, chosen], scratch
    return body.score, inputs, [*outputs, held], scratch
