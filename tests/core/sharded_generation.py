"""Run by test_sharding.py, where JAX finds four devices: generation over a mesh.

Prints "equal" where a mesh changes no token and each state lies where it should.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import tiny

from jaxkv import (
    Categorical,
    LongFlow,
    Options,
    SnapKV,
    StreamingLLM,
    generation,
    sharding,
)
from jaxkv.models.decoder import Decoder

CONFIG = dataclasses.replace(tiny.CONFIG, vocab_size=64)  # the mesh must divide it
STREAMING, SNAPKV = StreamingLLM(n_sink=1), SnapKV(window_size=2)
POLICIES = [
    ("reference", STREAMING, STREAMING),
    ("xla", STREAMING, STREAMING),
    ("xla", SNAPKV, LongFlow()),
    ("xla", SNAPKV, LongFlow(interval=2, protect_prompt=True)),
]


def run(params, implementation, prefill, decode):
    options = Options(
        budget=8,
        prefill=prefill,
        decode=decode,
        sampler=Categorical(),
        prefill_implementation=implementation,
        decode_implementation=implementation,
        scores_implementation=implementation,
    )
    tokens, lengths = tiny.prompts(0, [16, 3, 9, 1], 16)
    return generation.generate_jit(
        Decoder(CONFIG),
        params,
        tokens,
        lengths,
        jax.random.split(jax.random.key(1), 4),
        jnp.asarray([-1]),
        jnp.int32(12),
        options=options,
        slots=options.num_slots(16, 12),
        max_out=12,
    )


def check(mesh, params, policies):
    """Raise where the mesh changes a token, or a state is cut in another way."""
    alone = run(params, *policies)
    with jax.set_mesh(mesh):
        spread = run(sharding.shard_parameters(params, mesh), *policies)
    np.testing.assert_array_equal(alone.tokens, spread.tokens)
    wanted = sharding.state_specs(spread.cache[0])
    for state in spread.cache:
        assert len(state.keys.sharding.device_set) == 4
        for name in ("keys", "values", "positions", "target"):
            spec = jax.sharding.NamedSharding(mesh, getattr(wanted, name))
            array = getattr(state, name)
            assert array.sharding.is_equivalent_to(spec, array.ndim), name


if __name__ == "__main__":
    mesh = sharding.make_mesh(data=2, model=2)
    sharding.check(CONFIG, mesh, batch=4)
    params = tiny.parameters(CONFIG)
    for policies in POLICIES:
        check(mesh, params, policies)
    print("equal")
