"""Attention of a tree of drafted tokens over the cache and over the tree itself.

Each node attends to what the cache would hold if the tokens from the root to that node
had been written one after the other. Nothing is written; keys and values are read once.

Axis letters: `B` batch, `T` nodes, `N` query heads, `K` key/value heads, `S` slots,
`H` head size, `D` depth of the deepest node.
"""

import functools
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int32

from jaxkv.kernels import decode, dispatch, nodes_triton
from jaxkv.kernels.cache import Nodes, Slots, Token, write
from jaxkv.kernels.per_shard import per_shard
from jaxkv.kernels.shapes import check_groups, checked
from jaxkv.kernels.tree_triton import tree_attention_triton
from jaxkv.kernels.weighing import capped

Implementation = Literal["reference", "xla", "triton"]


@checked
def tree_attention(
    query: Float[Array, "B T N H"],
    nodes: Nodes,
    slots: Slots,
    upcoming: Int32[Array, "B K U"],
    depths: Int32[Array, "B T"],
    ancestors: Bool[Array, "B T T"],
    sink: Float[Array, " N"] | None = None,
    *,
    scale: float,
    cap: float | None = None,
    implementation: Implementation | None = None,
) -> Float[Array, "B T N H"]:
    """Attend from every node, where the slot of a write depends on its depth alone.

    Args:
      query: rotated; head `n` reads head `n // (N / K)`.
      nodes: of the tree.
      slots: of the cache.
      upcoming: the slot that a node of each depth overwrites, `U = D + 1` of them;
        more, for deeper nodes than there are, change nothing.
      depths: of the nodes.
      ancestors: at `[b, t, u]`, whether `u` is `t` or above it.
      sink: see `decode.decode_attention`.
      scale: factor on the logits.
      cap: see `decode.decode_attention`.
      implementation: "reference" (float32, writes node by node), "xla" (anywhere),
        "triton" (NVIDIA, through jax-triton), or None for the best one that can run.
        Triton gives up to 64 nodes in 16 bits the bits of plain decoding.

    Returns:
      The output, in the dtype of the query.

    Raises:
      ValueError: shapes disagree, or the implementation is unknown.
      NotImplementedError: a named implementation cannot run here.
    """
    where = "tree_attention"
    check_groups(where, query.shape[2], slots.keys.shape[1])
    unable = {"triton": unsupported(query, slots.keys)}
    if implementation is None:
        implementation = choose(jax.default_backend(), query, slots.keys)
    run = dispatch.resolve(where, implementation, _RUNS, unable=unable)
    run = functools.partial(run, scale=scale, **dispatch.given(cap=cap))
    arrays = query, nodes, slots, upcoming, depths, ancestors, *dispatch.arrays(sink)
    return per_shard(run, tree_attention)(*arrays)


def choose(platform: str, query=None, keys=None) -> Implementation:
    """Return the implementation that `None` stands for.

    Args:
      platform: of the device, as `jax.default_backend()` names it.
      query: `[B, T, N, H]`, or a `jax.ShapeDtypeStruct`.
      keys: `[B, K, S, H]`, likewise; without the two, those that every kernel takes.
    """
    if platform != "gpu" or dispatch.triton_unavailable():
        return "xla"
    return "xla" if query is not None and unsupported(query, keys) else "triton"


def unsupported(query, keys) -> str:
    """Return why the Triton version cannot take these arrays, or an empty string.

    Args:
      query: `[B, T, N, H]`; only shape and dtype are looked at.
      keys: `[B, K, S, H]`, likewise.
    """
    if query.shape[-1] > 256:
        return f"takes heads of at most 256, got {query.shape[-1]}; use 'xla'."
    known = query.dtype in (jnp.float32, jnp.bfloat16, jnp.float16)
    if not known or query.dtype != keys.dtype:
        return (
            "takes queries and keys of one dtype, float32, bfloat16 or float16, got "
            f"{query.dtype} and {keys.dtype}; use 'xla'."
        )
    return ""


def _reference(
    query, nodes, slots, upcoming, depths, ancestors, sink=None, *, scale, cap=None
):
    """Write each node's path into a copy of the cache; attend in float32."""
    finished = jnp.full(query.shape[:1], -1, jnp.int32)

    # Loops, not as many copies of the program as there are nodes times depths.
    def of_node(node):
        above = ancestors[:, node]

        def write_at(depth, held):
            on_path = above & (depths == depth)
            writes = on_path.any(-1)
            at = jnp.argmax(on_path, axis=-1).astype(jnp.int32)
            at = at[:, None, None, None]
            token = Token(
                jnp.take_along_axis(nodes.key, at, axis=1)[:, 0],
                jnp.take_along_axis(nodes.value, at, axis=1)[:, 0],
                jnp.where(writes, depth, -1),  # any position: here it means "held"
            )
            return write(token, held._replace(target=upcoming[:, :, depth]))

        held = jax.lax.fori_loop(0, upcoming.shape[2], write_at, slots)
        nothing = Token(nodes.key[:, node], nodes.value[:, node], finished)
        out, _ = decode.decode_attention(
            *(query[:, node], nothing, held, sink),
            scale=scale,
            cap=cap,
            implementation="reference",
        )
        return out

    every = jnp.arange(query.shape[1], dtype=jnp.int32)
    return jnp.moveaxis(jax.lax.map(of_node, every), 0, 1)


