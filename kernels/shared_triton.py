"""Attention over shared slots and each row's own on NVIDIA GPUs, through jax-triton.

Three launches: one over the documents, in shares of their slots, one over the rows' own
slots, which is that of `decode_triton`, `nodes_triton` or `tree_triton`, and a small
one that joins all parts. `shared_triton_body` has the picture.

For up to 64 tokens the order of every sum is chosen from the slots and the heads alone.
So a row has the same bits whatever rows are beside it, and so do drafts.

No vmap and no derivatives: the batch is an explicit axis, and decoding has no backward.

Axis letters: `B` batch, `T` nodes, `N` query heads, `K` key/value heads, `H` head size,
`D` documents, `P` slots of a document, `R` rows of the document with the most of them.
"""

import dataclasses
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxkv.kernels import decode_triton, nodes_triton, tree_triton, triton_call
from jaxkv.kernels.cache import Nodes, SharedSlots, Slots, Token
from jaxkv.kernels.decode_triton import NEWEST
from jaxkv.kernels.triton_call import next_power_of_2, num_processors

_MOST_SPLITS = 32  # each leaves an output of every row, to be read once more


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tiles:
    """How the work of one call is cut.

    Attributes:
      rows: rows of a block, a power of two; a row is one query head of one token.
      splits: programs per document, key/value head and block of rows.
      block: slots per tile, a power of two.
      warps: warps per program.
      stages: depth of the software pipeline.
    """

    rows: int
    splits: int
    block: int
    warps: int
    stages: int


class Sizes(NamedTuple):
    """What tiles and constants are chosen from; the letters are those of the module."""

    batch: int
    nodes: int
    heads: int
    kv_heads: int
    documents: int
    most: int
    slots: int
    head_dim: int

    @classmethod
    def of(cls, query: Any, shared: Any, most: int) -> "Sizes":
        """Return those of queries `[B, T, N, H]` and shared slots."""
        documents, kv_heads, slots, head_dim = shared.keys.shape
        batch, nodes, heads, _ = query.shape
        return cls(batch, nodes, heads, kv_heads, documents, most, slots, head_dim)


