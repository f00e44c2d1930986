"""A draft of the output that costs nothing: what followed the same words before.

Prompt lookup (Saxena, "Prompt Lookup Decoding", 2023) drafts tokens to be verified;
here the same match gives pseudo tokens to score a prompt with. Axis letters: `B` batch,
`P` padded prompt, `N` tokens looked up.
"""

import jax
import jax.numpy as jnp


def continuation(
    tokens: jax.Array, lengths: jax.Array, *, count: int, shortest: int, longest: int
) -> jax.Array:
    """Return what followed the prompt's last words where they stood before.

    Of all earlier places, the one counts where most tokens before it equal those at the
    prompt's end, up to `longest`; of several the latest. What is looked up beyond the
    prompt's end starts anew at that place. Where fewer than `shortest` match, the last
    tokens of the prompt are returned: what follows a common word means nothing.

    Args:
      tokens: int32 `[B, P]`, right-padded.
      lengths: int32 `[B]`, at least 1.
      count: `N`.
      shortest: tokens that must match, at least 1.
      longest: tokens that are compared.

    Returns:
      int32 `[B, N]`.
    """
    batch, length = tokens.shape
    index = jnp.arange(length, dtype=jnp.int32)[None]
    matched = jnp.zeros((batch, length), jnp.int32)
    unbroken = index < (lengths - 1)[:, None]  # something must follow
    for back in range(longest):
        own = jnp.maximum(lengths - 1 - back, 0)[:, None]
        wanted = jnp.take_along_axis(tokens, own, axis=1)
        there = jnp.roll(tokens, back, axis=1)
        unbroken &= (there == wanted) & (index >= back) & (lengths[:, None] > back)
        matched += unbroken.astype(jnp.int32)
    best = matched.max(1, keepdims=True)
    place = jnp.where(matched == best, index, -1).max(1, keepdims=True)  # the latest
    order = jnp.arange(count, dtype=jnp.int32)[None]
    lengths = lengths[:, None]
    period = jnp.maximum(lengths - 1 - place, 1)
    found = place + 1 + order % period
    last = (lengths - count + order) % lengths
    return jnp.take_along_axis(tokens, jnp.where(best >= shortest, found, last), axis=1)
