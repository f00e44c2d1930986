"""Rows that share slots, for tests of `shared_slots` and of its kernels."""

import jax.numpy as jnp
import numpy as np

from jaxkv import trees
from jaxkv.kernels.cache import SharedSlots
from jaxkv.trees import DraftTree

ABOUT = {"one document": [0, 0, 0, 0], "three": [2, 0, 2, 1]}
NODES, DEPTH, OWN, LONG = 3, 2, 5, 37
TOLERANCE = {"float32": 2e-6, "bfloat16": 2e-2, "float16": 3e-3}


def make_inputs(heads, kv_heads, about, *, nodes=None, dtype="float32", head_dim=16):
    """Ragged documents and rows, whose free slots hold NaN; one row has none yet."""
    rng = np.random.default_rng(0)

    def draw(*shape):
        return jnp.asarray(rng.standard_normal(shape), dtype)

    def slots(batch, count, lengths):
        lengths = np.asarray(lengths)[:, None, None]
        lengths = np.maximum(lengths - np.arange(kv_heads)[None, :, None], 0)
        order = np.broadcast_to(np.arange(count), (batch, kv_heads, count))
        positions = np.where(order < lengths, order, -1).astype(np.int32)
        nan = jnp.asarray(np.where(positions < 0, np.nan, 0)[..., None], dtype)
        keys, values = (draw(batch, kv_heads, count, head_dim) + nan for _ in "kv")
        return keys, values, jnp.asarray(positions), lengths[..., 0]

    batch, documents = len(about), max(about) + 1
    new = (batch,) if nodes is None else (batch, nodes)
    shared = slots(documents, LONG, [LONG, 9, 1][:documents])[:3]
    keys, values, positions, lengths = slots(batch, OWN, [2, 0, 1, 2])
    return dict(
        query=draw(*new, heads, head_dim),
        key=draw(*new, kv_heads, head_dim),
        value=draw(*new, kv_heads, head_dim),
        position=jnp.asarray([2, 0, -1, 2], jnp.int32),
        keys=keys,
        values=values,
        positions=positions,
        target=jnp.asarray(lengths, jnp.int32),
        shared=SharedSlots(*shared, jnp.asarray(about, jnp.int32)),
    )


def make_tree(heads, kv_heads, about, **options):
    inputs = make_inputs(heads, kv_heads, about, nodes=NODES, **options)
    parents = jnp.asarray([[0, 0, 1], [0, 0, 0]] * 2, jnp.int32)
    depths = jnp.asarray([[0, 1, 2], [0, 1, 1]] * 2, jnp.int32)
    drafts = DraftTree(depths, parents, depths, depths >= 0, depths)
    steps = jnp.arange(DEPTH + 1, dtype=jnp.int32)[None, None]
    return inputs | dict(
        upcoming=inputs["target"][..., None] + steps,
        depths=depths,
        ancestors=trees.ancestors(drafts, depth=DEPTH),
    )
