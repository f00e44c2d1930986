"""H2O: keep the tokens that gathered the most attention, and the recent ones.

Zhang et al., arXiv 2306.14048, for the prompt and for decoding. Axis letters: `B`
batch, `K` key/value heads, `T` tokens.
"""

import dataclasses
from typing import Annotated

import jax
import jax.numpy as jnp
from annotated_types import Ge

from jaxkv.kernels.weighing import PLAIN
from jaxkv.policies.base import PlainAttention, Prompt, WholePrompt
from jaxkv.policies.eviction import (
    Recent,
    aim_at_least,
    attend_and_sum,
    check_room,
    start_sums,
)
from jaxkv.policies.scoring import (
    attention_of_last,
    attention_of_window,
    check_kept_anyway,
    check_room_for_window,
    keep_anyway,
    window_of,
)
from jaxkv.state import KVState


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

    window_size: Annotated[int, Ge(1)] | None = 32

    def check(self, budget: int) -> None:
        """Need a slot for a heavy hitter and one for a recent token."""
        if self.window_size is None:
            check_kept_anyway("H2O", budget, n_recent=1)
            return
        check_room_for_window("H2O", budget)

    def scores(self, prompt: Prompt) -> jax.Array:
        """Return the attention that each token gathered."""
        if self.window_size is None:
            scores, recent = attention_of_all(prompt), prompt.keep // 2
        else:
            recent = window_of(prompt, self.window_size)
            scores = attention_of_last(prompt, self.window_size, count=recent)
        return keep_anyway(scores, prompt.lengths, n_recent=recent)


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
class H2ODecode(PlainAttention):
    """Keep the tokens that gathered the most attention, and the recent ones.

    Zhang et al., "H2O: Heavy-Hitter Oracle for Efficient Generative Inference of Large
    Language Models" (arXiv 2306.14048, section 4): importance is the sum over all steps
    of a token's attention weight; each head evicts its own least. Deviations: the sum
    starts after the prompt, whose own attention no decode policy sees; query heads that
    share a key/value head are averaged, as they share what is evicted.

    Attributes:
      n_recent: how many of the newest tokens are never evicted: a number, or a fraction
        of the slots; the paper splits the budget in halves.
    """

    n_recent: Recent = 0.5
    evicts = True
    spare = 1

    def check(self, budget: int) -> None:
        """Need room beside the recent tokens."""
        check_room("H2ODecode", budget, n_recent=self.n_recent)

    def begin(self, state: KVState, lengths: jax.Array) -> KVState:
        """Start all sums at 0."""
        del lengths
        return start_sums(state)

    def attend(
        self,
        query,
        key,
        value,
        state,
        position,
        *,
        implementation=None,
        weighing=PLAIN,
    ) -> tuple[jax.Array, KVState]:
        """Overwrite the token least attended to so far; see `DecodePolicy.attend`."""
        out, state = attend_and_sum(
            *(query, key, value, state, position),
            implementation=implementation,
            weighing=weighing,
        )
        return out, aim_at_least(
            state, state.memory, position, n_recent=self.n_recent, shared=False
        )