def group(query, kv_heads):
    """Return queries `[B, T, N, H]` by the head they read: `[B, K, T, G, H]`."""
    batch, nodes, heads, head_dim = query.shape
    query = query.reshape(batch, nodes, kv_heads, heads // kv_heads, head_dim)
    return query.transpose(0, 2, 1, 3, 4)


def logits_of(grouped, key, keys, scale, cap=None):
    """Return the logits against the slots and against the tree, float32.

    Args:
      grouped: `[B, K, T, G, H]`.
      key: `[B, T, K, H]`.
      keys: `[B, K, S, H]`.
      scale: factor.
      cap: their bound; see `decode.decode_attention`.

    Returns:
      `[B, K, T, G, S]` and `[B, K, T, G, T]`.
    """
    flags = dict(preferred_element_type=jnp.float32)
    old = scale * jnp.einsum("bktgh,bksh->bktgs", grouped, keys, **flags)
    new = scale * jnp.einsum("bktgh,bukh->bktgu", grouped, key, **flags)
    return capped(old, cap), capped(new, cap)


def softmax_over_both(old, new, old_alive, new_alive, sink=None):
    """Return one softmax over two arrays of logits, where their masks are true.

    Behind the weights comes the logarithm of the sum of all exponentials, float32
    `[B, K, T, G]`.

    Args:
      old: float32 `[B, K, T, G, S]`.
      new: float32 `[B, K, T, G, T]`; each node is alive to itself.
      old_alive: bool, broadcastable to `old`.
      new_alive: bool, broadcastable to `new`.
      sink: one logit of each head more, `[K x G]`.
    """
    old = jnp.where(old_alive, old, -jnp.inf)
    new = jnp.where(new_alive, new, -jnp.inf)
    top = jnp.maximum(old.max(-1, keepdims=True), new.max(-1, keepdims=True))
    if sink is not None:
        sink = sink.astype(jnp.float32).reshape(1, old.shape[1], 1, -1, 1)
        top = jnp.maximum(top, sink)
    old, new = jnp.exp(old - top), jnp.exp(new - top)
    total = old.sum(-1, keepdims=True) + new.sum(-1, keepdims=True)
    if sink is not None:
        total += jnp.exp(sink - top)
    return old / total, new / total, (top + jnp.log(total))[..., 0]


def combine(old, new, value, values, occupied):
    """Multiply weights with values, each read once: `[B, T, N, H]` in float32.

    Args:
      old: `[B, K, T, G, S]`.
      new: `[B, K, T, G, T]`.
      value: `[B, T, K, H]`.
      values: `[B, K, S, H]`.
      occupied: bool `[B, K, S]`.
    """
    flags = dict(preferred_element_type=jnp.float32)
    # 0 x NaN is NaN, so masked weights alone do not keep a free slot out.
    held = jnp.where(occupied[..., None], values, 0)
    out = jnp.einsum("bktgs,bksh->bktgh", old.astype(values.dtype), held, **flags)
    out += jnp.einsum("bktgu,bukh->bktgh", new.astype(value.dtype), value, **flags)
    batch, kv_heads, nodes, groups, head_dim = out.shape
    out = out.transpose(0, 2, 1, 3, 4)
    return out.reshape(batch, nodes, kv_heads * groups, head_dim)


def attend_part(
    query, nodes, slots, upcoming, depths, ancestors, sink=None, *, scale, cap=None
):
    """Mask instead of writing: a slot holds what it holds until it is overwritten.

    Arguments are those of `tree_attention`.

    Returns:
      The output `[B, T, N, H]`, and the logarithm of each head's sum of exponentials,
      `[B, T, N]`; both float32.
    """
    keys, values, positions, _, _ = slots
    order = jnp.arange(upcoming.shape[2], dtype=jnp.int32)
    never = jnp.int32(upcoming.shape[2])
    slot = jnp.arange(keys.shape[2], dtype=jnp.int32)[None, None, None]
    hits = upcoming[..., None] == slot  # [B, K, D + 1, S]
    until = jnp.where(hits, order[:, None], never).min(2)  # [B, K, S]
    again = upcoming[..., :, None] == upcoming[..., None, :]
    again &= (order[None, :] > order[:, None])[None, None]
    until_new = jnp.where(again, order, never).min(-1)  # [B, K, D + 1]
    depth = depths[:, None, :, None]  # [B, 1, T, 1]
    old_alive = (positions >= 0)[:, :, None] & (depth < until[:, :, None])
    by_node = jnp.broadcast_to(depths[:, None], (*until.shape[:2], depths.shape[1]))
    ends = jnp.take_along_axis(until_new, by_node, axis=2)
    new_alive = ancestors[:, None] & (depth < ends[:, :, None])
    grouped = group(query, keys.shape[1])
    old, new = logits_of(grouped, nodes.key, keys, scale, cap)
    old, new, total = softmax_over_both(
        old, new, old_alive[:, :, :, None], new_alive[:, :, :, None], sink
    )
    out = combine(old, new, nodes.value, values, positions >= 0)
    return out, total.swapaxes(1, 2).reshape(query.shape[:-1])


def _xla(query, *arguments, **options):
    return attend_part(query, *arguments, **options)[0].astype(query.dtype)


def _triton(query, *arguments, **options):
    few = nodes_triton.takes(query.shape[0], query.shape[1], query.dtype)
    run = nodes_triton.attend_nodes_triton if few else tree_attention_triton
    return run(query, *arguments, **options)


_RUNS = {"reference": _reference, "xla": _xla, "triton": _triton}
