"""One Triton kernel for a whole layer; imported at the call only: it needs Triton.

```
 0  heads     norm, product, norms of heads, rotation        a head (and part) an item
 1  attend    LongFlow's first launch; the last split of a   a row and split an item
              row joins its parts
 2  output    product, added to the stream                   a block (and part) an item
 3  gates     norm, product, gates; the next victims         a block an item
 4  down      product, added to the stream                   a block (and part) an item
```

There are as many programs as fit on the device at once. Each takes its items of a phase
in turn, and waits for all others before the next one. The items are those of the
kernels that do a phase in a launch of its own, function by function, so a layer has
the same bits either way.

A barrier is a counter in memory, found at zero and left at zero, and waiting has an
end: a program that waited in vain goes on, and the output is NaN. While they wait,
programs ask for the first weights of their next item.
"""

import triton
import triton.language as tl

from jaxkv.kernels.block_triton_body import add_tile, arrives_last, heads_tile
from jaxkv.kernels.decode_triton_body import combine_head
from jaxkv.kernels.longflow_choice_body import choose_tile
from jaxkv.kernels.longflow_triton_body import score_row
from jaxkv.kernels.project_triton_body import gated_tile

# Where counters of arrivals lie among zeros.
_BLOCKS = tl.constexpr(64)
_ROWS = tl.constexpr(2048)
_PATIENCE = tl.constexpr(1 << 18)


@triton.jit
def arrive(counters_ptr):
    """Let other programs see what this one has stored, and tell them."""
    tl.debug_barrier()
    tl.atomic_add(counters_ptr, 1, sem="acq_rel", scope="gpu")


@triton.jit
def wait_for(counters_ptr, COUNT: tl.constexpr):
    """Wait for so many arrivals, and leave a mark if that was in vain."""
    seen = tl.atomic_add(counters_ptr, 0, sem="acquire", scope="gpu")
    turns = 0
    while (seen < COUNT) & (turns < _PATIENCE):
        seen = tl.atomic_add(counters_ptr, 0, sem="acquire", scope="gpu")
        turns += 1
    tl.store(counters_ptr + 1, 1, seen < COUNT)
    tl.debug_barrier()


@triton.jit
def leave(counters_ptr, out_ptr, COUNT: tl.constexpr):
    """Leave the counters as they were found; spoil the output if a wait was in vain."""
    tl.debug_barrier()
    if tl.atomic_add(counters_ptr, 1, sem="acq_rel", scope="gpu") == COUNT - 1:
        late = tl.load(counters_ptr + 1, volatile=True)
        columns = tl.arange(0, 64)
        tl.store(out_ptr + columns, float("nan"), columns < late * 64)
        tl.store(counters_ptr, 0)
        tl.store(counters_ptr + 1, 0)


@triton.jit
def ask_for(
    weight_ptr,
    first,  # of the depth
    column,
    DEPTH: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    AHEAD: tl.constexpr,
):
    """Have some rows of a block of columns brought to the second-level cache."""
    rows = tl.minimum(first + tl.arange(0, AHEAD), DEPTH - 1).to(tl.int64)
    sectors = column + 16 * tl.arange(0, BLOCK // 16)
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1];\nmov.u32 $0, 0;",
        "=r,l",
        [weight_ptr + rows[:, None] * WIDTH + sectors[None, :]],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )


