"""VATP against the simulation."""

import numpy as np
from simulation import assert_all_differ, assert_as_simulated, protect

from jaxkv import VATP


def rule(held, queries, keys, values, sums):
    return protect(sums * np.abs(values).sum(-1), held, n_sink=2, n_recent=3)


def test_against_the_simulation():
    assert_as_simulated(VATP(n_sink=2, n_recent=3), rule)


def test_each_option_changes_what_is_kept():
    assert_all_differ(VATP(n_sink=0), VATP(n_sink=3), VATP(n_sink=3, n_recent=2))
