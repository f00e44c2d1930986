"""Triton kernels of `window_scores_triton`; imported at the call, as it needs Triton.

Two passes over the keys, for the softmax needs its sum before the first probability is
known: the first leaves log2 of the sum of exponentials per query row and split, the
second computes the logits again and adds up probabilities, column by column. Nothing
as large as queries x keys leaves the chip.

All `W x G` query rows of one key/value head make up one matrix, cut into chunks of
`ROWS_PAD`; row `w * G + g` is head `g` of query `w`. Tiles of keys are dealt to the
splits in turn, and none beyond the last visible key is read.
"""

import triton
import triton.language as tl

from jaxkv.kernels.weighing_triton_body import capped, count_sink

_LOWEST = tl.constexpr(-1e30)


@triton.jit
def load_queries(
    query_ptr,  # [B, W, N, H]
    batch,
    head,
    chunk,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    ROWS_PAD: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HEAD_PAD: tl.constexpr,
):
    """Return the query rows `[R, H]` of one chunk, their numbers, and their windows."""
    rows = chunk * ROWS_PAD + tl.arange(0, ROWS_PAD)
    columns = tl.arange(0, HEAD_PAD)
    window = rows // GROUP
    # [W, K, G]: query heads of one key/value head lie together.
    offsets = (window * KV_HEADS + head) * GROUP + rows % GROUP
    q = tl.load(
        query_ptr
        + batch * (ROWS * KV_HEADS * HEAD_DIM)
        + offsets[:, None] * HEAD_DIM
        + columns[None, :],
        (rows < ROWS)[:, None] & (columns < HEAD_DIM)[None, :],
        other=0.0,
    )
    return q, rows, window


@triton.jit
def tile_logits(
    q,  # [R, H]
    key_ptr,  # [T, K, H] of one sequence, at the first row of one head
    indices,  # [S]
    last,  # [R], the last index that a row sees
    visible,
    SCALE: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HEAD_PAD: tl.constexpr,
    PRECISION: tl.constexpr,
    CAP: tl.constexpr,
):
    """Return logits `[R, S]`, -inf where the key comes after the query."""
    columns = tl.arange(0, HEAD_PAD)
    k = tl.load(
        key_ptr
        + indices[:, None].to(tl.int64) * (KV_HEADS * HEAD_DIM)
        + columns[None, :],
        (indices < visible)[:, None] & (columns < HEAD_DIM)[None, :],
        other=0.0,
    )
    logits = SCALE * tl.dot(q, tl.trans(k), input_precision=PRECISION)
    logits = capped(logits, CAP)
    return tl.where(indices[None, :] <= last[:, None], logits, float("-inf"))


@triton.jit
def window_statistic(
    query_ptr,  # [B, W, N, H]
    key_ptr,  # [B, T, K, H]
    start_ptr,  # [B]
    count_ptr,  # [B]
    sink_ptr,  # [N], or a constant
    # Output.
    statistic_ptr,  # [B, K, SPLITS, CHUNKS * ROWS_PAD], log2 of a sum of exponentials
    SCALE: tl.constexpr,  # times log2(e)
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,  # W x G
    ROWS_PAD: tl.constexpr,
    CHUNKS: tl.constexpr,
    KEYS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HEAD_PAD: tl.constexpr,
    BLOCK: tl.constexpr,
    SPLITS: tl.constexpr,
    PRECISION: tl.constexpr,
    SINK: tl.constexpr,
    CAP: tl.constexpr,
):
    """Sum the exponentials of every `SPLITS`-th tile of keys, for one chunk of rows."""
    pair = tl.program_id(0).to(tl.int64)
    split = tl.program_id(1)
    chunk = tl.program_id(2)
    batch = pair // KV_HEADS
    head = pair % KV_HEADS
    start = tl.load(start_ptr + batch)
    count = tl.load(count_ptr + batch)
    q, rows, window = load_queries(
        *(query_ptr, batch, head, chunk),
        *(KV_HEADS, GROUP, ROWS, ROWS_PAD, HEAD_DIM, HEAD_PAD),
    )
    # Keys beyond the last query that counts may be anything: they are not read.
    visible = tl.minimum(start + count, KEYS)
    last = tl.minimum(start + window, visible - 1)
    key_ptr += batch * (KEYS * KV_HEADS * HEAD_DIM) + head * HEAD_DIM
    maximum = tl.zeros([ROWS_PAD], tl.float32) + _LOWEST
    total = tl.zeros([ROWS_PAD], tl.float32)
    for first in range(split * BLOCK, visible, SPLITS * BLOCK):
        logits = tile_logits(
            *(q, key_ptr, first + tl.arange(0, BLOCK), last, visible),
            *(SCALE, KV_HEADS, HEAD_DIM, HEAD_PAD, PRECISION, CAP),
        )
        new_maximum = tl.maximum(maximum, tl.max(logits, 1))
        weights = tl.exp2(logits - new_maximum[:, None])
        total = total * tl.exp2(maximum - new_maximum) + tl.sum(weights, 1)
        maximum = new_maximum
    if SINK:
        maximum, total, _ = count_sink(
            *(maximum, total, sink_ptr, head * GROUP + rows % GROUP),
            rows < tl.where(split == 0, ROWS, 0),
        )
    # A split that sees nothing has total 0; all others have at least 1.
    statistic = maximum + tl.log2(tl.maximum(total, 1e-30))
    statistic_ptr += (pair * SPLITS + split) * (CHUNKS * ROWS_PAD)
    tl.store(statistic_ptr + rows, statistic)


