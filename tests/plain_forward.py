"""The network without a cache, to compare with."""

import jax
import jax.numpy as jnp

from jaxkv.kernels.prefill import causal_attention
from jaxkv.models.decoder import Decoder


def attend(q, k, v, state, weighing):
    """Plain causal attention over the whole sequence; no cache."""
    window = weighing.window
    if weighing.softmax:  # which `jax.nn` does not know
        how = dict(scale=q.shape[-1] ** -0.5, window=window, **weighing.softmax)
        return causal_attention(q, k, v, **how, implementation="reference"), state
    out = jax.nn.dot_product_attention(
        *(q, k, v),
        is_causal=True,
        local_window_size=None if window is None else (window - 1, 0),
    )
    return out, state


def forward(config, params, tokens):
    """Return float32 logits `[B, T, V]`."""
    decoder = Decoder(config)
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    cache = (None,) * config.num_layers
    variables = {"params": params}
    hidden, _ = decoder.apply(variables, tokens, positions, cache, attend)
    return decoder.apply(variables, hidden, method=Decoder.unembed)
