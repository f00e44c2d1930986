"""How long a matcher takes: its drafts alone, in a compiled loop of their own.

Inside a generation the matcher is a part of one compiled program and cannot be told
from the network by a clock. What it does depends on the shapes alone, not on the text,
so that a loop of drafts with the same shapes takes as long.
"""

import jax
import jax.numpy as jnp
import numpy as np

from jaxkv.bench import clock
from jaxkv.speculation.drafters import Drafter
from jaxkv.speculation.matching import Context


def time_matcher(
    drafter: Drafter, *, batch: int, width: int, repeats: int, rounds: int = 64
) -> float:
    """Return the median milliseconds of one draft from a text that repeats itself.

    Args:
      drafter: static.
      batch: rows.
      width: tokens of prompt and output together, those to come included; at least 16.
      repeats: timed calls, of `rounds` drafts in one compiled loop each.
      rounds: see there.
    """
    rounds = min(rounds, width // 2)
    prompt = width - rounds
    rng = np.random.default_rng(0)
    passage = rng.integers(0, 50_000, (batch, max(prompt // 40, 8)))
    text = np.tile(passage, (1, width // passage.shape[1] + 1))[:, :width]
    expected = rng.random((batch, prompt, 1)) < 0.5
    first = np.where(expected, text[:, :prompt, None], 7)
    three = np.concatenate([first, first + 1, first + 2], axis=2)
    lengths = jnp.full(batch, prompt, jnp.int32)
    arrays = jnp.asarray(text, jnp.int32), jnp.asarray(three, jnp.int32)

    @jax.jit
    def loop(text, likeliest):
        def body(i, total):
            pool = jnp.stack([jnp.zeros_like(lengths), lengths], axis=1)
            context = Context(text, lengths + i, lengths, pool, likeliest)
            tree = drafter.draft(context)
            return total + sum(x.sum(dtype=jnp.int32) for x in tree)

        return jax.lax.fori_loop(0, rounds, body, jnp.int32(0))

    seconds = clock.median_seconds(lambda: loop(*arrays), repeats)
    return 1e3 * seconds / rounds
