"""TOVA, for the prompt by hand and for decoding against the simulation."""

import numpy as np
from prompts_by_hand import KEYS, ONES, kept, prompt_of
from simulation import assert_as_simulated, run, weights_of

from jaxkv import TOVA, TOVADecode


def test_tova_averages_over_heads():
    # Means: 5, 5, 3, 9, 10 of 32.
    assert kept(TOVA(), prompt_of(ONES, KEYS)) == [[3, 4], [3, 4]]
    assert kept(TOVA(), prompt_of(ONES, KEYS, keep=3)) == [[0, 3, 4]] * 2


def rule(held, queries, keys, values, sums):
    return weights_of(queries[-1], keys).mean(0)


def test_decoding_against_the_simulation():
    assert_as_simulated(TOVADecode(), rule, shared=True)
    held = run(TOVADecode()).held
    np.testing.assert_array_equal(held[:, :, 0], held[:, :, 1])
