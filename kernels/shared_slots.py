"""Attention over slots that many rows share, and over each row's own.

```
             shared slots, once for a document     a row's own slots
row 0    .-> | . . . . . . . . . . . . . . . |     | . . . |  new token, or nodes
row 1    +->                                       | . . . |
row 2    '->                                       | . . . |
```

Rows of one document are the rows of one matrix product with its slots, which are read
once for all of them. Each part is a softmax of its own; the logarithms of their sums of
exponentials say what each is worth beside the other. Hydragen (arXiv 2402.05099,
equations 5 and 6) does so with prefixes. Shared slots are never written.

Axis letters: `B` batch, `T` nodes, `N` query heads, `K` key/value heads, `G` query
heads per key/value head, `S` own slots, `H` head size, `D` documents, `P` slots of a
document, `R` rows of the document that has the most of them.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int32

from jaxkv.kernels import decode, dispatch, tree_attention
from jaxkv.kernels.cache import Nodes, SharedSlots, Slots, Token, write
from jaxkv.kernels.per_shard import per_shard
from jaxkv.kernels.shapes import check_groups, checked
from jaxkv.kernels.shared_triton import (
    attend_from_token_triton,
    attend_from_tree_triton,
)
from jaxkv.kernels.tree_attention import Implementation


@checked
def attend_from_token(
    query: Float[Array, "B N H"],
    token: Token,
    slots: Slots,
    shared: SharedSlots,
    sink: Float[Array, " N"] | None = None,
    *,
    scale: float,
    most: int,
    cap: float | None = None,
    implementation: Implementation | None = None,
) -> tuple[Float[Array, "B N H"], Slots]:
    """Do `decode.decode_attention` as if the shared slots were a row's own, too.

    Args:
      query: see `decode.decode_attention`, as of all arguments but these two.
      token: the new one.
      slots: of each row alone; the token goes into one of them.
      shared: of the documents; each row attends to those of its own.
      sink: see there.
      scale: see there.
      most: rows of the document that has the most of them, `R`, or more.
      cap: see there.
      implementation: "reference" (float32, every row with a copy), "xla" (anywhere),
        "triton" (NVIDIA, through jax-triton), or None for the best one that can run.
        Triton gives up to 64 tokens in 16 bits, be they rows or nodes, the bits that
        each has alone.

    Returns:
      The output, in the dtype of the query, and the row's own slots with the token.

    Raises:
      ValueError: shapes disagree, or the implementation is unknown.
      NotImplementedError: a named implementation cannot run here.
    """
    check_groups("attend_from_token", query.shape[1], slots.keys.shape[1])
    run = _resolved("attend_from_token", _FROM_TOKEN, implementation, query, shared)
    run = functools.partial(run, scale=scale, most=most, **dispatch.given(cap=cap))
    arrays = query, token, slots, shared, *dispatch.arrays(sink)
    return per_shard(run, attend_from_token)(*arrays)


@checked
def attend_from_tree(
    query: Float[Array, "B T N H"],
    nodes: Nodes,
    slots: Slots,
    shared: SharedSlots,
    upcoming: Int32[Array, "B K U"],
    depths: Int32[Array, "B T"],
    ancestors: Bool[Array, "B T T"],
    sink: Float[Array, " N"] | None = None,
    *,
    scale: float,
    most: int,
    cap: float | None = None,
    implementation: Implementation | None = None,
) -> Float[Array, "B T N H"]:
    """Do `tree_attention.tree_attention` as if the shared slots were a row's own, too.

    Args:
      query: see `tree_attention.tree_attention`, as of all arguments but these.
      nodes: of the tree.
      slots: of each row alone.
      shared: see `attend_from_token`; every node sees all of its row's document.
      upcoming: of the own slots.
      depths: see there.
      ancestors: see there.
      sink: see there.
      scale: see there.
      most: see `attend_from_token`.
      cap: see there.
      implementation: see `attend_from_token`.

    Returns:
      The output, in the dtype of the query.

    Raises:
      ValueError: shapes disagree, or the implementation is unknown.
      NotImplementedError: a named implementation cannot run here.
    """
    check_groups("attend_from_tree", query.shape[2], slots.keys.shape[1])
    run = _resolved("attend_from_tree", _FROM_TREE, implementation, query, shared)
    run = functools.partial(run, scale=scale, most=most, **dispatch.given(cap=cap))
    arrays = query, nodes, slots, shared, upcoming, depths, ancestors
    return per_shard(run, attend_from_tree)(*arrays, *dispatch.arrays(sink))


def choose(platform: str, query=None, keys=None) -> Implementation:
    """Return the implementation that `None` stands for.

    Args:
      platform: of the device, as `jax.default_backend()` names it.
      query: `[B, N, H]` or `[B, T, N, H]`, or a `jax.ShapeDtypeStruct`.
      keys: `[D, K, P, H]`, likewise; without the two, those that every kernel takes.
    """
    return tree_attention.choose(platform, query, keys)


def _resolved(where, table, implementation, query, shared):
    """Return the function that runs, or raise."""
    unable = {"triton": tree_attention.unsupported(query, shared.keys)}
    if implementation is None:
        implementation = choose(jax.default_backend(), query, shared.keys)
    return dispatch.resolve(where, implementation, table, unable=unable)


class Part(NamedTuple):
    """What a row has from some of the slots that it attends to.

    Attributes:
      out: float32 `[..., N, H]`, the output, as if there were no others.
      total: float32 `[..., N]`, the logarithm of the sum of exponentials; it is finite.
    """

    out: jax.Array
    total: jax.Array


def join(one: Part, two: Part) -> jax.Array:
    """Return the output over the slots of both parts, float32 `[..., N, H]`."""
    share = jax.nn.sigmoid(one.total - two.total)[..., None]
    return share * one.out + (1 - share) * two.out


def places(owner: jax.Array, documents: int, most: int) -> tuple[jax.Array, jax.Array]:
    """Sort rows by document.

    Args:
      owner: int32 `[B]`.
      documents: `D`, static.
      most: `R`, static.

    Returns:
      The rows of each document, int32 `[D, R]`, with `B` where it has no more; and the
      place of each row in that, int32 `[B]`.
    """
    batch = owner.shape[0]
    order = jnp.arange(batch, dtype=jnp.int32)
    if documents == 1 and most == batch:
        return order[None], order
    before = (owner[:, None] == owner[None]) & (order[None] < order[:, None])
    place = owner * most + before.sum(1, dtype=jnp.int32)
    rows = jnp.full(documents * most, batch, jnp.int32).at[place].set(order)
    return rows.reshape(documents, most), place


def attend_shared(
    query: jax.Array,
    shared: SharedSlots,
    *,
    scale: float,
    most: int,
    cap: float | None = None,
) -> Part:
    """Attend from all rows to their documents: `[B, T, N, H]` to a part of that shape.

    Two contractions per document and key/value head, accumulated in float32.
    """
    keys, values, positions, owner = shared
    documents, kv_heads, _, head_dim = keys.shape
    _, nodes, heads, _ = query.shape
    alone = documents == 1
    rows, place = (None, None) if alone else places(owner, documents, most)
    held = query[None] if alone else query.at[rows].get(mode="fill", fill_value=0)
    groups = (*held.shape[:3], kv_heads, heads // kv_heads, head_dim)
    grouped = held.reshape(groups).transpose(0, 3, 1, 2, 4, 5)
    grouped = grouped.reshape(documents, kv_heads, -1, head_dim)  # [D, K, R T G, H]
    flags = dict(preferred_element_type=jnp.float32)
    logits = scale * jnp.einsum("dkmh,dkph->dkmp", grouped, keys, **flags)
    occupied = (positions >= 0)[:, :, None]
    logits = jnp.where(occupied, decode.capped(logits, cap), -jnp.inf)
    weights = decode.softmax(logits).astype(values.dtype)
    # 0 x NaN is NaN, so weights of 0 alone do not keep a free slot out.
    v = jnp.where((positions >= 0)[..., None], values, 0)
    out = jnp.einsum("dkmp,dkph->dkmh", weights, v, **flags)

    def by_row(x):
        x = x.reshape(documents, kv_heads, -1, nodes, heads // kv_heads, x.shape[-1])
        x = x.transpose(0, 2, 3, 1, 4, 5).reshape(-1, nodes, heads, x.shape[-1])
        return x if alone else x[place]

    total = decode.log_sum(logits)[..., None]
    return Part(by_row(out), by_row(total)[..., 0])


def _copied(slots: Slots, shared: SharedSlots) -> Slots:
    """Return slots of each row's own that hold what it shares, behind the others."""
    keys, values, positions = (x[shared.owner] for x in shared[:3])
    return slots._replace(
        keys=jnp.concatenate([slots.keys, keys], axis=2),
        values=jnp.concatenate([slots.values, values], axis=2),
        positions=jnp.concatenate([slots.positions, positions], axis=2),
        norms=None,
    )


