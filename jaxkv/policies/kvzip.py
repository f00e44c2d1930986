"""KVzip: keep what the network needs to repeat the prompt.

Kim et al., arXiv 2505.23416. Axis letters: `B` batch, `P` padded prompt, `R` tokens of
the request, `N` query heads, `K` key/value heads, `T` tokens of the buffer.
"""

import dataclasses
from typing import Annotated, Any

import jax
import jax.numpy as jnp
from annotated_types import Ge

from jaxkv.policies.base import Prompt, Sketch, WholePrompt
from jaxkv.policies.criticalkv import output_norms
from jaxkv.policies.scoring import (
    attention_of_window,
    check_kept_anyway,
    keep_anyway,
)

_CHUNK = 128  # pseudo tokens that are looked at together


@dataclasses.dataclass(frozen=True, kw_only=True)
class KVzip(WholePrompt):
    """Keep what is looked at while the prompt is read a second time, behind itself.

    Kim et al., "KVzip: Query-Agnostic KV Cache Compression with Context Reconstruction"
    (arXiv 2505.23416, section 3): behind the prompt stands a request to repeat it, and
    then the prompt again; `S(j)` is the largest attention that any of these tokens, in
    any query head of the group, pays to token `j`. It asks nothing of the question, and
    costs more than a second prefill, with all of both prompts in memory.

    Deviations: the prompt is repeated at once, where the paper does so by chunks of
    2,048 tokens with a request before each; shorter prompts are one chunk. The paper
    lets the heads of all layers share one budget. Here those of a layer do, around
    which `AdaKV` is put: `adakv:policy=kvzip,safeguard=0`. A layer has evicted before
    the next one is read, so that layers cannot share.

    Attributes:
      repeat_ids: token ids of the request, such as those of "Repeat the previous
        context exactly." and of a line's end; a policy has no tokenizer.
      n_sink: first tokens, which are always kept.
      plus: KVzip+ weighs attention by the norm of what a value writes into the residual
        stream, `||W_o v_j||_2`. It also divides by the norm of a query's hidden state,
        which no policy sees; behind a normalisation that is nearly the same for all.
    """

    repeat_ids: tuple[Annotated[int, Ge(0)], ...] = ()
    n_sink: Annotated[int, Ge(0)] = 4
    plus: bool = False
    repeats = True

    @classmethod
    def weighed(cls, **options) -> "KVzip":
        """Return KVzip+."""
        return cls(**dict[str, Any](plus=True) | options)

    @property
    def reads_output(self) -> bool:  # type: ignore[override]
        """KVzip+ does."""
        return self.plus

    @property
    def num_pseudo(self) -> int:
        """Tokens of the request; those of the prompt come on top."""
        return len(self.repeat_ids)

    def check(self, budget: int) -> None:
        """Need a slot beside the sinks."""
        check_kept_anyway("KVzip", budget, n_sink=self.n_sink)

    def pseudo_tokens(
        self, tokens: jax.Array, lengths: jax.Array, *, vocab_size: int, sketch: Sketch
    ) -> jax.Array:
        """Return the request and the prompt, int32 `[B, R + P]`, right-padded."""
        del lengths, vocab_size, sketch
        request = jnp.asarray(self.repeat_ids, jnp.int32)[None]
        request = jnp.broadcast_to(request, (tokens.shape[0], request.shape[1]))
        return jnp.concatenate([request, tokens], axis=1)

    def scores(self, prompt: Prompt) -> jax.Array:
        """Return the largest attention that a repeated token pays to each."""
        batch, length, kv_heads, _ = prompt.keys.shape
        heads = prompt.queries.shape[2]
        chunk = min(_CHUNK, length)
        total = prompt.lengths + self.num_pseudo

        def add(i, scores):
            found = attention_of_window(
                prompt,
                start=prompt.lengths + i * chunk,
                window=chunk,
                length=length,
                count=jnp.clip(total - i * chunk, 0, chunk),
                granularity="query_head",
                reduction="max",
            )
            return jnp.maximum(scores, found)

        nothing = jnp.zeros((batch, heads, length), jnp.float32)
        chunks = (total.max() + chunk - 1) // chunk
        scores = jax.lax.fori_loop(jnp.int32(0), chunks, add, nothing)
        if self.plus:
            scores = scores * output_norms(prompt, order=2)
        scores = scores.reshape(batch, kv_heads, heads // kv_heads, length).max(2)
        return keep_anyway(scores, prompt.lengths, n_sink=self.n_sink)
