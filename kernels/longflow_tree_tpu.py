"""LongFlow along the paths of a tree on TPUs, in one Pallas kernel.

```
grid (R, 2, K, steps), in this order; a row is a sequence, or one of its key/value heads
where each has a victim of its own

 first    keys pass, a block a step      logits of all nodes [T, N, S], kept in VMEM
          after the last block           the walk: node by node, parents first, logits
                                         become weights, and a victim is chosen
 second   values pass, a block a step    out [T G, H] of one head after another
```

Keys and values are read once, and nothing but the output and the slots is written. A
TPU core does one thing after another, and a node's logits of all heads fill its
registers, so walking node by node costs nothing that a depth at a time would save.
`longflow_tree_tpu_body` has the kernel, and `longflow_walk_tpu_body` the walk.

Axis letters: `B` batch, `T` nodes, `N` query heads, `K` key/value heads, `G` query
heads per key/value head, `S` slots, `H` head size, `R` rows.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from jaxkv.kernels import attend_tpu
from jaxkv.kernels import longflow_tree_tpu_body as body
from jaxkv.kernels.cache import Nodes, Slots
from jaxkv.kernels.scores import ProductScore, value_norms

_LANES = body.LANES
_MAX_BLOCK_BYTES = 1 << 20  # of keys; as much of values, and both are double-buffered
_MAX_LOGITS_BYTES = 2 << 20  # of one block, before they are kept
_MAX_CHUNK_BYTES = 128 << 10  # of logits of one node, half of the registers


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """What is static about one call.

    Attributes:
      rows: `R`.
      per: rows of one sequence, 1 or its key/value heads.
      kv_heads: of one row.
      group: `G`.
      nodes: `T`.
      slots: `S`.
      head_dim: `H`.
      dtype: of queries, keys and values.
      block: slots per step, a multiple of the chunk.
      chunk: slots at a time while walking, a multiple of 128.
      n_recent: how many of the newest tokens may not be evicted.
      scale: factor on the logits.
      sink: whether there is a logit more for each head.
      cap: bound of the logits, or None.
    """

    rows: int
    per: int
    kv_heads: int
    group: int
    nodes: int
    slots: int
    head_dim: int
    dtype: jnp.dtype
    block: int
    chunk: int
    n_recent: int
    scale: float
    sink: bool
    cap: float | None

    @property
    def heads(self) -> int:
        """Query heads of one row."""
        return self.kv_heads * self.group

    @property
    def steps(self) -> int:
        """Blocks of one head."""
        return -(-self.slots // self.block)

    @property
    def padded(self) -> int:
        """Slots of all blocks."""
        return self.steps * self.block

    @property
    def chunks(self) -> int:
        """Chunks of all blocks."""
        return self.padded // self.chunk

    @property
    def precision(self) -> jax.lax.Precision:
        """Of products; float32 would otherwise be rounded to bfloat16."""
        exact = self.dtype == jnp.float32
        return jax.lax.Precision.HIGHEST if exact else jax.lax.Precision.DEFAULT

    def vmem_bytes(self) -> int:
        """Return an upper bound of the memory that a step needs."""
        lanes, fresh = _up(self.head_dim, _LANES), _up(self.nodes, _LANES)
        heads, queries = _up(self.heads, 8), _up(self.nodes * self.group, 16)
        kept = self.nodes * heads * (self.padded + fresh) * 4
        beside = heads * (self.padded + fresh + 3 * _LANES) * 4
        held = 4 * _up(self.kv_heads, 8) * self.padded * 4  # two arrays, twice each
        spans = 3 * 8 * self.padded * 4
        cache = 4 * self.block * lanes * self.dtype.itemsize  # two arrays, twice each
        masked = 3 * self.block * lanes * 4  # float32 copies of a block with free slots
        logits = 3 * queries * self.block * 4  # of one block, on their way
        tree = (4 * queries + 4 * _up(self.nodes, 16)) * lanes * self.dtype.itemsize
        acc = 2 * queries * lanes * 4
        parts = kept, beside, held, spans, cache, masked, logits, tree, acc
        return sum(parts) + (1 << 20)


def _up(number: int, unit: int) -> int:
    return -(-number // unit) * unit


def longflow_tree_tpu(
    query: jax.Array,
    nodes: Nodes,
    slots: Slots,
    oldest: jax.Array,
    parents: jax.Array,
    depths: jax.Array,
    sink: jax.Array | None = None,
    *,
    n_recent: int,
    depth: int,
    scale: float,
    cap: float | None = None,
    score: ProductScore = "l1",
    shared: bool = True,
    block: int | None = None,
    interpret: Any = False,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Do `longflow_tree.longflow_tree`, whose arguments these are.

    Args:
      query: `[B, T, N, H]`, bfloat16 or float32.
      nodes: of the tree.
      slots: of the cache, with norms; keys in the dtype of the query.
      oldest: int32 `[B]`, the first position that may go.
      parents: int32 `[B, T]`, less than the node's own index.
      depths: int32 `[B, T]`.
      sink: `[N]`, or None.
      n_recent: how many of the newest tokens may not go.
      depth: of the deepest node; nothing depends on it here.
      scale: factor on the logits.
      cap: bound of the logits, or None.
      score: the norm of the value, "l1" or "l2", or "attention", which leaves it out.
      shared: one victim for all key/value heads, or one for each.
      block: slots per step, a multiple of 128; None chooses.
      interpret: run on the CPU; True, or `pltpu.InterpretParams()` for a simulation of
        the TPU's memories.

    Returns:
      The output `[B, T, N, H]`, and two int32 `[B, K, T]`: the slot of each node, and
      that of a token after it. In finished rows all of it is 0.

    Raises:
      NotImplementedError: dtypes or sizes that the kernel does not take.
    """
    del depth
    reason = unsupported(query, slots.keys, shared=shared, block=block)
    if reason:
        raise NotImplementedError(f"longflow_tree_tpu: {reason}")
    plan = dataclasses.replace(
        _plan(query, slots.keys, shared=shared, block=block),
        n_recent=n_recent,
        scale=float(scale),
        sink=sink is not None,
        cap=None if cap is None else float(cap),
    )
    keys, values, positions, target, norms = slots
    new_keys = nodes.key.astype(keys.dtype)
    new_values = nodes.value.astype(values.dtype)
    new_norms = value_norms(new_values, score).swapaxes(1, 2)

    def by_row(x):  # [B, K, ...] to [R, heads of a row, ...]
        return x.reshape(plan.rows, plan.kv_heads, *x.shape[2:])

    def by_node(x):  # [B, T, K x G, H] to [R, heads of a row, T G, H]
        x = x.reshape(*x.shape[:2], keys.shape[1], -1, plan.head_dim)
        x = x.transpose(0, 2, 1, 3, 4)
        return by_row(x.reshape(*x.shape[:2], -1, plan.head_dim))

    sinks = []
    if sink is not None:
        of_heads = sink.astype(jnp.float32).reshape(plan.per, plan.heads, 1)
        sinks = [jnp.broadcast_to(of_heads, (plan.per, plan.heads, _LANES))]
    # A node has fewer ancestors than there are nodes; memory is reserved for so many.
    depths = jnp.minimum(depths, plan.nodes - 1)
    out, written, targets = _launch(
        plan,
        (
            *(by_row(target), nodes.position, oldest, *sinks),
            *(parents[:, None], depths[:, None]),
            *(by_node(query), by_node(new_keys), by_node(new_values)),
            by_row(new_norms),
            *map(by_row, (keys, values, positions, norms)),
        ),
        interpret,
    )
    batch, num_nodes = query.shape[:2]
    out = out.reshape(batch, -1, num_nodes, plan.group, plan.head_dim)
    out = out.transpose(0, 2, 1, 3, 4).reshape(query.shape)
    each = batch, keys.shape[1], num_nodes
    written, targets = (
        jnp.broadcast_to(x.reshape(batch, plan.per, num_nodes), each)
        for x in (written, targets)
    )
    node = jnp.arange(num_nodes, dtype=jnp.int32)
    written = jnp.where(node == 0, target[..., None], written)
    return out, written, targets