@triton.jit
def run_layer(
    x_ptr,  # [ROWS, HIDDEN]
    norm_ptr,  # [HIDDEN]
    qkv_ptr,  # [HIDDEN, HEADS + 2 KV_HEADS, 2, HALF]
    q_norm_ptr,  # [2 HALF]; not read without HEAD_NORM
    k_norm_ptr,  # [2 HALF]; likewise
    cos_ptr,  # [ROWS, HALF]
    sin_ptr,  # [ROWS, HALF]
    output_ptr,  # [HEADS 2 HALF, HIDDEN]
    mlp_norm_ptr,  # [HIDDEN]
    gate_up_ptr,  # [HIDDEN, 2, INNER]
    down_ptr,  # [INNER, HIDDEN]
    keys_ptr,  # [ROWS, KV_HEADS, SLOTS, 2 HALF], updated in place, as the next four
    values_ptr,  # [ROWS, KV_HEADS, SLOTS, 2 HALF]
    positions_ptr,  # [ROWS, KV_HEADS, SLOTS]
    norms_ptr,  # [ROWS, KV_HEADS, SLOTS]
    target_ptr,  # [ROWS, KV_HEADS]
    position_ptr,  # [ROWS]
    oldest_ptr,  # [ROWS]
    newest_ptr,  # [ROWS]
    counters_ptr,  # zeros, and left so
    # Outputs; but for the first one, nobody reads them after.
    out_ptr,  # [ROWS, HIDDEN]
    q_ptr,  # [ROWS, HEADS, 2 HALF]
    k_ptr,  # [ROWS, KV_HEADS, 2 HALF]
    v_ptr,  # [ROWS, KV_HEADS, 2 HALF]
    sums_ptr,  # [PARTS, ROWS, columns] of whatever product needs most
    squares_ptr,  # [HEADS_PARTS, HEADS + 2 KV_HEADS, ROWS]
    parts_ptr,  # [SPLITS, ROWS, HEADS, 2 HALF]
    statistic_ptr,  # [SPLITS, ROWS, HEADS]
    logits_ptr,  # [ROWS, HEADS, STRIDE]
    attended_ptr,  # [ROWS, HEADS, 2 HALF]
    middle_ptr,  # [ROWS, HIDDEN]
    inner_ptr,  # [ROWS, INNER]
    minima_ptr,  # [ROWS KV_HEADS / TARGETS, BLOCKS, 2]
    arrivals_ptr,  # [ROWS KV_HEADS / TARGETS]
    # See `triton_call.call`.
    _keys_out_ptr,
    _values_out_ptr,
    _positions_out_ptr,
    _norms_out_ptr,
    _target_out_ptr,
    PROGRAMS: tl.constexpr,
    FIRST: tl.constexpr,  # phase
    LAST: tl.constexpr,
    AHEAD: tl.constexpr,  # rows of a matrix that are asked for; 0 is none
    ROWS: tl.constexpr,
    ROW_TILE: tl.constexpr,
    ROW_TILES: tl.constexpr,
    HIDDEN: tl.constexpr,
    INNER: tl.constexpr,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HALF: tl.constexpr,
    EPS: tl.constexpr,
    HEAD_NORM: tl.constexpr,
    HEADS_PARTS: tl.constexpr,
    HEADS_DEPTH: tl.constexpr,
    HEADS_STAGES: tl.constexpr,
    OUTPUT_PARTS: tl.constexpr,
    OUTPUT_BLOCK: tl.constexpr,
    OUTPUT_DEPTH: tl.constexpr,
    OUTPUT_STAGES: tl.constexpr,
    GATES_BLOCK: tl.constexpr,
    GATES_DEPTH: tl.constexpr,
    GATES_STAGES: tl.constexpr,
    DOWN_PARTS: tl.constexpr,
    DOWN_BLOCK: tl.constexpr,
    DOWN_DEPTH: tl.constexpr,
    DOWN_STAGES: tl.constexpr,
    # Of `score_row` and `choose_tile`.
    SCALE: tl.constexpr,
    GROUP: tl.constexpr,
    SLOTS: tl.constexpr,
    SPLITS: tl.constexpr,
    SPLITS_PAD: tl.constexpr,
    BLOCK: tl.constexpr,
    ATTEND_STAGES: tl.constexpr,
    GROUP_PAD: tl.constexpr,
    PRECISION: tl.constexpr,
    SCORE: tl.constexpr,
    STRIDE: tl.constexpr,
    TARGETS: tl.constexpr,
    TARGETS_PAD: tl.constexpr,
    ROW_HEADS: tl.constexpr,  # that share the victim
    ROW_HEADS_PAD: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCKS: tl.constexpr,
    BLOCKS_PAD: tl.constexpr,
):
    """Do a layer for the new token of each row, or some phases of it."""
    ALL_HEADS: tl.constexpr = HEADS + 2 * KV_HEADS
    HEAD_DIM: tl.constexpr = 2 * HALF
    KV_ROWS: tl.constexpr = ROWS * KV_HEADS
    ALL_SLOTS: tl.constexpr = KV_ROWS * SLOTS
    OUTPUT_BLOCKS: tl.constexpr = HIDDEN // OUTPUT_BLOCK
    GATES_BLOCKS: tl.constexpr = INNER // GATES_BLOCK
    DOWN_BLOCKS: tl.constexpr = HIDDEN // DOWN_BLOCK
    program = tl.program_id(0)

    if FIRST == 0:
        item = program
        for _ in range(program, ALL_HEADS * HEADS_PARTS, PROGRAMS):
            heads_tile(
                *(item % ALL_HEADS, item // ALL_HEADS, x_ptr, norm_ptr, qkv_ptr),
                *(q_norm_ptr, k_norm_ptr, cos_ptr, sin_ptr, counters_ptr + _BLOCKS),
                *(q_ptr, k_ptr, v_ptr, sums_ptr, squares_ptr),
                *(ROWS, ROW_TILE, ROW_TILES, HIDDEN, HEADS_PARTS, HEADS_DEPTH),
                *(HEADS, KV_HEADS, HALF, EPS, HEAD_NORM, HEADS_STAGES),
            )
            item += PROGRAMS
        if LAST > 0:
            arrive(counters_ptr)
            if AHEAD > 0:
                if program < KV_ROWS * SPLITS:
                    row = (program % KV_ROWS).to(tl.int64)
                    slot = row * SLOTS + program // KV_ROWS * BLOCK
                    ask_for(keys_ptr, slot, 0, ALL_SLOTS, HEAD_DIM, HEAD_DIM, BLOCK)
                    ask_for(values_ptr, slot, 0, ALL_SLOTS, HEAD_DIM, HEAD_DIM, BLOCK)
            wait_for(counters_ptr, PROGRAMS)

    if (FIRST <= 1) & (LAST >= 1):
        item = program
        for _ in range(program, KV_ROWS * SPLITS, PROGRAMS):
            row = (item % KV_ROWS).to(tl.int64)
            split = item // KV_ROWS
            score_row(
                *(q_ptr, k_ptr, v_ptr, keys_ptr, values_ptr, positions_ptr),
                *(norms_ptr, target_ptr, position_ptr, q_ptr),
                parts_ptr if SPLITS > 1 else attended_ptr,
                *(statistic_ptr, logits_ptr + row * (GROUP * STRIDE)),
                *(row, split, KV_ROWS),
                *(SCALE, KV_HEADS, GROUP, SLOTS, HEAD_DIM, SPLITS, BLOCK, GROUP_PAD),
                *(HEAD_DIM, PRECISION, SCORE, STRIDE, False, None, ATTEND_STAGES),
            )
            is_first = (split == 0) & (row % TARGETS == 0)
            tl.store(arrivals_ptr + row // TARGETS, 0, is_first)
            if SPLITS > 1:
                if arrives_last(counters_ptr + _ROWS + row, SPLITS):
                    for head in tl.static_range(GROUP):
                        combine_head(
                            *(parts_ptr, statistic_ptr, attended_ptr),
                            *(row * GROUP + head, ROWS * HEADS),
                            *(HEAD_DIM, SPLITS, SPLITS_PAD, HEAD_DIM),
                        )
            item += PROGRAMS
        if LAST > 1:
            arrive(counters_ptr)
            if AHEAD > 0:
                ask_for(
                    output_ptr,
                    program // OUTPUT_BLOCKS * (HEADS * HEAD_DIM // OUTPUT_PARTS),
                    program % OUTPUT_BLOCKS * OUTPUT_BLOCK,
                    *(HEADS * HEAD_DIM, HIDDEN, OUTPUT_BLOCK, AHEAD),
                )
            wait_for(counters_ptr, PROGRAMS * (2 - FIRST))

    if (FIRST <= 2) & (LAST >= 2):
        item = program
        for _ in range(program, OUTPUT_BLOCKS * OUTPUT_PARTS, PROGRAMS):
            add_tile(
                *(item % OUTPUT_BLOCKS, item // OUTPUT_BLOCKS),
                *(attended_ptr, output_ptr, x_ptr, counters_ptr + _BLOCKS),
                *(middle_ptr, sums_ptr, ROWS, ROW_TILE, ROW_TILES, HEADS * HEAD_DIM),
                *(HIDDEN, OUTPUT_PARTS, False, OUTPUT_BLOCK, OUTPUT_DEPTH),
                OUTPUT_STAGES,
            )
            item += PROGRAMS
        if LAST > 2:
            arrive(counters_ptr)
            if AHEAD > 0:
                if program < GATES_BLOCKS:
                    column = program * GATES_BLOCK
                    ask_for(
                        *(gate_up_ptr, 0, column, HIDDEN, 2 * INNER, GATES_BLOCK),
                        AHEAD,
                    )
                    ask_for(
                        *(gate_up_ptr, 0, column + INNER, HIDDEN, 2 * INNER),
                        *(GATES_BLOCK, AHEAD),
                    )
            wait_for(counters_ptr, PROGRAMS * (3 - FIRST))

    if (FIRST <= 3) & (LAST >= 3):
        item = program
        for _ in range(program, GATES_BLOCKS, PROGRAMS):
            gated_tile(
                *(item, middle_ptr, mlp_norm_ptr, gate_up_ptr, inner_ptr),
                *(ROWS, ROW_TILE, ROW_TILES, HIDDEN, INNER, GATES_BLOCK, GATES_DEPTH),
                *(True, EPS, GATES_STAGES),
            )
            item += PROGRAMS
        # Nobody in this layer waits for the victims. Programs without gates come first.
        item = (program + PROGRAMS - GATES_BLOCKS % PROGRAMS) % PROGRAMS
        for _ in range(item, KV_ROWS // TARGETS * BLOCKS, PROGRAMS):
            choose_tile(
                *((item // BLOCKS).to(tl.int64), item % BLOCKS, ROWS * HEADS),
                *(logits_ptr, statistic_ptr, norms_ptr, positions_ptr, target_ptr),
                *(position_ptr, oldest_ptr, newest_ptr, arrivals_ptr, minima_ptr),
                *(ROW_HEADS, ROW_HEADS_PAD, TARGETS, TARGETS_PAD, KV_HEADS, SLOTS),
                *(STRIDE, SPLITS, SPLITS_PAD, CHUNK, BLOCKS, BLOCKS_PAD),
            )
            item += PROGRAMS
        if LAST > 3:
            arrive(counters_ptr)
            if AHEAD > 0:
                ask_for(
                    down_ptr,
                    program // DOWN_BLOCKS * (INNER // DOWN_PARTS),
                    program % DOWN_BLOCKS * DOWN_BLOCK,
                    *(INNER, HIDDEN, DOWN_BLOCK, AHEAD),
                )
            wait_for(counters_ptr, PROGRAMS * (4 - FIRST))

    if LAST == 4:
        item = program
        for _ in range(program, DOWN_BLOCKS * DOWN_PARTS, PROGRAMS):
            add_tile(
                *(item % DOWN_BLOCKS, item // DOWN_BLOCKS),
                *(inner_ptr, down_ptr, middle_ptr, counters_ptr + _BLOCKS),
                *(out_ptr, sums_ptr, ROWS, ROW_TILE, ROW_TILES, INNER),
                *(HIDDEN, DOWN_PARTS, False, DOWN_BLOCK, DOWN_DEPTH, DOWN_STAGES),
            )
            item += PROGRAMS
    if FIRST < LAST:
        leave(counters_ptr, out_ptr, PROGRAMS * (LAST - FIRST + 1))
