"""What scoring policies share: attention of a window, pooling, and tokens kept anyway.

A score says how much a token of the prompt is worth to one head; `base.keep_top` does
the rest. Deviations that all share: selection is per key/value head, with the mean over
its query heads (the papers' code often repeats keys first and selects per query head,
which stores more); scores are float32; eviction happens once, at the end of prefill.

Axis letters: `B` batch, `W` window, `N` query heads, `K` key/value heads, `T` tokens of
the buffer, `L` tokens that are scored, `H` head size.
"""

from typing import Literal

import jax
import jax.numpy as jnp

from jaxkv.kernels import decode
from jaxkv.kernels.rotary import rotate
from jaxkv.kernels.weighing import capped
from jaxkv.kernels.window_scores import Reduction, window_scores
from jaxkv.policies.base import Prompt

Pooling = Literal["none", "max", "avg"]
Granularity = Literal["kv_head", "query_head"]


def attention_of_window(
    prompt: Prompt,
    *,
    start: jax.Array,
    window: int,
    length: int,
    count: jax.Array | None = None,
    granularity: Granularity = "kv_head",
    offset: int = 0,
    reduction: Reduction = "sum",
) -> jax.Array:
    """Return `S(j) = sum over the window's queries q of softmax(q K^T / sqrt(H))_j`.

    Args:
      prompt: of one layer.
      start: int32 `[B]`, index of each row's first query.
      window: queries `W`.
      length: tokens `L` to score, the first ones.
      count: int32 `[B]`, queries that each row has; None is all `W`.
      granularity: "kv_head" averages over the query heads of a key/value head.
      offset: positions that the queries are turned ahead by; what they see stays.
      reduction: "max" takes the largest over the queries in place of the sum.

    Returns:
      Float32 `[B, K, L]`, or `[B, N, L]` by query head.
    """
    place = start[:, None] + jnp.arange(window, dtype=jnp.int32)[None]
    place = jnp.minimum(place, prompt.queries.shape[1] - 1)
    queries = jnp.take_along_axis(prompt.queries, place[..., None, None], axis=1)
    if offset:
        # Rotations add up: turned by the difference, a query is what its token would
        # ask at the later position.
        ahead = jnp.full_like(place, offset)
        queries = rotate(queries, ahead, prompt.frequencies)

    softmax = prompt.weighing.softmax

    def scores(queries, **heads):
        return window_scores(
            queries,
            prompt.keys,
            start,
            scale=prompt.scale,
            length=length,
            count=count,
            reduction=reduction,
            implementation=prompt.implementation,
            **(softmax | heads),
        )

    if granularity == "kv_head":
        return scores(queries)
    # One query head of each group at a time, so that no key is repeated.
    batch, _, heads, _ = queries.shape
    groups = heads // prompt.keys.shape[2]
    sink = prompt.weighing.sink
    each = [
        scores(
            queries[:, :, group::groups],
            **({} if sink is None else {"sink": sink[group::groups]}),
        )
        for group in range(groups)
    ]
    return jnp.stack(each, axis=2).reshape(batch, heads, length)


def attention_of_last(
    prompt: Prompt,
    window: int,
    *,
    count: jax.Array | None = None,
    offset: int = 0,
) -> jax.Array:
    """Return what the last tokens of each prompt pay to all: float32 `[B, K, T]`.

    Args:
      prompt: of one layer. One that is shorter than the window is a window as a whole.
      window: how many last tokens, at most.
      count: int32 `[B]`, how many of each row; None is `window`.
      offset: positions that their queries are turned ahead by.
    """
    window = min(window, prompt.queries.shape[1])  # there are no more queries
    own = jnp.minimum(prompt.lengths, window if count is None else count)
    return attention_of_window(
        prompt,
        start=prompt.lengths - own,
        window=window,
        length=prompt.keys.shape[1],
        count=own,
        offset=offset,
    )


def probabilities_of_last(
    prompt: Prompt, window: int, *, count: jax.Array
) -> jax.Array:
    """Return what each of the last tokens pays to each token, all of it at once.

    Args:
      prompt: of one layer.
      window: `W`, how many last tokens, at most.
      count: int32 `[B]`, how many of each row; the others pay nothing.

    Returns:
      Float32 `[B, K, N / K, W, T]`; it takes `W` times the memory of
      `attention_of_last`, which needs no more than sums.
    """
    batch, length, kv_heads, head_dim = prompt.keys.shape
    window = min(window, length)
    own = jnp.minimum(prompt.lengths, count)
    order = jnp.arange(window, dtype=jnp.int32)[None]
    place = (prompt.lengths - own)[:, None] + order
    clipped = jnp.minimum(place, length - 1)[..., None, None]
    queries = jnp.take_along_axis(prompt.queries, clipped, axis=1)
    queries = queries.reshape(batch, window, kv_heads, -1, head_dim)
    logits = prompt.scale * jnp.einsum(
        "bwkgh,btkh->bkgwt",
        queries.astype(jnp.float32),
        prompt.keys.astype(jnp.float32),
    )
    index = jnp.arange(length, dtype=jnp.int32)[None, None]
    seen = (index <= place[..., None])[:, None, None]
    logits = jnp.where(seen, capped(logits, prompt.weighing.cap), -jnp.inf)
    sink = prompt.weighing.sink
    if sink is not None:
        sink = sink.reshape(1, kv_heads, -1, 1, 1)
    weights = decode.softmax(logits, sink)
    counts = (order < own[:, None])[:, None, None, :, None]
    return jnp.where(seen & counts, weights, 0.0)


