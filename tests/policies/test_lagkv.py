"""LagKV, by hand."""

import jax.numpy as jnp
import numpy as np
from prompts_by_hand import prompt_of

from jaxkv import LagKV

# One sink, three partitions of two tokens, one token behind them. The second partition
# spans [0, 1] in both channels, as the third does. In the range of the next one, tokens
# of the first partition are (1, 0) and (1, 1), those of the second (0, 1) and (1, 0.5).
PAIRS = [[0, 0], [1, 0], [1, 1], [0, 1], [1, 0.5], [0, 1], [1, 0], [9, 9]]
EVEN = [[0, 0], [1, 0], [1, 1], [1, 1], [1, 1], [0, 0], [1, 1], [9, 9]]


def scores(pairs, lengths=8, **options):
    pairs = jnp.asarray(pairs, jnp.float32)[None, :, None]
    prompt = prompt_of(np.ones((8, 1)), np.ones((8, 1)), lengths=lengths)
    prompt = prompt._replace(keys=pairs, values=pairs)
    options = dict(n_sink=1, lag_size=2) | options
    return np.asarray(LagKV(**options).scores(prompt))[0, 0]


def test_what_varies_more_than_its_reference_ranks_higher():
    got = scores(PAIRS)
    assert np.isinf(got[0])  # the sink
    assert (np.diff(got[5:]) > 0).all() and got[5] > 1  # no reference; newest first
    assert got[1:5].tolist() == [0.5, 0.0, 0.5, 0.0]
    # The last token is padding, and with it goes nothing; with two more, a partition.
    assert scores(PAIRS, 7)[:5].tolist() == got[:5].tolist()
    assert (scores(PAIRS, 6)[3:] > 1).all() and scores(PAIRS, 6)[1] == 0.5
    assert (scores(PAIRS, lag_size=4) > 1).all()  # no two partitions


def test_scores_of_partitions_can_be_compared_as_they_are():
    spread = np.exp(np.sqrt(0.5))  # of (1, 0) and (0, 1)
    least = np.exp(np.sqrt(0.5) / 2)  # of (1, 0.5)
    first = scores([*PAIRS[:4], [1, 0], *PAIRS[5:]], cross_scoring=True)[1:3]
    np.testing.assert_allclose(
        first, [spread / (spread + 1), 1 / (spread + 1)], rtol=1e-6
    )
    second = scores(PAIRS, cross_scoring=True)[3:5]
    total = spread + least
    np.testing.assert_allclose(second, [spread / total, least / total], rtol=1e-6)


def test_a_reference_that_does_not_vary_divides_by_nothing():
    assert not np.isnan(scores(EVEN, cross_scoring=True)).any()
