"""DapQ: keep what decoding will look at, as pseudo queries at its positions tell.

Tian, Su, Li, Zhang, "Where Matters More Than What: Decoding-aligned KV Cache
Compression via Position-aware Pseudo Queries" (arXiv 2603.11564). Axis letters: `B`
batch, `P` padded prompt, `N` pseudo tokens (in shapes of tokens), `H` head size.
"""

import dataclasses
from typing import Annotated, Any, Literal

import jax
import jax.numpy as jnp
from annotated_types import Ge

from jaxkv.fields import OddSize
from jaxkv.policies.base import Prompt, Sketch, WholePrompt
from jaxkv.policies.scoring import (
    Granularity,
    Pooling,
    Reduction,
    attention_of_window,
    check_kept_anyway,
    keep_anyway,
    pool_in_budget,
)
from jaxkv.runtime.seeds import key_of

Content = Literal[
    "prefix_suffix", "random_tokens", "random_span", "fixed", "vocabulary"
]


@dataclasses.dataclass(frozen=True, kw_only=True)
class DapQ(WholePrompt):
    """Keep the tokens that pseudo queries at the positions of the output attend to.

    `N` pseudo tokens stand behind the prompt, at the positions `L ... L + N - 1` of the
    first `N` output tokens, and run through the whole network with it (section 4.1).
    With their queries `q_i`, `S(j) = sum_i softmax(q_i K^T / sqrt(H))_j` (equation 4;
    over the prompt and the pseudo keys that `q_i` sees); the `budget` tokens of the
    highest `S` stay (equation 5), and nothing of the pseudo tokens. The first output
    token comes from the prompt's last token, and decoding goes on at position `L`.

    The equations have no pooling (`literal`); the paper's tables were probably made
    with SnapKV's (`tables`). The default is what finds most with SmolLM2-135M, on other
    samples than those that are reported (`benchmarks/README.md`), and differs in four
    things: no `prefix`, the largest score of any pseudo token in place of the sum,
    wider pooling, and `clusters`. Deviations of all: selection is per key/value head,
    see `granularity`; contents of prompts shorter than `N` wrap around.

    Attributes:
      window_size: pseudo tokens `N`.
      prefix: `m` of the content `Fm_L(N-m)`: the first `m` and the last `N - m` tokens
        of the prompt. Where the prompt is shorter than either part, the part goes
        round it; where it is shorter than both together, they overlap. The first token
        is most often the begin of the sequence: a model that was trained on rows of
        several documents takes it for the next one's, and its pseudo tokens then look
        at themselves instead of the prompt.
      content: "prefix_suffix"; "random_tokens" of the prompt, drawn with replacement;
        "random_span", consecutive tokens of the prompt; "fixed", `fixed_ids`, repeated;
        "vocabulary", any tokens. A draw depends on the seed and the prompt's length.
      fixed_ids: token ids of a sentence, for content "fixed".
      seed: of the random contents.
      offset: moves the pseudo tokens' positions from `L` to `L + offset`; where that
        lies before the prompt, it starts at 0. They see the whole prompt all the same.
      reduction: "max" takes `S(j) = max_i softmax(...)_j`: what a single token of the
        output needs is not thinned out by the others, which look elsewhere.
      pooling: of `S` along the prompt: "none", "max" or "avg".
      kernel_size: of the pooling, odd.
      clusters: places of the prompt that a budget reaches at least: the kernel is
        narrower where the budget holds fewer of its width; 0 is the paper.
      n_recent: last tokens of the prompt that stay whatever they score.
      n_sink: first tokens that do.
      granularity: "kv_head" averages scores over the query heads of a key/value head.
        "query_head" lets each query head keep tokens of its own, as the paper's code
        does: an analysis, which stores `num_heads / num_kv_heads` times as much.
    """

    window_size: Annotated[int, Ge(1)] = 32
    prefix: Annotated[int, Ge(0)] = 0
    content: Content = "prefix_suffix"
    fixed_ids: tuple[Annotated[int, Ge(0)], ...] = ()
    seed: int = 0
    offset: int = 0
    reduction: Reduction = "max"
    pooling: Pooling = "max"
    kernel_size: OddSize = 31
    clusters: Annotated[int, Ge(0)] = 4
    n_recent: Annotated[int, Ge(0)] = 0
    n_sink: Annotated[int, Ge(0)] = 0
    granularity: Granularity = "kv_head"

    @classmethod
    def literal(cls, **options) -> "DapQ":
        """Return the paper's equations to the letter: F4_L28, the sum, no pooling."""
        return cls.tables(**dict(pooling="none") | options)

    @classmethod
    def tables(cls, **options) -> "DapQ":
        """Return what the paper's tables probably used: F4_L28, max-pooling by 7."""
        paper = dict(prefix=4, reduction="sum", kernel_size=7, clusters=0)
        return cls(**dict[str, Any](paper) | options)

    @property
    def num_pseudo(self) -> int:
        """All of the window."""
        return self.window_size

    def check(self, budget: int) -> None:
        """Need something to put into the pseudo tokens, and a slot to choose for."""
        if self.prefix > self.window_size:
            raise ValueError(
                f"DapQ: prefix={self.prefix} must lie between 0 and window_size="
                f"{self.window_size}, of which it is a part."
            )
        if self.content == "fixed" and not self.fixed_ids:
            raise ValueError(
                'DapQ: content="fixed" needs fixed_ids, the token ids of a sentence.'
            )
        check_kept_anyway("DapQ", budget, n_sink=self.n_sink, n_recent=self.n_recent)

    def heads(self, num_heads: int, num_kv_heads: int) -> int:
        """Return the heads that keep tokens of their own."""
        return num_heads if self.granularity == "query_head" else num_kv_heads

    def pseudo_tokens(
        self, tokens: jax.Array, lengths: jax.Array, *, vocab_size: int, sketch: Sketch
    ) -> jax.Array:
        """Return the contents, int32 `[B, N]`; see `policies.PrefillPolicy`."""
        del sketch
        shape = (lengths.shape[0], self.window_size)
        order = jnp.arange(self.window_size, dtype=jnp.int32)[None]
        key = key_of(self.seed)
        match self.content:
            case "fixed":
                ids = jnp.asarray(self.fixed_ids, jnp.int32)[
                    order % len(self.fixed_ids)
                ]
                return jnp.broadcast_to(ids, shape)
            case "vocabulary":
                ids = jax.random.randint(key, shape[1:], 0, vocab_size, jnp.int32)
                return jnp.broadcast_to(ids, shape)
            case "random_tokens":
                # The same fractions for each row, whatever batch it is in.
                fractions = jax.random.uniform(key, shape[1:], jnp.float32)[None]
                index = fractions * lengths[:, None].astype(jnp.float32)
            case "random_span":
                spans = jnp.maximum(lengths - self.window_size, 0) + 1
                drawn = jax.random.uniform(key, (), jnp.float32)
                first = jnp.floor(drawn * spans.astype(jnp.float32))
                index = first.astype(jnp.int32)[:, None] + order
            case _:
                last = lengths[:, None] - self.window_size + order
                index = jnp.where(order < self.prefix, order, last)
        index = index.astype(jnp.int32) % lengths[:, None]
        return jnp.take_along_axis(tokens, index, axis=1)

    def scores(self, prompt: Prompt) -> jax.Array:
        """Return what the pseudo tokens pay to the prompt."""
        scores = attention_of_pseudo(
            prompt,
            window=self.window_size,
            pooling=self.pooling,
            kernel_size=self.kernel_size,
            granularity=self.granularity,
            reduction=self.reduction,
            clusters=self.clusters,
        )
        return keep_anyway(
            scores, prompt.lengths, n_sink=self.n_sink, n_recent=self.n_recent
        )


def attention_of_pseudo(
    prompt: Prompt,
    *,
    window: int,
    pooling: Pooling,
    kernel_size: int,
    granularity: Granularity = "kv_head",
    reduction: Reduction = "sum",
    clusters: int = 0,
) -> jax.Array:
    """Return what the pseudo tokens pay to each token of the prompt, pooled.

    Args:
      prompt: with `window` pseudo tokens behind each row's tokens.
      window: their number `N`.
      pooling: see `scoring.pool`.
      kernel_size: of the pooling.
      granularity: see `DapQ`.
      reduction: see `DapQ`.
      clusters: see `DapQ`.

    Returns:
      Float32 `[B, heads, T - N]`, -inf beyond the prompt.
    """
    length = prompt.keys.shape[1] - window  # no prompt is longer
    scores = attention_of_window(
        prompt,
        start=prompt.lengths,
        window=window,
        length=length,
        granularity=granularity,
        reduction=reduction,
    )
    real = jnp.arange(length, dtype=jnp.int32)[None] < prompt.lengths[:, None]
    return pool_in_budget(
        *(scores, real, prompt.keep),
        pooling=pooling,
        kernel_size=kernel_size,
        clusters=clusters,
    )
