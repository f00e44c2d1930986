"""R-KV against the simulation."""

import dataclasses

import numpy as np
from simulation import (
    HEAD,
    assert_all_differ,
    assert_as_simulated,
    assert_reference_decides_the_same,
    run,
)

from jaxkv import RKV


def rule(held, queries, keys, values, sums, *, mix=0.3, window=3, kernel=3):
    old = len(held) - window
    logits = (queries[-window:] @ keys[:old].T / np.sqrt(HEAD)).max(1)
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    mean = (weights / weights.sum(-1, keepdims=True)).mean(0)
    padded = np.pad(mean, kernel // 2)
    important = np.lib.stride_tricks.sliding_window_view(padded, kernel).max(-1)
    unit = keys / np.linalg.norm(keys, axis=-1, keepdims=True)
    similarity = unit @ unit.T
    np.fill_diagonal(similarity, 0)
    for row in similarity:
        if (row > 0.5).any():
            row[np.flatnonzero(row > 0.5)[-1]] = 0
    redundant = np.exp(similarity.mean(0))
    redundant /= redundant.sum()
    score = mix * important - (1 - mix) * redundant[:old]
    return np.concatenate([score, np.full(window, np.inf)])


SMALL = RKV(mix_lambda=0.3, window_size=3, kernel_size=3, buffer=4)


def test_against_the_simulation():
    assert_as_simulated(SMALL, rule, count=4, early=1)
    assert_reference_decides_the_same(SMALL)
    held = run(SMALL).held
    assert (held[:, :, 0] != held[:, :, 1]).any()


def test_each_option_changes_what_is_kept():
    changes = dict(
        mix_lambda=0.9, window_size=2, kernel_size=1, buffer=2, threshold=0.95
    )
    changed = (dataclasses.replace(SMALL, **{k: v}) for k, v in changes.items())
    assert_all_differ(SMALL, *changed)
