"""The programs that run the tiny network, compiled once for all tests of a process.

`current` holds them. A test that replaces a function of the library puts
`compiled()` in its place, since what is compiled already would not see it, and one of
another network `compiled(config)`.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxkv import forward, generation
from jaxkv.laws.network import CONFIG, params
from jaxkv.models.decoder import Decoder
from jaxkv.options import Options
from jaxkv.policies.full import Full
from jaxkv.runtime.seeds import key_of

PROMPT, NEW = 24, 16
LENGTHS = (PROMPT, 3, 13)
SMALL = (9, 6, 7)  # what each row may keep of its prompt, where little is kept


class Programs(NamedTuple):
    """What the laws run, compiled, and the network that it runs."""

    prefill: Callable
    decode_step: Callable
    generate: Callable
    network: Decoder


def compiled(config=CONFIG):
    """Return programs that share nothing with earlier ones."""

    def jit(function, *static):
        # JAX remembers what it has traced by the function; a partial is always another.
        function = functools.partial(function)
        return jax.jit(function, static_argnames=static)

    return Programs(
        jit(forward.prefill, "network", "options", "slots"),
        jit(forward.decode_step, "network", "options"),
        jit(generation.generate_tokens, "network", "options", "slots", "max_out"),
        Decoder(config),
    )


current = compiled()


def network():
    """Return the network that the laws run, and its weights."""
    return current.network, params(current.network.config)


def windows():
    """Return how many tokens each of its layers attends to; None is all."""
    return current.network.config.windows


def may_keep(policy, keep=SMALL):
    """Return what each row may keep of its prompt; a policy that cuts none keeps it."""
    return (PROMPT,) * len(keep) if isinstance(policy, Full) else keep


def prefill(policy, tokens, lengths=LENGTHS, keep=SMALL):
    """Return the first logits and the cache; a policy of None has no budget."""
    options = Options(budget=PROMPT, prefill=policy) if policy else Options()
    options.check()
    as_array = functools.partial(jnp.asarray, dtype=jnp.int32)
    return current.prefill(
        *(*network(), tokens, as_array(lengths)),
        options=options,
        slots=options.layer_slots(PROMPT, NEW, windows()),
        keep=as_array(may_keep(policy, keep)) if policy else None,
    )


def generate(options, tokens, lengths, *, new=NEW, stop_ids=(-1,), seed=0, keys=None):
    """Return the `generation.Output` of `new` tokens."""
    options.check()
    if keys is None:
        keys = jax.random.split(key_of(seed), len(lengths))
    return current.generate(
        *(*network(), tokens, lengths, keys),
        jnp.asarray(stop_ids, jnp.int32),
        jnp.int32(new),
        options=options,
        slots=options.layer_slots(PROMPT, NEW, windows()),
        max_out=NEW,
    )


def with_budget(options, small):
    """Return the options with a budget of `small`, or whatever a full prompt needs."""
    if not isinstance(options.prefill, Full):
        return dataclasses.replace(options, budget=small)
    budget = PROMPT + options.decode.spare if options.decode.evicts else None
    return dataclasses.replace(options, budget=budget)


def step(options, token, position, cache):
    """Return logits and the new cache."""
    return current.decode_step(*network(), token, position, cache, options=options)