@triton.jit
def largest_query(
    weights,  # [R, S], 0 in rows that do not count
    window,  # [R]
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    ROWS_PAD: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Return the largest sum over the heads of one query, `[S]`."""
    if GROUP & (GROUP - 1) == 0:
        by_query = tl.reshape(weights, [ROWS_PAD // GROUP, GROUP, BLOCK])
        result = tl.max(tl.sum(by_query, 1), 0)
    else:  # no shape of a tile
        result = tl.zeros([BLOCK], tl.float32)
        for query in range(ROWS // GROUP):
            mine = tl.where((window == query)[:, None], weights, 0.0)
            result = tl.maximum(result, tl.sum(mine, 0))
    return result


@triton.jit
def window_probabilities(
    query_ptr,  # [B, W, N, H]
    key_ptr,  # [B, T, K, H]
    start_ptr,  # [B]
    count_ptr,  # [B]
    statistic_ptr,  # [B, K, SPLITS, CHUNKS * ROWS_PAD]
    # Output.
    scores_ptr,  # [B, K, LENGTH]
    SCALE: tl.constexpr,  # times log2(e)
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    ROWS_PAD: tl.constexpr,
    CHUNKS: tl.constexpr,
    KEYS: tl.constexpr,
    LENGTH: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HEAD_PAD: tl.constexpr,
    BLOCK: tl.constexpr,
    SPLITS: tl.constexpr,
    SPLITS_PAD: tl.constexpr,
    PRECISION: tl.constexpr,
    REDUCTION: tl.constexpr,  # "max" has one chunk
    CAP: tl.constexpr,
):
    """Reduce the probabilities of every `SPLITS`-th tile of keys over all queries."""
    pair = tl.program_id(0).to(tl.int64)
    split = tl.program_id(1)
    batch = pair // KV_HEADS
    head = pair % KV_HEADS
    start = tl.load(start_ptr + batch)
    count = tl.load(count_ptr + batch)
    visible = tl.minimum(start + count, KEYS)
    key_ptr += batch * (KEYS * KV_HEADS * HEAD_DIM) + head * HEAD_DIM
    scores_ptr += pair * LENGTH
    splits = tl.arange(0, SPLITS_PAD)
    # Chunks outside, so that the keys are read again only where there are several.
    for chunk in range(CHUNKS):
        q, rows, window = load_queries(
            *(query_ptr, batch, head, chunk),
            *(KV_HEADS, GROUP, ROWS, ROWS_PAD, HEAD_DIM, HEAD_PAD),
        )
        last = tl.minimum(start + window, visible - 1)
        parts = tl.load(
            statistic_ptr
            + (pair * SPLITS + splits)[:, None] * (CHUNKS * ROWS_PAD)
            + rows[None, :],
            (splits < SPLITS)[:, None],
            other=_LOWEST,
        )
        maximum = tl.max(parts, 0)
        statistic = maximum + tl.log2(tl.sum(tl.exp2(parts - maximum[None, :]), 0))
        counts = (rows < ROWS) & (window < count)
        statistic = tl.where(counts, statistic, float("inf"))
        for first in range(split * BLOCK, LENGTH, SPLITS * BLOCK):
            indices = first + tl.arange(0, BLOCK)
            logits = tile_logits(
                *(q, key_ptr, indices, last, visible),
                *(SCALE, KV_HEADS, HEAD_DIM, HEAD_PAD, PRECISION, CAP),
            )
            weights = tl.exp2(logits - statistic[:, None])
            if REDUCTION == "max":
                score = largest_query(weights, window, GROUP, ROWS, ROWS_PAD, BLOCK)
            else:
                score = tl.sum(weights, 0)
            score *= 1.0 / GROUP
            if CHUNKS > 1:
                written = tl.where(chunk > 0, LENGTH, 0)
                score += tl.load(scores_ptr + indices, indices < written, other=0.0)
            tl.store(scores_ptr + indices, score, indices < LENGTH)
        if CHUNKS > 1:
            tl.debug_barrier()
