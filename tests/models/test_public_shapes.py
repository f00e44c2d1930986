"""Real networks as programs: traced whole, in bfloat16, with no weights."""

import functools

import jax
import jax.numpy as jnp
import pytest

from jaxkv import LongFlow, Options, SnapKV, generation
from jaxkv.models.decoder import Decoder, parameter_shapes
from jaxkv.models.public_shapes import SHAPES

WITH_WINDOWS = [name for name, config in SHAPES.items() if any(config.windows)]
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


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[pytest.mark.slow] * (name != "gemma-3-1b"))
        for name in WITH_WINDOWS
    ],
)
def test_generation_with_windows_is_lowered(name):
    """A budget cuts the layers without a window; the others hold exactly theirs."""
    config, options = SHAPES[name], Options(budget=256, decode=LongFlow())
    prompt, new, rows = 5000, 64, 2
    windows = config.windows
    slots = options.layer_slots(prompt, new, windows)
    assert slots == tuple(256 if w is None else min(w, prompt + new) for w in windows)
    params = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, jnp.bfloat16),
        parameter_shapes(config),
    )
    tokens, lengths, stops, until = (
        jax.ShapeDtypeStruct(shape, jnp.int32)
        for shape in ((rows, prompt), (rows,), (1,), ())
    )
    keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), rows))
    start = functools.partial(
        *(generation.start, Decoder(config)),
        options=Options(budget=256, prefill=SnapKV(), decode=LongFlow()),
        slots=slots,
        max_out=new,
    )
    state = jax.eval_shape(start, params, tokens, lengths, keys, stops)
    for layer, size, window in zip(state.cache, slots, windows, strict=True):
        assert (layer.slots, layer.window) == (size, window)
    advance = functools.partial(generation.advance, Decoder(config), options=options)
    jax.jit(advance).lower(params, state, until, stops)
