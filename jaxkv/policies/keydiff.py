"""KeyDiff: keep the keys that are unlike the others.

Park et al., arXiv 2504.15364. Axis letters: `B` batch, `K` key/value heads, `T` tokens,
`H` head size.
"""

import dataclasses

import jax
import jax.numpy as jnp

from jaxkv.policies.base import Prompt, WholePrompt

_LEAST_NORM = 1e-12  # a key of zeros has no direction


@dataclasses.dataclass(frozen=True, kw_only=True)
class KeyDiff(WholePrompt):
    """Keep the keys whose direction differs most from the mean direction.

    Park et al., "KeyDiff: Key Similarity-Based KV Cache Eviction for Long-Context LLM
    Inference in Resource-Constrained Environments" (arXiv 2504.15364, section 3): with
    the anchor `a = mean_j k_j / ||k_j||`, `S(j) = -cos(k_j, a)`. Deviation: the paper
    reads a prompt in blocks and evicts after each; here the whole prompt is read first,
    so that the anchor is the mean over all of it.
    """

    def scores(self, prompt: Prompt) -> jax.Array:
        """Return how unlike the anchor each key is."""
        keys = prompt.keys.astype(jnp.float32)
        norms = jnp.linalg.norm(keys, axis=-1, keepdims=True)
        directions = keys / jnp.maximum(norms, _LEAST_NORM)  # [B, T, K, H]
        index = jnp.arange(keys.shape[1], dtype=jnp.int32)[None]
        real = (index < prompt.lengths[:, None])[..., None, None]
        count = prompt.lengths.astype(jnp.float32)[:, None, None, None]
        anchor = jnp.where(real, directions, 0.0).sum(1, keepdims=True) / count
        size = jnp.linalg.norm(anchor, axis=-1, keepdims=True)
        anchor = anchor / jnp.maximum(size, _LEAST_NORM)
        return -(directions * anchor).sum(-1).swapaxes(1, 2)
