"""Eviction policies: what the cache keeps of a prompt, and what a new token overwrites.

A *prefill policy* turns one layer's whole prompt into a state of `budget` slots. A
*decode policy* decides one thing, the slot that the next token overwrites; since some
answer that out of the attention itself, a policy also says which attention runs. Both
are frozen dataclasses, because they are static arguments of `jax.jit`; the arithmetic
stands in plain functions beside them.

Axis letters: `B` batch, `K` key/value heads, `N` query heads, `S` slots, `P` prompt,
`H` head size.
"""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from jaxkv import state as kv
from jaxkv.kernels import decode, window_scores
from jaxkv.kernels.weighing import PLAIN, Weighing
from jaxkv.policies.fitting import fit
from jaxkv.state import KVState
from jaxkv.trees import DraftTree, Pending

# What a policy may ask for before a prefill: `sketch(policy, steps)` are the tokens,
# int32 `[B, steps]`, that greedy decoding gives from a prompt evicted by `policy`.
Sketch = Callable[["PrefillPolicy", int], jax.Array]


class Prompt(NamedTuple):
    """One layer's view of the prompt, right after its attention.

    Token `t` of a row stands at index `t`: first the `lengths[b]` tokens of the prompt,
    then `num_pseudo` pseudo tokens if the policy asked for them, then padding.

    Attributes:
      queries: `[B, T, N, H]`, rotated; where the policy `sketches`, zeros for all but
        the pseudo tokens.
      keys: `[B, T, K, H]`, rotated.
      values: `[B, T, K, H]`.
      lengths: int32 `[B]`, tokens of each prompt.
      keep: int32 `[B]`, tokens that each row may keep in this layer.
      frequencies: float32 `[H / 2]`, of the rotation.
      scale: of the attention's logits, static.
      implementation: of `window_scores`, static.
      held: int32 `[B]`, how many of each prompt's first tokens may be kept; None is
        all of them. What stands behind is a question: it scores, and is not kept.
      output: `[N, H, D]`, the layer's projection of the heads' outputs to the hidden
        size `D`; None unless the policy `reads_output`.
      weighing: of the layer's attention.
    """

    queries: jax.Array
    keys: jax.Array
    values: jax.Array
    lengths: jax.Array
    keep: jax.Array
    frequencies: jax.Array
    scale: float
    implementation: window_scores.Implementation | None = None
    held: jax.Array | None = None
    output: jax.Array | None = None
    weighing: Weighing = PLAIN

    @property
    def candidates(self) -> jax.Array:
        """How many of each prompt's first tokens may be kept, int32 `[B]`."""
        return self.lengths if self.held is None else self.held


class PrefillPolicy(Protocol):
    """Chooses what of a prompt enters the cache.

    `WholePrompt` has the usual answers to all but `check` and `compress`.
    """

    @property
    def num_pseudo(self) -> int:
        """Pseudo tokens that stand after each prompt while it is scored.

        They never enter the cache, and no token of the prompt sees them.
        """

    @property
    def offset(self) -> int:
        """How far behind the prompt's end the first of them stands, in positions.

        Of a policy without pseudo tokens, how far ahead its queries are turned.
        """

    @property
    def same_budgets(self) -> bool:
        """Whether all layers keep equally many tokens."""

    @property
    def sketches(self) -> bool:
        """Whether the pseudo tokens are decoded from an evicted prompt.

        Then `pseudo_tokens` calls `sketch`, the whole prompt is held meanwhile, and the
        policy sees the queries of the pseudo tokens alone.
        """

    def check(self, budget: int) -> None:
        """Raise ValueError if this policy cannot work with `budget` slots."""

    def pseudo_tokens(
        self, tokens: jax.Array, lengths: jax.Array, *, vocab_size: int, sketch: Sketch
    ) -> jax.Array:
        """Return the pseudo tokens of each row, int32 `[B, num_pseudo]`.

        Args:
          tokens: int32 `[B, P]`, right-padded.
          lengths: int32 `[B]`.
          vocab_size: of the network.
          sketch: generates from the network if the policy `sketches`; see `Sketch`.
        """

    def heads(self, num_heads: int, num_kv_heads: int) -> int:
        """Return the heads of the state: KV heads, or query heads (an analysis)."""

    def layer_budgets(self, budget: int, num_layers: int) -> tuple[int, ...]:
        """Return the most tokens each layer keeps of any prompt at `budget` or less."""

    def layer_keeps(
        self,
        keep: jax.Array | np.ndarray,
        lengths: jax.Array | np.ndarray,
        num_layers: int,
    ) -> tuple[jax.Array, ...]:
        """Return how many tokens each layer keeps of each row, int32 `[B]` each.

        Args:
          keep: int32 `[B]`, budget of each row.
          lengths: int32 `[B]`.
          num_layers: of the network.
        """

    def compress(self, prompt: Prompt, state: KVState, *, budget: int) -> KVState:
        """Fill the empty `state` with tokens of `prompt`.

        Args:
          prompt: the layer's.
          state: with at least `budget` slots.
          budget: static, at least every entry of `prompt.keep`.

        Returns:
          The state, with at most `prompt.keep` occupied slots per head. A row that
          fits is kept whole, in order.
        """


