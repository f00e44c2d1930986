"""Trees of drafted tokens, and how an accepted path enters the cache.

A tree has `T` nodes. Node 0 is the root: the newest token, which the cache does not
hold yet. Every other node is a drafted token; parents come before their children.
Nothing of a tree is written to the cache before it is accepted, because an eviction
cannot be taken back.

Axis letters: `B` batch, `T` nodes, `D` depth of the deepest node, `K` key/value heads,
`S` slots, `H` head size.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxkv import state as kv
from jaxkv.kernels import tree_attention, tree_write
from jaxkv.kernels.cache import Nodes
from jaxkv.state import KVState

# What is known of a drafted token; `DraftTree.kinds` holds indices into this.
KINDS = ("unchecked", "aligned", "unaligned", "sampled")
UNCHECKED, ALIGNED, UNALIGNED, SAMPLED = range(4)


class DraftTree(NamedTuple):
    """One tree per row.

    Attributes:
      tokens: int32 `[B, T]`; column 0 is the newest token.
      parents: int32 `[B, T]`, less than the node's own index; 0 for the root.
      depths: int32 `[B, T]`; 0 for the root.
      valid: bool `[B, T]`; the others are padding. The root is always valid.
      kinds: int32 `[B, T]`, an index into `KINDS`: "aligned" if the token is what the
        network thought likeliest at that place of the prompt, "unaligned" if not,
        "sampled" if it is one of the network's own candidates in place of the
        prompt's token, "unchecked" if nobody has asked.
    """

    tokens: jax.Array
    parents: jax.Array
    depths: jax.Array
    valid: jax.Array
    kinds: jax.Array


class Pending(NamedTuple):
    """One layer's keys and values of a tree, on their way to the cache.

    Attributes:
      keys: `[B, T, K, H]`, rotated.
      values: `[B, T, K, H]`.
      slots: int32 `[B, K, D + 2]`, the slots of the next tokens, if they depend on
        nothing but how many tokens came before; else `[B, K, 1]`, the slot of the root.
      targets: in that case int32 `[B, K, T]`, the slot that the token after each node
        goes to; else None.
      memory: what goes into the state's memory with each node: a tree like that, with
        `[B, K, T]` for every leaf `[B, K, S]` and None for what stays as it is.
    """

    keys: jax.Array
    values: jax.Array
    slots: jax.Array
    targets: jax.Array | None = None
    memory: Any = ()

    def along(self, path: jax.Array) -> jax.Array:
        """Return the slots of a path and of the token behind it, int32 `[B, K, D + 2]`.

        Args:
          path: int32 `[B, D + 1]`, nodes from the root on.
        """
        if self.targets is None:
            return self.slots
        after = jnp.take_along_axis(self.targets, path[:, None], axis=2)
        return jnp.concatenate([self.slots, after], axis=2)


def root_only(token: jax.Array, *, nodes: int) -> DraftTree:
    """Return trees without a draft.

    Args:
      token: int32 `[B]`, the newest token.
      nodes: `T`.
    """
    shape = (token.shape[0], nodes)
    order = jnp.broadcast_to(jnp.arange(nodes, dtype=jnp.int32), shape)
    zeros = jnp.zeros(shape, jnp.int32)
    return DraftTree(
        tokens=zeros.at[:, 0].set(token),
        parents=zeros,
        depths=jnp.minimum(order, 1),
        valid=order == 0,
        kinds=zeros,
    )


def chain(tokens: jax.Array) -> DraftTree:
    """Return trees in which each of the tokens, int32 `[B, T]`, follows the last."""
    order = jnp.arange(tokens.shape[1], dtype=jnp.int32)
    order = jnp.broadcast_to(order, tokens.shape)
    return DraftTree(
        tokens=tokens,
        parents=jnp.maximum(order - 1, 0),
        depths=order,
        valid=order >= 0,
        kinds=jnp.zeros_like(order),
    )


def below_root(
    newest: jax.Array,
    *,
    tokens: jax.Array,
    parents: jax.Array,
    depths: jax.Array,
    valid: jax.Array,
    kinds: jax.Array,
) -> DraftTree:
    """Return trees of the newest token and of drafted ones below it.

    Args:
      newest: int32 `[B]`.
      tokens: int32 `[B, T - 1]`; what they and the others mean, see `DraftTree`.
      parents: int32 `[B, T - 1]`; the root is 0, the first drafted token 1.
      depths: int32 `[B, T - 1]`.
      valid: bool `[B, T - 1]`.
      kinds: int32 `[B, T - 1]`.
    """

    def below(root, nodes):
        return jnp.concatenate([root[:, None].astype(nodes.dtype), nodes], axis=1)

    zero = jnp.zeros_like(newest)
    return DraftTree(
        tokens=below(newest, tokens),
        parents=below(zero, parents),
        depths=below(zero, depths),
        valid=below(zero == 0, valid),
        kinds=below(zero, kinds),
    )


def ancestors(tree: DraftTree, *, depth: int) -> jax.Array:
    """Return bool `[B, T, T]`: at `[b, t, u]`, whether `u` is `t` or above it.

    Args:
      tree: no deeper than `depth`.
      depth: static; the reach is doubled until it covers it.
    """
    nodes = jnp.arange(tree.tokens.shape[1], dtype=jnp.int32)
    above = tree.parents[:, :, None] == nodes[None, None]
    above |= (nodes[:, None] == nodes[None])[None]
    reach = 1
    while reach < depth:
        counts = jnp.einsum(
            "btu,buv->btv", above.astype(jnp.float32), above.astype(jnp.float32)
        )
        above, reach = counts > 0, 2 * reach
    return above


def path_to(
    node: jax.Array, tree: DraftTree, above: jax.Array, *, depth: int
) -> jax.Array:
    """Return the nodes from the root to `node`, int32 `[B, D + 1]`, by their depth.

    Args:
      node: int32 `[B]`.
      tree: the trees.
      above: bool `[B, T, T]`, from `ancestors`.
      depth: `D`, static.

    Returns:
      The path; beyond the depth of `node` it holds 0.
    """
    on_path = jnp.take_along_axis(above, node[:, None, None], axis=1)  # [B, 1, T]
    order = jnp.arange(depth + 1, dtype=jnp.int32)
    at_depth = tree.depths[:, None] == order[None, :, None]
    return jnp.argmax(on_path & at_depth, axis=-1).astype(jnp.int32)


def commit(
    state: KVState,
    pending: Pending,
    path: jax.Array,
    count: jax.Array,
    position: jax.Array,
    *,
    implementation: tree_attention.Implementation | None = None,
) -> KVState:
    """Write accepted tokens as plain decoding would have written them one by one.

    Args:
      state: of one layer, as it was when the tree was attended from.
      pending: what that attention has left.
      path: int32 `[B, D + 1]`, nodes from the root on.
      count: int32 `[B]`, how many of them to write; 0 leaves a row as it is.
      position: int32 `[B]`, of the root.
      implementation: of `tree_write.write_path`.

    Returns:
      The state after `count` tokens, `target` included.
    """
    slots = pending.along(path)
    written = tree_write.write_path(
        Nodes(pending.keys, pending.values, position),
        kv.to_slots(state),
        path,
        slots,
        count,
        implementation=implementation,
    )
    memory = state.memory
    if pending.memory:
        memory = _remember(pending.memory, memory, slots[..., :-1], path, count)
    return kv.from_slots(written, state, memory)


def _remember(new, memory, slots, path, count):
    """Put what the nodes of a path bring into the slots `[B, K, D + 1]` they go to."""

    def put(x, held):
        if x is None:
            return held
        place = tree_write.last_writes(slots, count, held.shape[2])
        x = jnp.take_along_axis(x, path[:, None], axis=2)
        return held.at[place].set(x, mode="drop", unique_indices=True)

    return jax.tree.map(put, new, memory, is_leaf=lambda x: x is None)
