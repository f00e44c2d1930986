"""From logits to tokens, with the semantics of transformers' logits processors.

The order is transformers': repetition penalty, temperature, top-k, top-p, min-p.
Axis letters: `B` batch, `V` vocabulary.
"""

import dataclasses
import functools
from typing import Annotated, Protocol

import jax
import jax.numpy as jnp
from annotated_types import Ge, Gt, Le

from jaxkv.kernels import vocabulary
from jaxkv.policies.fitting import fit

Positive = Annotated[float, Gt(0)]


class Sampler(Protocol):
    """Chooses a token from logits."""

    @property
    def repetition_penalty(self) -> float:
        """See `penalize`; 1.0 is off."""

    def check(self) -> None:
        """Raise ValueError for options that mean nothing."""

    def pick(self, logits: jax.Array, keys: jax.Array) -> jax.Array:
        """Return int32 tokens `[B]` for logits `[B, V]`, with one key per row."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Greedy(Sampler):
    """Take the most likely token; the lowest id on ties.

    Attributes:
      repetition_penalty: see `penalize`; 1.0 is off.
    """

    repetition_penalty: Positive = 1.0

    def check(self) -> None:
        """Raise ValueError for numbers that float32 does not hold."""
        _check_float32("repetition_penalty", self.repetition_penalty)

    def pick(self, logits: jax.Array, keys: jax.Array) -> jax.Array:
        """Return int32 tokens `[B]` for logits `[B, V]`; the keys are not used."""
        del keys
        return vocabulary.likeliest(logits)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Categorical(Sampler):
    """Draw from the softmax, after cutting its tail.

    Attributes:
      temperature: divides the logits; `Greedy` is the limit of 0, which is reached
        where they become too large for float32.
      top_k: keep this many tokens; 0 keeps all.
      top_p: keep the most likely tokens whose probabilities first reach this sum.
      min_p: drop tokens less likely than this times the most likely one.
      repetition_penalty: see `penalize`; 1.0 is off.
    """

    temperature: Positive = 1.0
    top_k: Annotated[int, Ge(0)] = 0
    top_p: Annotated[float, Gt(0), Le(1)] = 1.0
    min_p: Annotated[float, Ge(0), Le(1)] = 0.0
    repetition_penalty: Positive = 1.0

    def check(self) -> None:
        """Raise ValueError for numbers that float32 does not hold."""
        _check_float32("repetition_penalty", self.repetition_penalty)
        _check_float32("temperature", self.temperature)
        _check_float32("top_p", self.top_p)

    def pick(self, logits: jax.Array, keys: jax.Array) -> jax.Array:
        """Draw int32 tokens `[B]` for logits `[B, V]` with one key per row."""
        kept = self.filter(logits)
        # As `jax.random.categorical` draws, but for who takes the maximum.
        draw = functools.partial(
            jax.random.gumbel, shape=kept.shape[1:], dtype=kept.dtype
        )
        noise = jax.vmap(draw)(keys)
        return vocabulary.likeliest(noise + kept)

    def filter(self, logits: jax.Array) -> jax.Array:
        """Return tempered logits `[B, V]` with dropped tokens at minus infinity."""
        tempered = logits / self.temperature
        # A low temperature makes the highest logits infinite, and infinities are equal.
        # Relative to the highest one, a temperature near 0 leaves that one alone.
        highest = logits.max(-1, keepdims=True)
        relative = (logits - highest) / self.temperature
        fits = jnp.isfinite(highest / self.temperature)
        logits = jnp.where(fits, tempered, relative)
        if 0 < self.top_k < logits.shape[-1]:
            kth = vocabulary.kth_largest(logits, k=self.top_k)
            logits = jnp.where(logits < kth[:, None], -jnp.inf, logits)
        if self.top_p < 1:
            logits = _keep_top_p(logits, self.top_p)
        if self.min_p > 0:
            probabilities = jax.nn.softmax(logits, axis=-1)
            least = self.min_p * probabilities.max(-1, keepdims=True)
            logits = jnp.where(probabilities < least, -jnp.inf, logits)
        return logits


def penalizes(sampler: Sampler) -> bool:
    """Return whether tokens seen before are made less likely; arrays may do so."""
    penalty = sampler.repetition_penalty
    return isinstance(penalty, jax.Array) or penalty != 1


def pick_next(
    sampler: Sampler,
    logits: jax.Array,
    keys: jax.Array,
    position: jax.Array,
    seen: jax.Array | None,
) -> jax.Array:
    """Choose each row's next token.

    Args:
      sampler: static.
      logits: float32 `[B, V]`.
      keys: the rows' PRNG keys `[B]`; a token's key is the row's, folded with the
        token's position, so that a token depends on nothing but its row and place.
      position: int32 `[B]`, of the tokens to be chosen.
      seen: bool `[B, V]` for the repetition penalty, or None if it is off.

    Returns:
      int32 tokens `[B]`; `V` stands for what is none.

    Raises:
      ValueError: a sampler of one's own returns something else.
    """
    if seen is not None:
        logits = penalize(logits, seen, sampler.repetition_penalty)
    token = sampler.pick(logits, jax.vmap(jax.random.fold_in)(keys, position))
    if isinstance(sampler, Greedy | Categorical):
        return token
    if isinstance(token, jax.Array) and jnp.issubdtype(token.dtype, jnp.integer):
        token = token.astype(jnp.int32)
    name = f"{type(sampler).__name__}.pick: what it returns"
    fit(name, token, "B", logits.shape[:1], jnp.int32)
    vocabulary = logits.shape[-1]
    return jnp.where((token >= 0) & (token < vocabulary), token, vocabulary)


def from_numbers(logits: jax.Array, tokens: jax.Array) -> jax.Array:
    """Return whether each row's token was chosen from numbers, bool `[B]`.

    Only what was chosen is looked at, because NaN and infinity win every choice, and
    minus infinity wins where there is nothing else. A token beyond the vocabulary was
    chosen from none.

    Args:
      logits: float32 `[B, V]`, as the network gives them.
      tokens: int32 `[B]`, from `pick_next`.
    """
    return jnp.isfinite(vocabulary.at_tokens(logits, tokens))


def penalize(
    logits: jax.Array, seen: jax.Array, penalty: float | jax.Array
) -> jax.Array:
    """Make tokens that have occurred less likely (Keskar et al., arXiv 1909.05858).

    Args:
      logits: float32 `[B, V]`.
      seen: bool `[B, V]`, tokens of the prompt and of the output so far.
      penalty: positive logits are divided by it, negative ones multiplied; float32
        `[B, 1]` is one of each row.

    Returns:
      The new logits; what float32 does not hold is the highest or lowest it does.
    """
    penalized = jnp.where(logits < 0, logits * penalty, logits / penalty)
    limits = jnp.finfo(logits.dtype)
    held = jnp.clip(penalized, limits.min, limits.max)
    return jnp.where(seen & jnp.isfinite(logits), held, logits)


def _keep_top_p(logits, top_p):
    order = jnp.argsort(logits, axis=-1, descending=True)
    ranked = jnp.take_along_axis(logits, order, axis=-1)
    probabilities = jax.nn.softmax(ranked, axis=-1)
    before = jnp.cumsum(probabilities, axis=-1) - probabilities
    ranked = jnp.where(before >= top_p, -jnp.inf, ranked)
    return jnp.take_along_axis(ranked, jnp.argsort(order, axis=-1), axis=-1)


def _check_float32(name, value):
    """Raise ValueError for a positive number that float32 makes 0 or infinite."""
    limits = jnp.finfo(jnp.float32)
    if not limits.tiny <= value <= limits.max:
        raise ValueError(f"{name} must be a number that float32 holds, got {value}.")
