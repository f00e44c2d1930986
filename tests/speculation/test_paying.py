"""Drafts that pay or stay out of the way: what outputs would cost at given prices.

The network is a reader: it says the next token of a script, whatever it is fed, so that
hundreds of tokens take no time. What is counted are plain steps.
"""

import dataclasses
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxkv import Options, Tree, generation
from jaxkv.speculation import loop
from jaxkv.speculation.rules import Exact

PROMPT, NEW, WORDS = 192, 320, 97
NEVER = np.inf
TREE = Tree()  # of 4 and of 16 nodes


@dataclasses.dataclass(frozen=True)
class Reader:
    """A network that reads what comes next from its parameters, int32 `[1, W]`."""

    @property
    def config(self):
        return SimpleNamespace(vocab_size=WORDS, num_layers=0)

    def apply(self, variables, *args, method=None):
        if method == "unembed":
            return 9 * jax.nn.one_hot(args[0][..., 0], WORDS, dtype=jnp.float32)
        _, positions, cache, _ = args
        return jnp.take(variables["params"][0], positions + 1)[..., None], cache


advance = jax.jit(generation.advance, static_argnames=("network", "options"))


def script(kind):
    """Return prompt and output, of which the first half repeats the prompt, or all."""
    rng = np.random.default_rng(0)
    text = rng.integers(0, WORDS, PROMPT + NEW + 1)
    copied = {"new": 0, "half copied": NEW // 2, "copied": NEW + 1}[kind]
    text[PROMPT : PROMPT + copied] = np.resize(text[:PROMPT], copied)
    return jnp.asarray(text[None], jnp.int32)


def cost(kind, prices, told=None):
    """Return plain steps that an output takes, and the tokens that it has."""
    text, one = script(kind), jnp.ones(1, jnp.int32)
    first = text[:, PROMPT]
    g = generation.Generation(
        tokens=jnp.full((1, NEW), -1, jnp.int32).at[:, 0].set(first),
        lengths=one,
        done=one == 0,
        finite=one == 1,
        last=first,
        position=PROMPT * one,
        cache=(),
        rngs=jax.random.split(jax.random.key(0), 1),
        seen=None,
        speculation=loop.begin(
            *(TREE, text[:, :PROMPT], PROMPT * one, first), rule=Exact(), max_out=NEW
        ),
    )
    prices = jnp.asarray(prices if told is None else told, jnp.float32)
    end = advance(
        *(Reader(), text, g, jnp.int32(NEW), -one, prices),
        options=Options(speculate=TREE),
    )
    np.testing.assert_array_equal(end.tokens, text[:, PROMPT : PROMPT + NEW])
    counts = end.speculation.counts
    return int(counts.steps[0]), int(counts.tree_steps[0])


def plain_steps(kind, prices):
    """Return what an output costs with these prices, and with trees in any case."""
    (width,) = np.flatnonzero(np.isfinite(prices))
    steps, trees = cost(kind, prices)
    always, tried = cost(kind, prices, told=np.where(np.isfinite(prices), 1, NEVER))
    more = prices[width] - 1
    return steps + more * trees, always + more * tried


PRICES = [
    (1.05, NEVER),
    (NEVER, 1.15),
    (1.6, NEVER),
    (NEVER, 3.0),
    (NEVER, 20.0),
]


@pytest.mark.parametrize("prices", PRICES)
@pytest.mark.parametrize("kind", ["new", "half copied"])
def test_drafts_never_cost_much(kind, prices):
    ours, _ = plain_steps(kind, prices)
    assert ours <= 1.03 * (NEW - 1)


@pytest.mark.parametrize("prices", PRICES)
def test_drafts_that_succeed_are_used(prices):
    ours, always = plain_steps("copied", prices)
    best = min(always, NEW - 1)
    # What is dear is looked at before it is fed, for a few steps.
    assert ours <= best / 0.95 + (24 if max(p for p in prices if p < NEVER) > 2 else 0)