def keep_top(
    prompt: Prompt,
    scores: jax.Array,
    state: KVState,
    *,
    budget: int,
    keep: jax.Array | None = None,
) -> KVState:
    """Keep each head's best tokens, shared by all scoring policies.

    Args:
      prompt: the layer's prompt; `prompt.keep` says how many tokens of each row.
      scores: float32 `[B, heads of the state, L]` for the first `L` indices of the
        prompt, all of its real tokens among them; what others score does not matter.
      state: empty.
      budget: static bound of what a head keeps.
      keep: int32 `[B, heads]` or `[B, 1]`, tokens that each head keeps; None is
        `prompt.keep` for all.

    Returns:
      The filled state, its tokens in the order of their positions, so that a row that
      fits lies as it would in a full cache. Ties favour the earlier token. Where a
      score is NaN, or missing, the head's first value is NaN, so that it is noticed.
    """
    heads, length = state.target.shape, prompt.keys.shape[1]
    given: tuple[int, ...] = getattr(scores, "shape", ())
    if given[:-1] == heads and given[-1] <= length:
        length = given[-1]
    fit("scores", scores, "B heads L", (*heads, length), jnp.floating)
    real = jnp.arange(length, dtype=jnp.int32)[None] < prompt.candidates[:, None]
    scores = jnp.where(real[:, None], scores, -jnp.inf)
    wrong = jnp.isnan(scores).any(-1)[..., None]
    if length < prompt.keys.shape[1]:  # that it has no score must not go unnoticed
        wrong |= (prompt.candidates > length)[:, None, None]
    _, best = jax.lax.top_k(scores, min(budget, length))
    rank = jnp.arange(best.shape[-1], dtype=jnp.int32)[None, None]
    keep = prompt.keep[:, None] if keep is None else keep
    most = jnp.minimum(keep, prompt.candidates[:, None])[..., None]
    # The sentinel sorts behind every token.
    best = jnp.sort(jnp.where(rank < most, best, length), axis=-1)
    best = jnp.where(best < length, best, kv.FREE).astype(jnp.int32)
    kept = kv.gather(state, prompt.keys, prompt.values, best)
    first = jnp.where(wrong, jnp.nan, kept.values[:, :, 0])
    return dataclasses.replace(kept, values=kept.values.at[:, :, 0].set(first))


class Ranking(NamedTuple):
    """Which tokens of a layer's prompt are worth most, and how many of them stay.

    Attributes:
      scores: float32 `[B, heads of the state, L]`; see `keep_top`.
      keep: int32 `[B, heads]`, tokens that each head keeps, or `[B, 1]`.
    """

    scores: jax.Array
    keep: jax.Array


class WholePrompt(PrefillPolicy):
    """The usual answers of a prefill policy: no pseudo tokens, one budget for all.

    One of its own writes `scores`, and the best tokens of each head are kept.

    Attributes:
      head_share: the most that a head may keep, in budgets of its layer. Above 1, a
        budget is what the heads of a layer keep on average.
      reads_output: whether `Prompt.output` is wanted.
      repeats: whether the padded prompt stands once more behind its pseudo tokens.
    """

    offset = 0
    same_budgets = True
    sketches = False
    head_share = 1.0
    reads_output = False
    repeats = False

    @property
    def chooses(self) -> bool:
        """Whether the class says what is kept, and does not leave it to this one."""
        own = type(self)
        return (own.scores, own.rank) != (WholePrompt.scores, WholePrompt.rank)

    def check(self, budget: int) -> None:
        """Accept any budget."""

    def scores(self, prompt: Prompt) -> jax.Array:
        """Return what each token is worth to each head, float32 `[B, heads, L]`.

        `L` indices hold all real tokens; what others score does not matter. Infinity is
        kept in any case.
        """
        raise NotImplementedError(f"{type(self).__name__} does not score tokens.")

    def rank(self, prompt: Prompt, *, budget: int) -> Ranking:
        """Return the scores, with the same number of tokens for each head.

        Args:
          prompt: the layer's.
          budget: static, at least what any head may keep.
        """
        del budget
        return Ranking(self.scores(prompt), prompt.keep[:, None])

    def compress(self, prompt: Prompt, state: KVState, *, budget: int) -> KVState:
        """Keep the best tokens of each head; see `PrefillPolicy.compress`."""
        scores, keep = self.rank(prompt, budget=budget)
        return keep_top(prompt, scores, state, budget=budget, keep=keep)

    @property
    def num_pseudo(self) -> int:
        """No pseudo tokens."""
        return 0

    def pseudo_tokens(self, tokens, lengths, *, vocab_size, sketch) -> jax.Array:
        """Return no tokens."""
        del lengths, vocab_size, sketch
        return tokens[:, :0]

    def heads(self, num_heads: int, num_kv_heads: int) -> int:
        """Return the KV heads."""
        del num_heads
        return num_kv_heads

    def layer_budgets(self, budget: int, num_layers: int) -> tuple[int, ...]:
        """Return the same budget for each layer."""
        return (budget,) * num_layers

    def layer_keeps(self, keep, lengths, num_layers) -> tuple[jax.Array, ...]:
        """Return the same numbers for each layer."""
        del lengths
        return (keep,) * num_layers