def _token_reference(query, token, slots, shared, sink=None, *, scale, most, cap=None):
    """Attend in float32 with a copy for every row: the definition of the operation."""
    del most
    slots = write(token, slots)
    both = _copied(slots, shared)
    out, _, _ = decode.attend_exactly(
        *(query, both.keys, both.values, both.positions, scale, sink, cap)
    )
    return out.astype(query.dtype), slots


def _token_xla(query, token, slots, shared, sink=None, *, scale, most, cap=None):
    slots = write(token, slots)
    logits = decode.decode_logits(
        query, slots.keys, slots.positions, scale=scale, cap=cap
    )
    if sink is not None:
        sink = sink.reshape(1, slots.keys.shape[1], -1, 1)
    weights = decode.softmax(logits, sink)
    out = decode.weigh(weights, slots.values, slots.positions)
    total = decode.log_sum(logits, sink)
    own = Part(out.reshape(query.shape), total.reshape(query.shape[:2]))
    theirs = attend_shared(query[:, None], shared, scale=scale, most=most, cap=cap)
    theirs = Part(theirs.out[:, 0], theirs.total[:, 0])
    return join(own, theirs).astype(query.dtype), slots


def _tree_reference(query, nodes, slots, shared, *arrays, most, **how):
    """Attend with a copy for every row, whose slots no node overwrites."""
    del most
    both = _copied(slots, shared)
    how |= dict(implementation="reference")
    return tree_attention.tree_attention(query, nodes, both, *arrays, **how)


def _tree_xla(query, nodes, slots, shared, *arrays, scale, most, cap=None):
    own = Part(
        *tree_attention.attend_part(query, nodes, slots, *arrays, scale=scale, cap=cap)
    )
    theirs = attend_shared(query, shared, scale=scale, most=most, cap=cap)
    return join(own, theirs).astype(query.dtype)


def _token_triton(query, token, slots, shared, *sink, most, **how):
    rows, _ = places(shared.owner, len(shared.keys), most)
    arrays = query, token, slots, shared, rows, *sink
    return attend_from_token_triton(*arrays, **how)


def _tree_triton(
    query, nodes, slots, shared, upcoming, depths, ancestors, *sink, most, **how
):
    rows, _ = places(shared.owner, len(shared.keys), most)
    arrays = query, nodes, slots, shared, upcoming, depths, ancestors, rows, *sink
    return attend_from_tree_triton(*arrays, **how)


_FROM_TOKEN = {
    "reference": _token_reference,
    "xla": _token_xla,
    "triton": _token_triton,
}
_FROM_TREE = {"reference": _tree_reference, "xla": _tree_xla, "triton": _tree_triton}
