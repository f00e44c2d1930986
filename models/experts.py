"""The feed-forward of a layer that has experts: a router, and what it chooses among.

A token goes to the few experts that the router holds likeliest, and their outputs are
added up by how likely they are. The weights of all experts are stored together, `[E, D,
2 I]` and `[E, I, D]`, each device of a mesh with some of the experts.

Mixtral (arXiv 2401.04088, section 2.1), Qwen3-MoE (arXiv 2505.09388, section 2), OLMoE
(arXiv 2409.02060, section 2) and gpt-oss (arXiv 2508.10925, section 2.2) differ in what
`config.Experts` says.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from jaxkv.kernels import experts as kernel
from jaxkv.kernels.per_shard import COLUMNS
from jaxkv.models.config import Experts

# How parameters of the three kinds are cut over the devices of a row; see `decoder`.
WHOLE, BY_EXPERT = (None,), (COLUMNS,)

# Makes a parameter of a name, mesh axes and shape; zeros where it is named a bias.
Axes = tuple[str | tuple[str, ...] | None, ...]
Parameter = Callable[[str, Axes, tuple[int, ...]], jax.Array]


def feed_forward(experts: Experts, x: jax.Array, parameter: Parameter) -> jax.Array:
    """Return what the experts of a layer add to normalised hidden states.

    Args:
      experts: sizes and switches.
      x: `[B, T, D]`.
      parameter: see `Parameter`.

    Returns:
      `[1, B, T, D]`, one part in the dtype of `x`, as `decoder.Layer` hands it on.
    """
    e, hidden = experts, x.shape[-1]

    def matrix(name, *shape):
        return parameter(name, BY_EXPERT + (None,) * (len(shape) - 1), shape)

    router = parameter("router", (None, None), (hidden, e.count))
    # In float32, for a rounding must not choose another expert.
    logits = jnp.matmul(
        x, router, precision="highest", preferred_element_type=jnp.float32
    )
    gate_up_bias = down_bias = None
    if e.bias:
        bias = parameter("router_bias", WHOLE, (e.count,)).astype(jnp.float32)
        logits = logits + bias[None, None]
        gate_up_bias = matrix("experts_gate_up_bias", e.count, 2 * e.size)
        down_bias = matrix("experts_down_bias", e.count, hidden)
    chosen, shares = kernel.route(logits, per_token=e.per_token, normalize=e.normalize)
    weights = kernel.Weights(
        matrix("experts_gate_up", e.count, hidden, 2 * e.size),
        matrix("experts_down", e.count, e.size, hidden),
        gate_up_bias,
        down_bias,
    )
    with jax.named_scope("experts"):
        return kernel.feed_forward(x, chosen, shares, weights, gate=e.gate)[None]
