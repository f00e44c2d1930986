"""The model of the engine's tests, prompts for it, and what each gives alone."""

import dataclasses
import functools

import jax.numpy as jnp
import numpy as np
from tiny import CONFIG, language_model, parameters

import jaxkv
from jaxkv import Categorical, Greedy

BROKEN = CONFIG.vocab_size - 1  # a prompt with this token has no finite logits
MOST = 12  # tokens of the longest output

SAMPLERS = {"greedy": Greedy(), "drawn": Categorical(temperature=0.7, top_k=20)}


@functools.cache
def model():
    config = dataclasses.replace(CONFIG, tied=False, max_positions=512)
    weights = dict(parameters(config))
    weights["embedding"] = weights["embedding"].at[BROKEN].set(jnp.nan)
    weights["head"] = weights["head"].at[:, BROKEN].set(0)  # is not chosen
    return language_model(config=config, weights=weights)


@functools.cache
def prompt(number):
    """Return a random prompt of 1 to 64 tokens, the same for the same number."""
    rng = np.random.default_rng(number)
    return tuple(rng.integers(0, BROKEN, rng.integers(1, 65)).tolist())


@functools.cache
def alone(number, sampler, options):
    """Return the tokens that `generate` gives a prompt, drawn with its number."""
    out = jaxkv.generate(
        model(),
        [prompt(number)],
        sampler=SAMPLERS[sampler],
        seed=number,
        max_new_tokens=MOST,
        **dict(options),
    )
    return out.tokens[0]