def choose_tiles(
    sizes: Sizes, dtype: jax.typing.DTypeLike, num_sms: int = 132
) -> Tiles:
    """Return tiles for a device of `num_sms` processors.

    Up to `NEWEST` tokens have the tiles that each has alone: a block of 64 rows, which
    are more than a few tokens have, but reading a tile takes longer than multiplying it
    with all of them. With more tokens there are as many splits as give every processor
    a program. Registers bound rows x (block + head size) of float32.
    """
    wide = jnp.dtype(dtype).itemsize == 4  # no tensor cores: products from registers
    rows = 16 if wide else 64
    block = max(16, min(16 if wide else 32, next_power_of_2(sizes.slots)))
    programs = sizes.kv_heads
    many = sizes.batch * sizes.nodes > NEWEST
    if many:
        per_document = sizes.most * sizes.nodes * sizes.heads // sizes.kv_heads
        programs *= sizes.documents * -(-per_document // rows)
    splits = min(_MOST_SPLITS, num_sms // programs, -(-sizes.slots // block) // 4)
    return Tiles(
        rows=rows,
        splits=max(1, splits),
        block=block,
        warps=8 if wide or many or sizes.head_dim > 128 else 4,
        stages=2 if wide or sizes.head_dim > 128 else 3,
    )


def attend_from_token_triton(
    query: jax.Array,
    token: Token,
    slots: Slots,
    shared: SharedSlots,
    rows: jax.Array,
    sink: jax.Array | None = None,
    *,
    scale: float,
    cap: float | None = None,
    tiles: Tiles | None = None,
    own_tiles: decode_triton.Tiles | None = None,
) -> tuple[jax.Array, Slots]:
    """Do `shared_slots.attend_from_token`, whose arguments these are.

    Args:
      query: `[B, N, H]`.
      token: the new one.
      slots: of each row alone.
      shared: of the documents.
      rows: int32 `[D, R]`, of each document; `B` where it has no more.
      sink: `[N]`, or None.
      scale: factor on the logits.
      cap: bound of the logits, or None.
      tiles: of the documents; None chooses by shape and device.
      own_tiles: of the rows' own slots; likewise.

    Returns:
      The output `[B, N, H]` and the slots.
    """
    how: dict[str, Any] = dict(scale=scale, cap=cap)
    out, total, slots = decode_triton.attend_parts(
        *(query, token, slots, sink), **how, tiles=own_tiles, dtype=jnp.float32
    )
    theirs = attend_documents(query[:, None], shared, rows, **how, tiles=tiles)
    parts, statistic = (x.squeeze(2) for x in theirs)
    return join(out, total, parts, statistic, query), slots


def attend_from_tree_triton(
    query: jax.Array,
    nodes: Nodes,
    slots: Slots,
    shared: SharedSlots,
    upcoming: jax.Array,
    depths: jax.Array,
    ancestors: jax.Array,
    rows: jax.Array,
    sink: jax.Array | None = None,
    *,
    scale: float,
    cap: float | None = None,
    tiles: Tiles | None = None,
    own_tiles: Any = None,
) -> jax.Array:
    """Do `shared_slots.attend_from_tree`, whose arguments these are.

    Args:
      query: `[B, T, N, H]`.
      nodes: of the tree.
      slots: of each row alone.
      shared: of the documents.
      upcoming: int32 `[B, K, D + 1]`.
      depths: int32 `[B, T]`.
      ancestors: bool `[B, T, T]`.
      rows: see `attend_from_token_triton`.
      sink: `[N]`, or None.
      scale: factor on the logits.
      cap: bound of the logits, or None.
      tiles: of the documents; None chooses by shape and device.
      own_tiles: of the rows' own slots; likewise.

    Returns:
      `[B, T, N, H]`.
    """
    how: dict[str, Any] = dict(scale=scale, cap=cap)
    few = nodes_triton.takes(query.shape[0], query.shape[1], query.dtype)
    attend = (nodes_triton if few else tree_triton).attend_parts
    out, total = attend(
        *(query, nodes, slots, upcoming, depths, ancestors, sink),
        **how,
        tiles=own_tiles,
        dtype=jnp.float32,
    )
    parts, statistic = attend_documents(query, shared, rows, **how, tiles=tiles)
    return join(out, total, parts, statistic, query)


def attend_documents(
    query: jax.Array,
    shared: SharedSlots,
    rows: jax.Array,
    *,
    scale: float,
    cap: float | None = None,
    tiles: Tiles | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Attend to the documents alone.

    Args:
      query: `[B, T, N, H]`.
      shared: of the documents.
      rows: see `attend_from_token_triton`.
      scale: factor on the logits.
      cap: bound of the logits, or None.
      tiles: how to cut the work; None chooses by shape and device.

    Returns:
      What the splits have left, float32 `[splits, B, T, N, H]`, and what each is worth,
      float32 `[splits, B, T, N]`; see `join`.
    """
    from jaxkv.kernels import shared_triton_body as body

    sizes = Sizes.of(query, shared, rows.shape[1])
    tiles = tiles or choose_tiles(sizes, shared.keys.dtype, num_processors())
    constants = attend_constants(sizes, shared.keys.dtype, scale, tiles, cap)
    group_rows = sizes.most * sizes.nodes * constants["GROUP"]
    blocks = -(-group_rows // tiles.rows)
    shape = (tiles.splits, *query.shape)
    return triton_call.call(
        body.attend_documents,
        (query, *shared[:3], rows),
        (
            jax.ShapeDtypeStruct(shape, jnp.float32),
            jax.ShapeDtypeStruct(shape[:-1], jnp.float32),
        ),
        aliases={},
        grid=(sizes.documents * sizes.kv_heads * blocks, tiles.splits),
        num_warps=tiles.warps,
        num_stages=tiles.stages,
        **constants,
    )


def join(
    own: jax.Array,
    own_statistic: jax.Array,
    shared: jax.Array,
    shared_statistic: jax.Array,
    query: jax.Array,
) -> jax.Array:
    """Join what the splits over own and over shared slots have left.

    Args:
      own: float32 `[splits, ..., N, H]`.
      own_statistic: float32 `[splits, ..., N]`.
      shared: as `own`, of as many splits as it has.
      shared_statistic: likewise.
      query: `[..., N, H]`, for the shape and dtype of the output.

    Returns:
      The output `[..., N, H]`.
    """
    from jaxkv.kernels.shared_triton_body import join_parts

    constants = join_constants(query.shape[-1], len(own), len(shared))
    numbers = (constants["OWN_PAD"] + constants["SHARED_PAD"]) * constants["HEAD_PAD"]
    (out,) = triton_call.call(
        join_parts,
        (own, own_statistic, shared, shared_statistic),
        (jax.ShapeDtypeStruct(query.shape, query.dtype),),
        aliases={},
        grid=(math.prod(query.shape[:-1]),),
        num_warps=min(4, max(1, numbers // 512)),  # as `combine_warps`
        num_stages=1,
        **constants,
    )
    return out


def attend_constants(
    sizes: Sizes,
    dtype: jax.typing.DTypeLike,
    scale: float,
    tiles: Tiles,
    cap: float | None = None,
) -> dict[str, Any]:
    """Return the compile-time arguments of `attend_documents`."""
    return dict(
        SCALE=float(scale) * math.log2(math.e),
        BATCH=sizes.batch,
        NODES=sizes.nodes,
        KV_HEADS=sizes.kv_heads,
        GROUP=sizes.heads // sizes.kv_heads,
        MOST=sizes.most,
        SLOTS=sizes.slots,
        HEAD_DIM=sizes.head_dim,
        SPLITS=tiles.splits,
        BLOCK=tiles.block,
        ROWS=tiles.rows,
        HEAD_PAD=max(16, next_power_of_2(sizes.head_dim)),  # what tensor cores take
        PRECISION="ieee" if jnp.dtype(dtype) == jnp.float32 else "tf32",
        CAP=triton_call.weighing(None, cap)["CAP"],
    )


def join_constants(head_dim: int, own: int, shared: int) -> dict[str, int]:
    """Return the compile-time arguments of `join_parts`, of so many splits."""
    return dict(
        HEAD_DIM=head_dim,
        OWN=own,
        SHARED=shared,
        OWN_PAD=next_power_of_2(own),
        SHARED_PAD=next_power_of_2(shared),
        HEAD_PAD=next_power_of_2(head_dim),
    )
