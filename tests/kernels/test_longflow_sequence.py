"""The law of LongFlow's paper profile: what 2,000 steps give up, one after another.

In float32 every backend chooses the reference's slot at every step, from an empty cache
on. A backend joins by one line in `BACKENDS`. Run as a script, this file is the worker
that interprets the Triton kernels; `triton_on_cpu` says why.
"""

import dataclasses
import functools
import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import triton_on_cpu

from jaxkv.kernels import longflow_triton, triton_call
from jaxkv.kernels.cache import Slots, Token
from jaxkv.kernels.longflow import longflow_attention
from jaxkv.kernels.longflow_tpu import longflow_attention_tpu

SLOTS, HEAD_DIM = 32, 32
REFERENCE = functools.partial(longflow_attention, implementation="reference")
BACKENDS = {
    "xla": functools.partial(longflow_attention, implementation="xla"),
    "pallas_tpu": functools.partial(longflow_attention_tpu, interpret=True),
}


def inputs_of(steps):
    """Return queries, keys, values and positions of all steps.

    Two rows start empty and grow; two key/value heads of two query heads each, random
    float32. The second row is four times as sure of itself.
    """

    def draw(seed, *shape):
        return jnp.asarray(
            np.random.default_rng(seed).standard_normal((steps, *shape)), jnp.float32
        )

    sure = jnp.asarray([1.0, 4.0])[None, :, None, None]
    order = jnp.tile(jnp.arange(steps, dtype=jnp.int32)[:, None], 2)
    new = draw(11, 2, 2, HEAD_DIM), draw(12, 2, 2, HEAD_DIM)
    return sure * draw(10, 2, 4, HEAD_DIM), *new, order


def empty_cache():
    shape = (2, 2, SLOTS)
    return Slots(
        keys=jnp.full((*shape, HEAD_DIM), jnp.nan),
        values=jnp.full((*shape, HEAD_DIM), jnp.nan),
        positions=jnp.full(shape, -1, jnp.int32),
        target=jnp.zeros((2, 2), jnp.int32),
        norms=jnp.full(shape, jnp.nan),
    )


def victims_of(attend, *, shared, steps, scan=jax.lax.scan):
    """Return what each step gives up, int32 `[steps, B, K]`.

    Args:
      attend: a value of `BACKENDS`.
      shared: of the op.
      steps: to take.
      scan: that takes them.
    """

    def step(slots, new):
        query, *token = new
        token = Token(*token)
        oldest = jnp.zeros_like(token.position)
        _, slots = attend(
            query, token, slots, oldest, token.position, scale=0.25, shared=shared
        )
        return slots, slots.target

    def run(slots, inputs):
        return scan(step, slots, inputs)[1]

    run = jax.jit(run) if scan is jax.lax.scan else run
    return np.asarray(run(empty_cache(), inputs_of(steps)))


def one_by_one(step, cache, inputs):
    """Do `jax.lax.scan` with a step that nothing can trace."""
    found = []
    for new in zip(*inputs, strict=True):
        cache, target = step(cache, new)
        found.append(np.asarray(target))
    return cache, np.stack(found)


@functools.cache
def reference_victims(shared, steps):
    wanted = victims_of(REFERENCE, shared=shared, steps=steps)
    # Free slots first, in order; then the score chooses all over the place.
    np.testing.assert_array_equal(wanted[: SLOTS - 1, 0, 0], np.arange(1, SLOTS))
    assert len(np.unique(wanted[SLOTS - 1 :])) > SLOTS // 2
    return wanted


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("shared", "steps"), [(True, 2000), (False, 300)])
def test_every_backend_gives_up_what_the_reference_does(backend, shared, steps):
    got = victims_of(BACKENDS[backend], shared=shared, steps=steps)
    np.testing.assert_array_equal(got, reference_victims(shared, steps))


@pytest.mark.slow
@pytest.mark.parametrize("programs", [0, 3])
def test_interpreted_triton_gives_up_what_the_reference_does(programs):
    """Split rows, then whole rows; a step takes the interpreter a tenth of a second."""
    pytest.importorskip("triton")
    pytest.importorskip("torch")
    got = triton_on_cpu.interpreted(__file__, str(programs))
    np.testing.assert_array_equal(got, reference_victims(True, 2000))


@pytest.mark.gpu
@pytest.mark.parametrize("shared", [True, False])
def test_triton_gives_up_what_the_reference_does(shared):
    attend = functools.partial(longflow_attention, implementation="triton")
    got = victims_of(attend, shared=shared, steps=2000)
    np.testing.assert_array_equal(got, reference_victims(shared, 2000))


if __name__ == "__main__":
    triton_call.call = triton_on_cpu.call
    tiles = longflow_triton.choose_tiles(2, 4, 2, SLOTS, HEAD_DIM, "float32")
    programs = int(sys.argv[1])
    tiles = dataclasses.replace(tiles, programs=programs, splits=1 if programs else 2)
    tiles = dataclasses.replace(tiles, block=16)
    attend = functools.partial(longflow_triton.longflow_attention_triton, tiles=tiles)
    found = victims_of(attend, shared=True, steps=2000, scan=one_by_one)
    print(json.dumps(found.tolist()))
