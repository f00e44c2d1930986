"""Prompt eviction by scores: the methods that DapQ is compared with.

Each is a scoring function plus `policies.keep_top`, bound to its options by a frozen
dataclass. Deviations that all share: selection is per key/value head, with the mean
over its query heads (the papers' code often repeats keys first and selects per query
head, which stores more); scores are float32; eviction happens once, at the end of
prefill. Axis letters: `B` batch, `N` query heads, `K` key/value heads, `T` tokens,
`H` head size.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from jaxkv.policies.base import Prompt, WholePrompt, keep_top
from jaxkv.policies.scoring import (
    Pooling,
    attention_of_window,
    check_kept_anyway,
    check_kernel,
    check_room_for_window,
    check_window,
    keep_anyway,
    pool,
)
from jaxkv.state import KVState


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


def window_of(prompt: Prompt, window_size: int) -> jax.Array:
    """Return the tokens of each row's window, int32 `[B]`: one slot is left beside it.

    With a budget of at least 2, none of them is 0.
    """
    return jnp.minimum(window_size, prompt.keep - 1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class SnapKV(WholePrompt):
    """Keep what the end of the prompt attends to, smoothed, and that end itself.

    Li et al., "SnapKV: LLM Knows What You are Looking for Before Generation"
    (arXiv 2404.14469, section 4): with the window's queries `q_i`, `S(j) = sum_i
    softmax(q_i K^T / sqrt(H))_j` for `j` before the window, pooled along `j`; keep the
    window and the `budget - window_size` best. The defaults are those of the paper's
    LongBench runs. Deviation: where its code refuses a budget within the window, here
    the window is the last `budget - 1` tokens.

    Attributes:
      window_size: last tokens of the prompt that score, and that are always kept.
      kernel_size: of the pooling, odd.
      pooling: "max", "avg" or "none".
      offset: positions that the window's queries are turned ahead by before they
        score; 0 is the paper. With `window_size` they stand where the output will:
        DapQ's idea without pseudo tokens, with the prompt's end as the content.
    """

    window_size: int = 32
    kernel_size: int = 7
    pooling: Pooling = "max"
    offset: int = 0

    @classmethod
    def longbench(cls, **options) -> "SnapKV":
        """Return the setting of the paper's LongBench runs: 32, max-pooling by 7."""
        return cls(**dict(window_size=32, kernel_size=7, pooling="max") | options)

    @classmethod
    def kvpress(cls, **options) -> "SnapKV":
        """Return the default of the kvpress library: 64, average pooling by 5."""
        return cls(**dict(window_size=64, kernel_size=5, pooling="avg") | options)

    def check(self, budget: int) -> None:
        """Need a window, and a slot beside it."""
        name = type(self).__name__
        check_window(name, self.window_size)
        check_kernel(name, self.kernel_size)
        if self.offset < 0:
            raise ValueError(
                f"{name}: offset must be >= 0, got {self.offset}; queries are turned "
                "ahead, to positions of the output."
            )
        check_room_for_window(name, budget)

    def compress(self, prompt: Prompt, state: KVState, *, budget: int) -> KVState:
        """Keep the window, and the best of what lies before it."""
        window = window_of(prompt, self.window_size)
        scores = attention_of_last(
            prompt, self.window_size, count=window, offset=self.offset
        )
        index = jnp.arange(scores.shape[-1])
        before = index < (prompt.lengths - window)[:, None]
        scores = pool(
            scores, before, pooling=self.pooling, kernel_size=self.kernel_size
        )
        scores = keep_anyway(scores, prompt.lengths, n_recent=window)
        return keep_top(prompt, scores, state, budget=budget)


@dataclasses.dataclass(frozen=True, kw_only=True)
class PyramidKV(SnapKV):
    """SnapKV with more budget for the lower layers and less for the upper ones.

    Cai et al., "PyramidKV: Dynamic KV Cache Compression based on Pyramidal Information
    Funneling" (arXiv 2406.02069, section 4.2), with the integer steps of its code: for
    `c = budget - window_size`, the lowest layer keeps `2 c - c // beta` tokens beside
    the window, the highest about `c // beta`, those between fall in equal steps. Steps
    are rounded down, so that all layers together keep somewhat more than
    `budget x layers`. As in its code, a prompt of fewer than `2 c` tokens is cut to
    `budget` in each layer, and no layer is given more than the prompt has. A budget
    within the window leaves nothing to share out, so it is `budget` in each layer too.

    `budget` is hence the mean over the layers. Layers differ in slots, so a decode
    policy that evicts is refused.

    Attributes:
      window_size: see `SnapKV`.
      kernel_size: see `SnapKV`.
      pooling: see `SnapKV`.
      offset: see `SnapKV`.
      beta: how steep the pyramid is; 1 is flat.
    """

    beta: int = 20
    same_budgets = False

    def check(self, budget: int) -> None:
        """Need what SnapKV needs, and a slope."""
        super().check(budget)
        if self.beta < 1:
            raise ValueError(f"PyramidKV: beta must be at least 1, got {self.beta}.")

    def layer_budgets(self, budget: int, num_layers: int) -> tuple[int, ...]:
        """Bound what `layer_keeps` gives for any prompt and any smaller budget.

        The upper layers need `budget` slots too, for prompts that are kept whole. A
        caller who knows the prompts needs fewer: the maximum of `layer_keeps`.
        """
        free = max(budget - self.window_size, 0)
        highest = 2 * free - free // self.beta
        bounds = []
        for layer in range(num_layers):
            slope = max(0.0, 1 - 2 * layer / max(num_layers - 1, 1))
            # Rounding a step down can add `layer` tokens.
            most = free + int((highest - free) * slope) + layer + 1
            bounds.append(max(budget, most + self.window_size))
        return tuple(bounds)

    def layer_keeps(self, keep, lengths, num_layers) -> tuple[jax.Array, ...]:
        """Return each layer's budgets, see the class; NumPy in, NumPy out."""
        xp = np if isinstance(keep, np.ndarray) else jnp
        # Of a prompt that fits; twice a budget of any size would leave int32.
        most = xp.minimum(keep, lengths)
        free = xp.maximum(most - self.window_size, 0)
        highest = xp.minimum(2 * free - free // self.beta, lengths - self.window_size)
        step = (2 * highest - 2 * free) // max(num_layers - 1, 1)
        flat = (lengths <= keep) | (lengths < 2 * free) | (free == 0)
        return tuple(
            xp.where(flat, keep, highest - layer * step + self.window_size)
            for layer in range(num_layers)
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class H2O(WholePrompt):
    """Keep the heavy hitters, which collected most attention, and the recent tokens.

    Zhang et al., "H2O: Heavy-Hitter Oracle for Efficient Generative Inference of Large
    Language Models" (arXiv 2306.14048, section 4): `S(j)` is the attention that token
    `j` received from all queries so far. With a window it is what papers on prompt
    eviction often call H2O: SnapKV without pooling; as there, a budget within the
    window shortens it. Deviation of the true one: evicted once, not at every token, so
    queries of the prompt still saw tokens that the paper would have evicted by then.

    Attributes:
      window_size: last tokens that score and are always kept; None for the true one:
        all of the prompt scores (in chunks), and half of each row's budget goes to
        recent tokens, as in the paper.
    """

    window_size: int | None = 32

    def check(self, budget: int) -> None:
        """Need a slot for a heavy hitter and one for a recent token."""
        if self.window_size is None:
            check_kept_anyway("H2O", budget, n_recent=1)
            return
        check_window("H2O", self.window_size)
        check_room_for_window("H2O", budget)

    def compress(self, prompt: Prompt, state: KVState, *, budget: int) -> KVState:
        """Keep the recent tokens, and the best of what lies before them."""
        if self.window_size is None:
            scores, recent = attention_of_all(prompt), prompt.keep // 2
        else:
            recent = window_of(prompt, self.window_size)
            scores = attention_of_last(prompt, self.window_size, count=recent)
        scores = keep_anyway(scores, prompt.lengths, n_recent=recent)
        return keep_top(prompt, scores, state, budget=budget)


def attention_of_all(prompt: Prompt, *, chunk: int = 128) -> jax.Array:
    """Return what all tokens of each prompt pay to each: float32 `[B, K, T]`.

    Args:
      prompt: of one layer.
      chunk: queries that are looked at together; memory is linear in it.
    """
    batch, length, kv_heads, _ = prompt.keys.shape
    chunk = min(chunk, length)
    chunks = -(-length // chunk)
    padding = ((0, 0), (0, chunks * chunk - length), (0, 0), (0, 0))
    padded = prompt._replace(queries=jnp.pad(prompt.queries, padding))

    def add(i, scores):
        first = i * chunk
        return scores + attention_of_window(
            padded,
            start=jnp.full(batch, first, jnp.int32),
            window=chunk,
            length=length,
            count=jnp.clip(prompt.lengths - first, 0, chunk),
        )

    nothing = jnp.zeros((batch, kv_heads, length), jnp.float32)
    return jax.lax.fori_loop(0, chunks, add, nothing)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TOVA(WholePrompt):
    """Keep what the last token attends to, the same tokens for all heads of a layer.

    Oren et al., "Transformers are Multi-State RNNs" (arXiv 2401.06104, section 3.2):
    `S(j)` is the last query's attention, averaged over the heads of the layer.
    Deviation: evicted once at the end of the prompt, not at every token.
    """

    def check(self, budget: int) -> None:
        """Accept any budget."""

    def compress(self, prompt: Prompt, state: KVState, *, budget: int) -> KVState:
        """Keep the tokens with the highest mean attention."""
        scores = attention_of_last(prompt, 1)
        mean = scores.mean(1, keepdims=True)
        scores = jnp.broadcast_to(mean, scores.shape)
        return keep_top(prompt, scores, state, budget=budget)


@dataclasses.dataclass(frozen=True, kw_only=True)
class KNorm(WholePrompt):
    """Keep the keys of the smallest norm.

    Devoto et al., "A Simple and Effective L2 Norm-Based Strategy for KV Cache
    Compression" (arXiv 2406.11430): `S(j) = -||k_j||`. Deviation: the paper leaves
    layers 0 and 1 whole; here every layer has the same budget.
    """

    def check(self, budget: int) -> None:
        """Accept any budget."""

    def compress(self, prompt: Prompt, state: KVState, *, budget: int) -> KVState:
        """Keep the tokens with the smallest keys."""
        norms = jnp.linalg.norm(prompt.keys.astype(jnp.float32), axis=-1)
        return keep_top(prompt, -norms.swapaxes(1, 2), state, budget=budget)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Random(WholePrompt):
    """Keep tokens drawn at random, others for each head: the floor of all comparisons.

    The draw depends on seed, head and position only, so it is the same in each layer,
    each row and each batch.

    Attributes:
      seed: of the draw.
    """

    seed: int = 0

    def check(self, budget: int) -> None:
        """Accept any budget."""

    def compress(self, prompt: Prompt, state: KVState, *, budget: int) -> KVState:
        """Keep the tokens with the highest numbers."""
        batch, length, kv_heads, _ = prompt.keys.shape
        # One key per position: numbers must not depend on how long the buffer is.
        keys = jax.vmap(jax.random.fold_in, (None, 0))(
            jax.random.key(self.seed), jnp.arange(length)
        )
        drawn = jax.vmap(lambda key: jax.random.uniform(key, (kv_heads,)))(keys)
        scores = jnp.broadcast_to(drawn.T, (batch, kv_heads, length))
        return keep_top(prompt, scores, state, budget=budget)
