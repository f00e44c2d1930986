"""PRNG keys that depend on nothing but seeds, whatever JAX's settings are.

All are of the implementation threefry. What others draw for a row may depend on the
rows beside it (`rbg`), and with JAX's own `jax.random.key` the settings decide which
implementation that is, and whether seeds beyond 32 bits are cut.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from jaxkv.runtime.programs import bounded_jit

_IMPLEMENTATION = "threefry2x32"
_LOW = 0xFFFFFFFF


def key_of(seed: int) -> jax.Array:
    """Return the PRNG key of a seed of at most 64 bits; other seeds, other keys."""
    return jax.random.wrap_key_data(_data([seed])[0], impl=_IMPLEMENTATION)


def row_keys(seed: int | Sequence[int], rows: int) -> jax.Array:
    """Return a PRNG key for each row, `[rows]`.

    Args:
      seed: of all rows, of which each gets a key of its own, or a seed for each; a row
        with its own seed gets what the first row of that seed gets.
      rows: number of keys.
    """
    if isinstance(seed, int):
        return _folded(_data([seed] * rows), np.arange(rows, dtype=np.uint32))
    return _folded(_data(seed), np.zeros(rows, np.uint32))


def independent(keys: jax.Array) -> jax.Array:
    """Return keys `[B]` of whatever implementation as such that draw by themselves.

    Args:
      keys: typed, or raw as `jax.random.PRNGKey` makes them. Those of threefry stay as
        they are.
    """
    typed = jnp.issubdtype(keys.dtype, jax.dtypes.prng_key)
    data = jax.random.key_data(keys) if typed else keys
    found = jax.random.wrap_key_data(data[..., :2], impl=_IMPLEMENTATION)
    for word in range(2, data.shape[-1]):
        found = jax.vmap(jax.random.fold_in)(found, data[..., word])
    return found


def _data(seeds: Sequence[int]) -> np.ndarray:
    words = [(seed >> 32 & _LOW, seed & _LOW) for seed in seeds]
    return np.array(words, np.uint32).reshape(-1, 2)


@bounded_jit(static_argnames=())
def _folded(data: jax.Array, order: jax.Array) -> jax.Array:
    """Fold numbers `[B]` into the keys of seeds `[B, 2]`, in one program, not four."""
    keys = jax.random.wrap_key_data(data, impl=_IMPLEMENTATION)
    return jax.vmap(jax.random.fold_in)(keys, order)
