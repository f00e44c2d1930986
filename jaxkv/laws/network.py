"""The tiny network of the laws, its random weights, and random prompts for it."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from jaxkv.models.config import Config, LayerKind
from jaxkv.models.decoder import Decoder, random_parameters
from jaxkv.runtime.seeds import key_of

CONFIG = Config(
    vocab_size=61,
    hidden_size=32,
    intermediate_size=48,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    qk_norm=True,
    tied=True,
)
NETWORK = Decoder(CONFIG)
# Layers that differ, and an attention with all that may be unusual about it.
MIXED = dataclasses.replace(
    CONFIG,
    num_layers=3,
    kinds=(LayerKind(), LayerKind(window=8), LayerKind()),
    sinks=True,
    attention_cap=4.0,
)


def parameters(config):
    """Draw float32 weights so wide that no two tokens are nearly as likely."""
    drawn = random_parameters(config, key_of(0), jnp.float32)
    return jax.tree.map(lambda x: 12 * x if x.ndim >= 2 else x, drawn)


@functools.cache
def params(config=CONFIG):
    """Return the weights of `NETWORK`, or of a network of this configuration."""
    return parameters(config)


def prompts(seed, lengths, width):
    """Return random tokens `[B, width]` and the lengths, both int32."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, CONFIG.vocab_size, size=(len(lengths), width))
    return jnp.asarray(tokens, jnp.int32), jnp.asarray(lengths, jnp.int32)
