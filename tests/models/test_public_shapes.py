"""Real networks of experts as programs: traced whole, in bfloat16, with no weights."""

import jax
import jax.numpy as jnp
import pytest

from jaxkv.models.decoder import Decoder, parameter_shapes
from jaxkv.models.public_shapes import SHAPES

# Those of more than 24 layers take longer, and show no more.
WITH_EXPERTS = [
    pytest.param(name, marks=[pytest.mark.slow] * (config.num_layers > 24))
    for name, config in SHAPES.items()
    if config.experts
]


@pytest.mark.parametrize(
    "shape",
    [(2, 1), pytest.param((1, 100), marks=pytest.mark.slow)],
    ids=["step", "prompt"],
)
@pytest.mark.parametrize("name", WITH_EXPERTS)
def test_networks_of_experts_are_lowered(name, shape):
    config = SHAPES[name]
    params = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, jnp.bfloat16),
        parameter_shapes(config),
    )
    tokens = jax.ShapeDtypeStruct(shape, jnp.int32)

    def run(params, tokens, positions):
        network = Decoder(config).bind({"params": params})
        cache = (None,) * config.num_layers
        hidden, _ = network(tokens, positions, cache, lambda q, *rest: (q, rest[2]))
        return network.unembed(hidden)

    lowered = jax.jit(run).lower(params, tokens, tokens)
    assert lowered.out_info.shape == (*shape, config.vocab_size)
    count, size = config.experts.count, config.experts.size
    matrices = f"tensor<{count}x{config.hidden_size}x{2 * size}xbf16>"
    assert matrices in lowered.as_text()