def window_of(prompt: Prompt, window_size: int) -> jax.Array:
    """Return the tokens of each row's window, int32 `[B]`: one slot is left beside it.

    With a budget of at least 2, none of them is 0.
    """
    return jnp.minimum(window_size, prompt.keep - 1)


def pool(
    scores: jax.Array, real: jax.Array, *, pooling: Pooling, kernel_size: int
) -> jax.Array:
    """Smooth scores along the prompt, so that neighbours of a good token stay with it.

    Args:
      scores: float32 `[B, heads, L]`.
      real: bool `[B, L]`: the others neither give nor get anything.
      pooling: "max", "avg" (what lies beyond counts as 0, as PyTorch's default has it),
        or "none".
      kernel_size: odd number of neighbours, the token itself included; stride 1. A
        kernel may reach beyond the prompt, however far.

    Returns:
      Float32 `[B, heads, L]`, -inf where not `real`.
    """
    real = real[:, None]
    # A wider window would hold nothing but padding more.
    shape, strides = (1, 1, min(kernel_size, 2 * scores.shape[-1] - 1)), (1, 1, 1)
    if pooling == "max":
        scores = jnp.where(real, scores, -jnp.inf)
        scores = jax.lax.reduce_window(
            scores, -jnp.inf, jax.lax.max, shape, strides, "SAME"
        )
    elif pooling == "avg":
        scores = jnp.where(real, scores, 0.0)
        scores = jax.lax.reduce_window(scores, 0.0, jax.lax.add, shape, strides, "SAME")
        scores = scores / kernel_size
    return jnp.where(real, scores, -jnp.inf)


def pool_in_budget(
    scores: jax.Array,
    real: jax.Array,
    keep: jax.Array,
    *,
    pooling: Pooling,
    kernel_size: int,
    clusters: int,
) -> jax.Array:
    """Smooth scores by a kernel that leaves a small budget for several places.

    A token brings its neighbours with it, so that a budget of `m` tokens reaches
    `m / kernel_size` places. The kernel is halved, row by row, until there are enough.

    Args:
      scores: float32 `[B, heads, L]`.
      real: bool `[B, L]`; see `pool`.
      keep: int32 `[B]`, the budgets.
      pooling: see `pool`.
      kernel_size: the widest kernel, odd.
      clusters: places that a budget reaches at least; 0 never halves.

    Returns:
      Float32 `[B, heads, L]`, -inf where not `real`.
    """
    widths = [kernel_size]
    while clusters and widths[-1] > 1:
        widths.append(widths[-1] // 2 | 1)
    *wider, narrowest = widths
    pooled = pool(scores, real, pooling=pooling, kernel_size=narrowest)
    for width in reversed(wider):
        fits = ((width - 1) * clusters <= keep)[:, None, None]
        wide = pool(scores, real, pooling=pooling, kernel_size=width)
        pooled = jnp.where(fits, wide, pooled)
    return pooled


def keep_anyway(
    scores: jax.Array,
    lengths: jax.Array,
    *,
    n_sink: int = 0,
    n_recent: int | jax.Array = 0,
) -> jax.Array:
    """Give the first and the last tokens of each prompt the highest score there is.

    Args:
      scores: float32 `[B, heads, L]`.
      lengths: int32 `[B]`.
      n_sink: first tokens.
      n_recent: last tokens, one number or int32 `[B]`.
    """
    index = jnp.arange(scores.shape[-1], dtype=jnp.int32)[None]
    recent = index >= (lengths - n_recent)[:, None]
    return jnp.where(((index < n_sink) | recent)[:, None], jnp.inf, scores)


def check_room_for_window(name: str, budget: int) -> None:
    """Raise ValueError unless there is room for one query's token and one other."""
    if budget < 2:
        raise ValueError(
            f"{name}: budget={budget} leaves no slot beside its window of at least one "
            "token; use a budget of at least 2."
        )


def check_kept_anyway(name: str, budget: int, **kept: int) -> None:
    """Raise ValueError unless a slot is left beside the tokens that are kept anyway.

    Args:
      name: of the policy.
      budget: in tokens.
      **kept: options that keep tokens, by their names.
    """
    total = sum(kept.values())
    if budget <= total:
        options = " and ".join(f"{option}={value}" for option, value in kept.items())
        raise ValueError(
            f"{name}: budget={budget} leaves no slot beside the tokens that {options} "
            f"keeps anyway; use a budget of at least {total + 1}, or keep fewer."
        )
