"""Triton kernels of `experts_triton`; imported at the call only: it needs Triton.

```
choices     0   1   2   3   4   5   6   7     of 4 tokens, 2 each
experts     5   2   2   7   5   0   2   5
            |   |       |       |
programs of 0   1       3       5             the first choice of an expert does it all
multiply 0,4,7  1,2,6   3       5             rows of one product, 16 at a time
```

A program has one expert and a block of its columns. It looks among all choices for the
tokens that chose the expert, and goes down its matrix with them, a tile of weights at a
time. So each weight is read once, nothing is sorted, and nobody waits for another.
Where there are more choices than experts, a program is an expert's instead, and those
that nobody chose have nothing to do.

The tensor cores are given 16 tokens at a time, wherever among them a token stands. So
its numbers are the same sums in the same order, whoever else is there.
"""

import triton
import triton.language as tl

ROW_TILE = tl.constexpr(16)


@triton.jit
def find_expert(
    experts_ptr,
    TOKENS: tl.constexpr,
    TOKENS_PAD: tl.constexpr,
    PER_TOKEN: tl.constexpr,
    PER_TOKEN_PAD: tl.constexpr,
    EXPERTS: tl.constexpr,
    BY_EXPERT: tl.constexpr,
):
    """Return a program's expert and how many tokens it has to multiply.

    Also returns, of each token `[TOKENS_PAD]`, which choice is the expert's, and its
    rank among the tokens that have one, -1 for others.
    """
    which = tl.program_id(1)
    tokens = tl.arange(0, TOKENS_PAD)
    places = tl.arange(0, PER_TOKEN_PAD)
    index = tokens[:, None] * PER_TOKEN + places[None, :]
    real = (tokens < TOKENS)[:, None] & (places < PER_TOKEN)[None, :]
    chosen = tl.load(experts_ptr + index, real, other=-1)
    expert = which
    if not BY_EXPERT:
        expert = tl.load(experts_ptr + which)
    choice = tl.max(tl.where(chosen == expert, index, -1), 1)
    mine = choice >= 0
    number = tl.sum(mine.to(tl.int32), 0)
    if not BY_EXPERT:
        # The first choice of an expert that is on this device.
        first = tl.min(tl.where(mine, choice, TOKENS * PER_TOKEN), 0)
        number = tl.where((first == which) & (expert < EXPERTS), number, 0)
    rank = tl.where(mine, tl.cumsum(mine.to(tl.int32), 0) - 1, -1)
    return expert.to(tl.int64), number, choice, rank


@triton.jit
def find_rows(choice, rank, first, number):
    """Return which choices are the rows of a product, and which rows are real."""
    rows = first + tl.arange(0, ROW_TILE)
    here = rank[None, :] == rows[:, None]
    return tl.sum(tl.where(here, choice[None, :], 0), 1), rows < number


@triton.jit
def load_rows(ptr, real, depth, start, DEPTH: tl.constexpr, BLOCK_DEPTH: tl.constexpr):
    """Load a tile of rows, zeros where they are not real and beyond their end."""
    if DEPTH % BLOCK_DEPTH:
        mask = real[:, None] & (depth < DEPTH - start)[None, :]
    else:
        mask = real[:, None]
    return tl.load(ptr + start, mask, other=0.0)


