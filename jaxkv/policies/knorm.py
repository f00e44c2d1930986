"""KNorm: keep the keys of the smallest norm.

Devoto et al., arXiv 2406.11430.
"""

import dataclasses

import jax
import jax.numpy as jnp

from jaxkv.policies.base import Prompt, WholePrompt


@dataclasses.dataclass(frozen=True, kw_only=True)
class KNorm(WholePrompt):
    """Keep the keys of the smallest norm.

    Devoto et al., "A Simple and Effective L2 Norm-Based Strategy for KV Cache
    Compression" (arXiv 2406.11430): `S(j) = -||k_j||`. Deviation: the paper leaves
    layers 0 and 1 whole; here every layer has the same budget.
    """

    def scores(self, prompt: Prompt) -> jax.Array:
        """Return the negative norms of the keys."""
        norms = jnp.linalg.norm(prompt.keys.astype(jnp.float32), axis=-1)
        return -norms.swapaxes(1, 2)
