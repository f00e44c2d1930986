"""H2O, for the prompt by hand and for decoding against the simulation."""

import numpy as np
from prompts_by_hand import KEYS, ONES, kept, prompt_of
from simulation import (
    SLOTS,
    assert_all_differ,
    assert_as_simulated,
    assert_reference_decides_the_same,
    protect,
    run,
)

from jaxkv import H2O, H2ODecode, SnapKV
from jaxkv.policies.h2o import attention_of_all


def test_h2o_windowed_is_snapkv_without_pooling():
    prompt = prompt_of(ONES, KEYS, keep=3)
    plain = kept(SnapKV(window_size=2, pooling="none"), prompt)
    assert kept(H2O(window_size=2), prompt) == plain


def test_true_h2o_accumulates_over_all_queries():
    # One head, all keys equal: query i gives 1 / (i + 1) to each of its keys.
    prompt = prompt_of(np.ones((4, 1)), np.zeros((4, 1)), lengths=3)
    scores = attention_of_all(prompt, chunk=3)  # 4 is no multiple of 3; one is padding
    want = [1 + 1 / 2 + 1 / 3, 1 / 2 + 1 / 3, 1 / 3, 0]
    np.testing.assert_allclose(scores[0, 0], want, rtol=1e-6)
    # Half of 2 is recent, the other half the heaviest; by position they are 0 and 3.
    prompt = prompt_of(np.ones((5, 1)), np.zeros((5, 1)), keep=2)
    assert kept(H2O(window_size=None), prompt) == [[0, 4]]
    prompt = prompt_of(np.ones((5, 1)), np.zeros((5, 1)), keep=4)
    assert kept(H2O(window_size=None), prompt) == [[0, 1, 3, 4]]


def rule(held, queries, keys, values, sums):
    return protect(sums, held, n_recent=SLOTS // 2)


def test_decoding_against_the_simulation():
    assert_as_simulated(H2ODecode(), rule)
    assert_reference_decides_the_same(H2ODecode())
    held = run(H2ODecode()).held
    assert (held[:, :, 0] != held[:, :, 1]).any()


def test_each_option_changes_what_is_kept():
    assert_all_differ(*(H2ODecode(n_recent=recent) for recent in (0, 4, 0.5)))