@triton.jit
def load_weights(
    ptr,
    depth,
    start,
    columns,
    DEPTH: tl.constexpr,
    BLOCK_DEPTH: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Load a tile of weights, zeros beyond the end of the matrix."""
    if DEPTH % BLOCK_DEPTH:
        mask = (depth < DEPTH - start)[:, None] & (columns < COLUMNS)[None, :]
        tile = tl.load(ptr, mask, other=0.0)
    elif COLUMNS % BLOCK:
        tile = tl.load(ptr, (columns < COLUMNS)[None, :], other=0.0)
    else:
        tile = tl.load(ptr)
    return tile


@triton.jit
def add_bias(total, ptr, columns, COLUMNS: tl.constexpr):
    """Add a bias to each row, in float32."""
    bias = tl.load(ptr + columns, columns < COLUMNS, other=0.0)
    return total + bias.to(tl.float32)[None, :]


@triton.jit
def apply_gate(gate, up, ALPHA: tl.constexpr, LIMIT: tl.constexpr, SHIFT: tl.constexpr):
    """Do `experts.Gate`; NaN stays NaN."""
    gate = tl.minimum(gate, LIMIT, propagate_nan=tl.PropagateNan.ALL)
    up = tl.minimum(up, LIMIT, propagate_nan=tl.PropagateNan.ALL)
    up = tl.maximum(up, -LIMIT, propagate_nan=tl.PropagateNan.ALL)
    return gate / (1 + tl.exp(-ALPHA * gate)) * (up + SHIFT)


@triton.jit
def store_rows(ptr, tile, choice, real, columns, COLUMNS: tl.constexpr):
    """Store the rows of a product, each at its choice."""
    mask = real[:, None] & (columns < COLUMNS)[None, :]
    at = choice[:, None] * COLUMNS + columns[None, :]
    tl.store(ptr + at, tile.to(ptr.dtype.element_ty), mask)


@triton.jit
def experts_gated(
    x_ptr,  # [TOKENS, DEPTH]
    experts_ptr,  # [TOKENS, PER_TOKEN]
    weight_ptr,  # [EXPERTS, DEPTH, 2, COLUMNS]: gate, up
    bias_ptr,  # [EXPERTS, 2, COLUMNS]; not read unless BIASED
    out_ptr,  # [TOKENS, PER_TOKEN, COLUMNS], output
    TOKENS: tl.constexpr,
    TOKENS_PAD: tl.constexpr,
    PER_TOKEN: tl.constexpr,
    PER_TOKEN_PAD: tl.constexpr,
    EXPERTS: tl.constexpr,
    BY_EXPERT: tl.constexpr,
    DEPTH: tl.constexpr,
    COLUMNS: tl.constexpr,
    BIASED: tl.constexpr,
    ALPHA: tl.constexpr,
    LIMIT: tl.constexpr,
    SHIFT: tl.constexpr,
    BLOCK: tl.constexpr,  # columns of a tile
    BLOCK_DEPTH: tl.constexpr,
):
    """Multiply an expert's tokens by a block of its gates and of what they gate."""
    expert, number, choices, rank = find_expert(
        experts_ptr,
        TOKENS,
        TOKENS_PAD,
        PER_TOKEN,
        PER_TOKEN_PAD,
        EXPERTS,
        BY_EXPERT,
    )
    columns = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    depth = tl.arange(0, BLOCK_DEPTH)
    weight_ptr += expert * (DEPTH * 2 * COLUMNS)
    weight_ptr += depth[:, None] * (2 * COLUMNS) + columns[None, :]
    bias_ptr += expert * (2 * COLUMNS)
    for first in range(0, number, ROW_TILE):
        choice, real = find_rows(choices, rank, first, number)
        x_at = x_ptr + (choice // PER_TOKEN)[:, None] * DEPTH + depth[None, :]
        weight_at = weight_ptr
        gate = tl.zeros([ROW_TILE, BLOCK], tl.float32)
        up = tl.zeros([ROW_TILE, BLOCK], tl.float32)
        for start in range(0, DEPTH, BLOCK_DEPTH):
            x = load_rows(x_at, real, depth, start, DEPTH, BLOCK_DEPTH)
            of_gate = load_weights(
                weight_at, depth, start, columns, DEPTH, BLOCK_DEPTH, COLUMNS, BLOCK
            )
            gate = tl.dot(x, of_gate, gate)
            of_up = load_weights(
                weight_at + COLUMNS,
                depth,
                start,
                columns,
                DEPTH,
                BLOCK_DEPTH,
                COLUMNS,
                BLOCK,
            )
            up = tl.dot(x, of_up, up)
            weight_at += BLOCK_DEPTH * 2 * COLUMNS
        if BIASED:
            gate = add_bias(gate, bias_ptr, columns, COLUMNS)
            up = add_bias(up, bias_ptr + COLUMNS, columns, COLUMNS)
        inner = apply_gate(gate, up, ALPHA, LIMIT, SHIFT)
        store_rows(out_ptr, inner, choice, real, columns, COLUMNS)


@triton.jit
def experts_down(
    x_ptr,  # [TOKENS, PER_TOKEN, DEPTH]
    experts_ptr,  # [TOKENS, PER_TOKEN]
    weight_ptr,  # [EXPERTS, DEPTH, COLUMNS]
    bias_ptr,  # [EXPERTS, COLUMNS]; not read unless BIASED
    out_ptr,  # [TOKENS, PER_TOKEN, COLUMNS], output
    TOKENS: tl.constexpr,
    TOKENS_PAD: tl.constexpr,
    PER_TOKEN: tl.constexpr,
    PER_TOKEN_PAD: tl.constexpr,
    EXPERTS: tl.constexpr,
    BY_EXPERT: tl.constexpr,
    DEPTH: tl.constexpr,
    COLUMNS: tl.constexpr,
    BIASED: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_DEPTH: tl.constexpr,
):
    """Multiply what an expert made of its tokens by a block of its second matrix."""
    expert, number, choices, rank = find_expert(
        experts_ptr,
        TOKENS,
        TOKENS_PAD,
        PER_TOKEN,
        PER_TOKEN_PAD,
        EXPERTS,
        BY_EXPERT,
    )
    columns = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    depth = tl.arange(0, BLOCK_DEPTH)
    weight_ptr += expert * (DEPTH * COLUMNS)
    weight_ptr += depth[:, None] * COLUMNS + columns[None, :]
    bias_ptr += expert * COLUMNS
    for first in range(0, number, ROW_TILE):
        choice, real = find_rows(choices, rank, first, number)
        x_at = x_ptr + choice[:, None] * DEPTH + depth[None, :]
        weight_at = weight_ptr
        total = tl.zeros([ROW_TILE, BLOCK], tl.float32)
        for start in range(0, DEPTH, BLOCK_DEPTH):
            x = load_rows(x_at, real, depth, start, DEPTH, BLOCK_DEPTH)
            weight = load_weights(
                weight_at, depth, start, columns, DEPTH, BLOCK_DEPTH, COLUMNS, BLOCK
            )
            total = tl.dot(x, weight, total)
            weight_at += BLOCK_DEPTH * COLUMNS
        if BIASED:
            total = add_bias(total, bias_ptr, columns, COLUMNS)
        store_rows(out_ptr, total, choice, real, columns, COLUMNS)


@triton.jit
def add_choices(
    rows_ptr,  # [TOKENS, PER_TOKEN, COLUMNS]; not set where there is no such expert
    experts_ptr,  # [TOKENS, PER_TOKEN]
    shares_ptr,  # [TOKENS, PER_TOKEN]
    out_ptr,  # [TOKENS, COLUMNS], output
    PER_TOKEN: tl.constexpr,
    EXPERTS: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Add up a block of columns of one token, in the order of its choices."""
    token = tl.program_id(1)
    columns = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    for choice in tl.static_range(PER_TOKEN):
        at = token * PER_TOKEN + choice
        end = tl.where(tl.load(experts_ptr + at) < EXPERTS, COLUMNS, 0)
        row = tl.load(rows_ptr + at * COLUMNS + columns, columns < end, other=0.0)
        total += tl.load(shares_ptr + at) * row
    total = total.to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + token * COLUMNS + columns, total, columns < COLUMNS)
