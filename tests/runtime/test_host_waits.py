"""Which programs a GPU's host waits for while it hands them over."""

import functools

import jax
import jax.numpy as jnp
import pytest

from jaxkv.runtime.host_waits import asks_the_device


def counted(x, turns):
    return jax.lax.fori_loop(0, turns, lambda _, x: x + 1, x)


def until(x):
    return jax.lax.while_loop(lambda x: x[0] < 3, lambda x: x + 1, x)


def branch(x):
    return jax.lax.cond(x[0] > 0, jnp.sin, jnp.cos, x)


@pytest.mark.parametrize(
    ("function", "asks"),
    [
        (jnp.sin, False),
        (lambda x: counted(x, 4), False),
        (lambda x: counted(x, x[0].astype(jnp.int32)), True),
        (until, True),
        (branch, True),
        (jax.jit(branch), True),
        (functools.partial(jax.lax.map, lambda x: branch(x[None])), True),
        (lambda x: jax.lax.cond(True, lambda: x, lambda: -x), True),
        (jax.vmap(lambda x: jax.lax.cond(x > 0, jnp.sin, jnp.cos, x)), False),
    ],
)
def test_branches_and_loops_of_unknown_length_ask(function, asks):
    assert asks_the_device(function, jnp.ones(3)) == asks