def unsupported(query, keys, *, shared: bool, block: int | None = None) -> str:
    """Return why the kernel cannot run on these, or an empty string.

    Args:
      query: `[B, T, N, H]`; only shape and dtype are looked at.
      keys: `[B, K, S, H]`, likewise.
      shared: see `longflow_tree_tpu`.
      block: likewise.
    """
    reason = attend_tpu.unsupported_type(query, keys)
    if reason:
        return reason
    if query.dtype != keys.dtype:
        return (
            "takes queries and keys of one dtype, got "
            f'{query.dtype} and {keys.dtype}; use "xla".'
        )
    need = _plan(query, keys, shared=shared, block=block).vmem_bytes()
    if need <= attend_tpu.MAX_VMEM_BYTES:
        return ""
    return (
        f"{query.shape[1]} nodes of {query.shape[2]} heads over {keys.shape[2]} slots "
        f"need {need >> 20} MiB of on-chip memory, but "
        f"{attend_tpu.MAX_VMEM_BYTES >> 20} MiB are there; use fewer nodes or slots, "
        'or "xla".'
    )


def _plan(query, keys, *, shared, block=None) -> Plan:
    """Return a plan whose options are those of no call."""
    batch, kv_heads, slots, head_dim = keys.shape
    _, nodes, heads, _ = query.shape
    per = 1 if shared else kv_heads
    group = heads // kv_heads
    dtype = jnp.dtype(keys.dtype)
    slot_bytes = _up(heads // per, 8) * 4, _up(nodes * group, 16) * 4
    most = min(
        _MAX_BLOCK_BYTES // (_up(head_dim, _LANES) * dtype.itemsize),
        _MAX_LOGITS_BYTES // slot_bytes[1],
    )
    if block is None:
        tiles = -(-slots // _LANES)
        chunk = _even(tiles, min(_MAX_CHUNK_BYTES // slot_bytes[0], most) // _LANES)
        block = _even(-(-tiles // chunk), most // _LANES // chunk) * chunk * _LANES
    else:
        chunk = 1
    return Plan(
        rows=batch * per,
        per=per,
        kv_heads=kv_heads // per,
        group=group,
        nodes=nodes,
        slots=slots,
        head_dim=head_dim,
        dtype=dtype,
        block=block,
        chunk=chunk * _LANES,
        n_recent=0,
        scale=1.0,
        sink=False,
        cap=None,
    )


def _even(units: int, most: int) -> int:
    """Return how many at a time, at most `most`: a divisor, if one is not too small."""
    most = max(most, 1)
    divisor = max(d for d in range(1, most + 1) if units % d == 0)
    if divisor * 4 >= min(most, units):
        return divisor
    return -(-units // -(-units // most))


def _launch(plan: Plan, arrays, interpret):
    """Return out `[R, K, T G, H]`, and the slots and targets of nodes `[R, 1, T]`."""
    rows, k, t, h = plan.rows, plan.kv_heads, plan.nodes, plan.head_dim
    queries = t * plan.group
    first, second = (
        functools.partial(_of_pass, 0, plan),
        functools.partial(_of_pass, 1, plan),
    )

    def of_row(*size, **space):
        return pl.BlockSpec((1, *size), lambda r, p, k, s, *_: (r, 0, 0), **space)

    def of_sequence(*size, **space):
        return pl.BlockSpec(
            (1, *size),
            lambda r, p, k, s, *_: (body.divide(r, plan.per), 0, 0),
            **space,
        )

    smem = dict(memory_space=pltpu.SMEM)
    inputs = [of_sequence(1, t, **smem)] * 2
    inputs += [first(queries), first(t), second(t), of_row(k, t)]
    inputs += [first(plan.block, blocked=True), second(plan.block, blocked=True)]
    inputs += [of_row(k, plan.padded)] * 2
    if plan.sink:
        of_head = (1, plan.heads, _LANES)
        head = pl.BlockSpec(
            of_head, lambda r, p, k, s, *_: (jax.lax.rem(r, jnp.int32(plan.per)), 0, 0)
        )
        inputs = [head, *inputs]
    f32 = jnp.float32
    spans = [pltpu.VMEM((1, plan.padded), kind) for kind in (jnp.int32, jnp.int32, f32)]
    with jax.enable_x64(False):  # Mosaic has no 64 bits
        return pl.pallas_call(
            functools.partial(body.longflow_tree, plan=plan),
            grid_spec=pltpu.PrefetchScalarGridSpec(
                num_scalar_prefetch=3,
                grid=(rows, 2, k, plan.steps),
                in_specs=inputs,
                out_specs=[second(queries), *[of_row(1, t, **smem)] * 2],
                scratch_shapes=[
                    pltpu.SMEM((t,), jnp.int32),
                    pltpu.VMEM((t, plan.heads, plan.padded), f32),
                    pltpu.VMEM((t, plan.heads, t), f32),
                    pltpu.VMEM((plan.heads, plan.padded), f32),
                    pltpu.VMEM((plan.heads, t), f32),
                    pltpu.VMEM((plan.heads, _LANES), jnp.int32),
                    *spans,
                    pltpu.VMEM((queries, plan.block), f32),
                    pltpu.VMEM((queries, h), f32),
                ],
            ),
            out_shape=[
                jax.ShapeDtypeStruct((rows, k, queries, h), plan.dtype),
                *[jax.ShapeDtypeStruct((rows, 1, t), jnp.int32)] * 2,
            ],
            compiler_params=pltpu.CompilerParams(
                dimension_semantics=("parallel",) + ("arbitrary",) * 3,
                vmem_limit_bytes=plan.vmem_bytes(),
            ),
            name="longflow_tree",
            interpret=interpret,
        )(*arrays)


def _of_pass(mine: int, plan: Plan, rows: int, *, blocked: bool = False):
    """Return the spec of `[R, K, rows, H]`, which stands still in the other pass.

    Before its pass that is at the first block, and after it at the last, so that no
    block is fetched twice.
    """

    def index(r, p, k, s, *_):
        idle = (plan.kv_heads - 1, plan.steps - 1) if mine == 0 else (0, 0)
        k, s = (jnp.where(p == mine, *both) for both in zip((k, s), idle, strict=True))
        return r, k, s if blocked else 0, 0

    return pl.BlockSpec((1, 1, rows, plan.head_dim), index)
