"""Tokens at random: what the draw depends on."""

import functools

import jax.numpy as jnp
import numpy as np
from prompts_by_hand import kept, prompt_of
from simulation import (
    PROMPT,
    STEPS,
    assert_all_differ,
    assert_as_simulated,
    protect,
    run,
)

from jaxkv import Random, RandomDecode
from jaxkv.policies.chance import lots


def test_random_depends_on_seed_and_head_but_not_on_the_buffer():
    prompt = prompt_of(np.ones((40, 2)), np.ones((40, 2)), lengths=30, keep=8)
    cut = {
        name: getattr(prompt, name)[:, :30] for name in ("queries", "keys", "values")
    }
    shorter = prompt._replace(**cut)
    first = kept(Random(), prompt)
    assert first == kept(Random(), shorter)
    assert first[0] != first[1]
    assert first != kept(Random(seed=1), prompt)


def test_lots_are_uniform_and_depend_on_the_seed():
    drawn = np.asarray(lots(jnp.arange(4000), 0))
    assert ((drawn >= 0) & (drawn < 1)).all()
    counts, _ = np.histogram(drawn, bins=10, range=(0, 1))
    assert abs(counts - 400).max() < 80  # four standard deviations
    assert abs(np.corrcoef(drawn[1:], drawn[:-1])[0, 1]) < 0.06
    assert (np.asarray(lots(jnp.arange(4000), 1)) != drawn).mean() > 0.99


@functools.cache
def all_lots():
    return np.asarray(lots(jnp.arange(max(PROMPT) + STEPS), 3))


def rule(held, queries, keys, values, sums):
    return protect(all_lots()[held], held, n_recent=2)


def test_decoding_against_the_simulation():
    policy = RandomDecode(seed=3, n_recent=2)
    assert_as_simulated(policy, rule, shared=True)
    held = run(RandomDecode()).held
    np.testing.assert_array_equal(held[:, :, 0], held[:, :, 1])


def test_each_option_changes_what_is_kept():
    assert_all_differ(RandomDecode(), RandomDecode(seed=1), RandomDecode(n_sink=2))
