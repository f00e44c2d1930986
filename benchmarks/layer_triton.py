"""A whole layer for one new token a row in one launch, on NVIDIA GPUs, in Triton.

From stream to stream, LongFlow's step over the cache included. `layer_triton_body` has
the picture: phases are parted by barriers in memory, so all programs must be on the
device at once, and there are never more of them than fit.

Axis letters: `B` rows, `D` hidden, `N` query heads, `K` key/value heads, `H` head size,
`F` columns of the feed-forward, `S` slots, `R` half a head.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxkv.kernels import longflow_triton, project_triton, triton_call
from jaxkv.kernels.cache import Slots
from jaxkv.kernels.project_triton import Tiles, padded
from jaxkv.kernels.scores import ProductScore
from jaxkv.kernels.triton_call import num_processors, shared_memory

PHASES = "heads", "attend", "output", "gates", "down"

_UNIT = 64
_FEW = 90  # programs that read as fast as the memory can
_NARROW = 1024  # columns that are cut finely


class Weights(NamedTuple):
    """The matrices and norms of a layer.

    Attributes:
      norm: `[D]`, of what the heads read.
      qkv: `[D, (N + 2 K) H]`, of queries, keys and values.
      q_norm: `[H]`, of each query's head, or None, and so is the next.
      k_norm: of each key's.
      output: `[N H, D]`, from the heads to the stream.
      mlp_norm: `[D]`, of what the gates read.
      gate_up: `[D, 2 F]`, of the gates and of what they gate.
      down: `[F, D]`, from the feed-forward to the stream.
    """

    norm: jax.Array
    qkv: jax.Array
    q_norm: jax.Array | None
    k_norm: jax.Array | None
    output: jax.Array
    mlp_norm: jax.Array
    gate_up: jax.Array
    down: jax.Array


@dataclasses.dataclass(frozen=True, kw_only=True)
class LayerTiles:
    """How the work of a layer is cut.

    Attributes:
      programs: all of which must be on the device at once.
      warps: of each.
      ahead: rows of a matrix that a program asks for while it waits, a power of two, or
        0 for none.
      heads: parts, depth and stages of the first product.
      attend: of the cache.
      output: of the second.
      gates: of the third; in one part.
      down: of the last.
    """

    programs: int
    warps: int
    ahead: int
    heads: Tiles
    attend: longflow_triton.Tiles
    output: Tiles
    gates: Tiles
    down: Tiles


def choose_tiles(
    rows: int,
    hidden: int,
    inner: int,
    heads: int,
    kv_heads: int,
    head_dim: int,
    slots: int,
    *,
    per_processor: int = 1,
    warps: int | None = None,
    ahead: int = 0,
    num_sms: int = 132,
    shared: int = 232_448,
) -> LayerTiles:
    """Return tiles that give every processor something to do in every phase.

    A program's time in a phase is that of the depth which it walks down, a product of
    the tensor cores after the other. So depths are shared out, but for the gates'.

    Args:
      rows: tokens; of products, only how far programs fetch ahead depends on them.
      hidden: `D`.
      inner: `F`.
      heads: `N`.
      kv_heads: `K`.
      head_dim: `H`.
      slots: `S`.
      per_processor: programs; registers and shared memory must be there for them.
      warps: of a program; None takes as few as have the registers.
      ahead: see `LayerTiles`.
      num_sms: of the device.
      shared: bytes of shared memory of a processor.
    """
    programs = per_processor * num_sms
    warps = warps or (4 if hidden <= _NARROW else 8)
    room = shared // per_processor - 8192

    def product(depth, columns, block):
        most = max(1, programs // (columns // block))
        parts = next(n for n in range(min(4, most), 0, -1) if depth % (n * _UNIT) == 0)
        return product_tiles(rows, depth, block, parts, warps, room)

    block = min(64, max(16, 8192 // head_dim))
    num_tiles = -(-slots // block)
    turns = -(-num_tiles * rows * kv_heads // programs)
    splits = max(1, -(-num_tiles // turns))
    stages = max(2, min(5, room // (4 * block * head_dim)))
    all_heads = heads + 2 * kv_heads
    of_stream = 16 if hidden <= _NARROW else _UNIT
    of_gates = next(b for b in (64, 32, 16) if inner // b >= _FEW or b == 16)
    return LayerTiles(
        programs=programs,
        warps=warps,
        ahead=ahead,
        heads=product(hidden, all_heads * head_dim, head_dim),
        attend=longflow_triton.Tiles(
            splits=splits, block=block, warps=warps, stages=stages, chunk=2048
        ),
        output=product(heads * head_dim, hidden, of_stream),
        gates=product_tiles(rows, hidden, of_gates, 1, warps, room, wide=2),
        down=product(inner, hidden, of_stream),
    )


def product_tiles(
    rows: int,
    depth: int,
    block: int,
    parts: int,
    warps: int,
    room: int,
    *,
    wide: int = 1,
) -> Tiles:
    """Return tiles that fetch much at once, of blocks and parts that were chosen.

    Args:
      rows: tokens.
      depth: of the matrix.
      block: columns of a tile.
      parts: in which the depth is shared out.
      warps: of a program.
      room: bytes of shared memory.
      wide: tiles of the matrix that are fetched together: 2 for gates.
    """
    sizes = [size for size in (256, 128, 64) if depth // parts % size == 0]
    row = 2 * (wide * block + padded(rows))
    most = min(2**15 // (2 * wide * block), room // (4 * row))
    tile = next((size for size in sizes if size <= most), _UNIT)
    stage = tile * row
    stages = max(2, min(8, room // stage))
    return Tiles(parts=parts, block=block, depth=tile, warps=warps, stages=stages)


def run_layer_triton(
    x: jax.Array,
    weights: Weights,
    cos: jax.Array,
    sin: jax.Array,
    slots: Slots,
    position: jax.Array,
    oldest: jax.Array,
    newest: jax.Array,
    *,
    num_heads: int,
    eps: float,
    scale: float,
    score: ProductScore = "l1",
    shared: bool = True,
    tiles: LayerTiles | None = None,
    last: int = len(PHASES) - 1,
) -> tuple[jax.Array, Slots]:
    """Do a layer whose attention is `longflow.longflow_attention`.

    The slots are updated in place where XLA lets them be.

    Args:
      x: `[B, 1, D]`, the residual stream, bfloat16.
      weights: of the layer.
      cos: float32 `[B, 1, R]` of `rotary.table`.
      sin: likewise.
      slots: of the cache, with norms.
      position: int32 `[B]` of the token; -1 for a finished row.
      oldest: as in `longflow_attention`, and so are `newest`, `score` and `shared`.
      newest: see there.
      num_heads: `N`.
      eps: of all norms.
      scale: factor on the logits.
      score: see `longflow_attention`.
      shared: likewise.
      tiles: how to cut the work; None chooses by shape and device.
      last: phase after which to stop, for measurements; the results then mean nothing.

    Returns:
      The residual stream, and the slots.
    """
    import layer_triton_body as body

    rows, _, hidden = x.shape
    inner = weights.down.shape[0]
    _, kv_heads, num_slots, head_dim = slots.keys.shape
    tiles = tiles or choose_tiles(
        *(rows, hidden, inner, num_heads, kv_heads, head_dim, num_slots),
        num_sms=num_processors(),
        shared=shared_memory(),
    )
    sizes = rows, hidden, inner, num_heads, kv_heads, head_dim, num_slots
    constants = layer_constants(
        *(*sizes, eps, scale, score, shared, tiles),
        head_norm=weights.q_norm is not None,
    )
    w = weights
    q_norm, k_norm = (w.norm if n is None else n for n in (w.q_norm, w.k_norm))
    norms: Any = slots.norms
    cache = slots.keys, slots.values, slots.positions, norms, slots.target
    arrays = (
        *(x, w.norm, w.qkv, q_norm, k_norm, cos, sin),
        *(w.output, w.mlp_norm, w.gate_up, w.down),
        *(*cache, position, oldest, newest, jnp.zeros(4096, jnp.int32)),
    )
    scratch = scratch_of(*sizes, constants, tiles, x.dtype)
    outputs = (*scratch, *(jax.ShapeDtypeStruct(a.shape, a.dtype) for a in cache))
    first = 11  # of the cache among the arrays
    out, *found = triton_call.call(
        body.run_layer,
        arrays,
        outputs,
        aliases={first + i: len(scratch) + i for i in range(len(cache))},
        grid=(tiles.programs,),
        num_warps=tiles.warps,
        num_stages=2,
        FIRST=0,
        LAST=last,
        **constants,
    )
    keys, values, positions, norms, target = found[-len(cache) :]
    return out, Slots(keys, values, positions, target, norms)


def scratch_of(
    rows, hidden, inner, heads, kv_heads, head_dim, slots, constants, tiles, dtype
) -> tuple[jax.ShapeDtypeStruct, ...]:
    """Return the outputs of `run_layer` beside the cache; only the first is read."""
    all_heads = heads + 2 * kv_heads
    parts = tiles.heads.parts, tiles.output.parts, tiles.down.parts
    widths = all_heads * head_dim, hidden, hidden
    most = max(p * w for p, w in zip(parts, widths, strict=True))
    splits, row_groups = tiles.attend.splits, rows * kv_heads // constants["TARGETS"]
    short = [
        (rows, 1, hidden),
        *[(rows, n, head_dim) for n in (heads, kv_heads, kv_heads)],
    ]
    floats = [
        (rows * most,),
        (parts[0], all_heads, rows),
        (splits, rows, heads, head_dim),
        (splits, rows, heads),
        (rows, heads, constants["STRIDE"]),
    ]
    more = [(rows, heads, head_dim), (rows, hidden), (rows, inner)]
    integers = [(row_groups, constants["BLOCKS"], 2), (row_groups,)]
    return tuple(
        jax.ShapeDtypeStruct(shape, kind)
        for kind, shapes in (
            (dtype, short),
            (jnp.float32, floats),
            (dtype, more),
            (jnp.int32, integers),
        )
        for shape in shapes
    )


def layer_constants(
    rows: int,
    hidden: int,
    inner: int,
    heads: int,
    kv_heads: int,
    head_dim: int,
    slots: int,
    eps: float,
    scale: float,
    score: ProductScore,
    shared: bool,
    tiles: LayerTiles,
    *,
    head_norm: bool,
) -> dict[str, Any]:
    """Return the compile-time arguments of `run_layer`, but for its phases."""
    sizes = heads, kv_heads, slots, head_dim
    first = longflow_triton.score_constants(
        *(*sizes, jnp.bfloat16, scale, score, shared, tiles.attend, rows)
    )
    second = longflow_triton.choose_constants(*sizes, shared, tiles.attend)
    named = (
        *("SCALE", "GROUP", "SLOTS", "SPLITS", "BLOCK", "GROUP_PAD", "PRECISION"),
        *("SCORE", "STRIDE", "TARGETS", "TARGETS_PAD", "CHUNK", "BLOCKS"),
        *("BLOCKS_PAD", "SPLITS_PAD"),
    )
    both = second | first
    of_rows = project_triton.constants(rows, hidden, inner, tiles.gates)
    return {name: both[name] for name in named} | dict(
        PROGRAMS=tiles.programs,
        AHEAD=tiles.ahead,
        **{name: of_rows[name] for name in ("ROWS", "ROW_TILE", "ROW_TILES")},
        HIDDEN=hidden,
        INNER=inner,
        HEADS=heads,
        KV_HEADS=kv_heads,
        HALF=head_dim // 2,
        EPS=eps,
        HEAD_NORM=head_norm,
        HEADS_PARTS=tiles.heads.parts,
        HEADS_DEPTH=tiles.heads.depth,
        HEADS_STAGES=tiles.heads.stages,
        OUTPUT_PARTS=tiles.output.parts,
        OUTPUT_BLOCK=tiles.output.block,
        OUTPUT_DEPTH=tiles.output.depth,
        OUTPUT_STAGES=tiles.output.stages,
        GATES_BLOCK=tiles.gates.block,
        GATES_DEPTH=tiles.gates.depth,
        GATES_STAGES=tiles.gates.stages,
        DOWN_PARTS=tiles.down.parts,
        DOWN_BLOCK=tiles.down.block,
        DOWN_DEPTH=tiles.down.depth,
        DOWN_STAGES=tiles.down.stages,
        ATTEND_STAGES=tiles.attend.stages,
        ROW_HEADS=second["HEADS"],
        ROW_HEADS_PAD=second["HEADS_PAD"],
    )