class DecodePolicy(Protocol):
    """Puts one token into the cache and chooses the slot that the next overwrites."""

    @property
    def evicts(self) -> bool:
        """Whether the policy overwrites occupied slots.

        If so the state holds `budget` slots for prompt and output together; if not,
        `budget + max_new_tokens`, and given tokens are appended by plain attention.
        """

    @property
    def spare(self) -> int:
        """Slots that prefill leaves free; who chooses after an attention needs one."""

    def check(self, budget: int) -> None:
        """Raise ValueError if this policy cannot work with `budget` slots."""

    def default_implementation(self, platform: str) -> decode.Implementation:
        """Return the implementation of `attend` that `None` stands for."""

    def begin(self, state: KVState, lengths: jax.Array) -> KVState:
        """Prepare a state that prefill has filled.

        Args:
          state: with `target` at each head's first free slot, if there is one.
          lengths: int32 `[B]`, tokens of the prompts.

        Returns:
          The state with `target` where the first new token goes.
        """

    def attend(
        self,
        query: jax.Array,
        key: jax.Array,
        value: jax.Array,
        state: KVState,
        position: jax.Array,
        *,
        implementation: decode.Implementation | None,
        weighing: Weighing = PLAIN,
    ) -> tuple[jax.Array, KVState]:
        """Write one token per row, attend from it, and choose the next `state.target`.

        Args:
          query: `[B, N, H]`, rotated.
          key: `[B, K, H]`, rotated.
          value: `[B, K, H]`.
          state: of one layer.
          position: int32 `[B]` of the token; -1 for rows that have finished and must
            not change.
          implementation: of the attention.
          weighing: left out where `weighing.softmax`, which operations take, is empty.

        Returns:
          The output `[B, N, H]` and the new state. Free slots are targets before any
          occupied one is.
        """


class Speculable(DecodePolicy, Protocol):
    """A decode policy that takes drafts: it says what it would do, and does nothing."""

    @property
    def attends_trees(self) -> bool:
        """Whether it can with its options."""

    def attend_tree(
        self,
        query: jax.Array,
        key: jax.Array,
        value: jax.Array,
        state: KVState,
        position: jax.Array,
        drafts: DraftTree,
        ancestors: jax.Array,
        *,
        depth: int,
        implementation: decode.Implementation | None,
        weighing: Weighing = PLAIN,
    ) -> tuple[jax.Array, Pending]:
        """Attend from each node as if its path had been decoded token by token.

        Args:
          query: `[B, T, N, H]`, rotated.
          key: `[B, T, K, H]`, rotated.
          value: `[B, T, K, H]`.
          state: of one layer; it does not change.
          position: int32 `[B]` of the root; -1 for finished rows, whose results mean
            nothing.
          drafts: the trees.
          ancestors: bool `[B, T, T]`, from `trees.ancestors`.
          depth: of the deepest node that a tree may have, static.
          implementation: of `attend`; its `dispatch.counterpart` is the one used.

        Returns:
          The output `[B, T, N, H]`, and what `trees.commit` needs.
        """


class PlainAttention(DecodePolicy):
    """What most decode policies answer: plain attention, and nothing to prepare."""

    def default_implementation(self, platform: str) -> decode.Implementation:
        """Return the implementation that `None` stands for."""
        return decode.choose(platform)

    def begin(self, state: KVState, lengths: jax.Array) -> KVState:
        """Leave everything as it is."""
        del lengths
        return state
