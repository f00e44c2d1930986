"""LAQ: what it sketches."""

import numpy as np
import pytest
from tiny import prompts

from jaxkv import LAQ, DapQ, Options, SnapKV
from jaxkv.laws.programs import LENGTHS, PROMPT, generate, prefill


@pytest.mark.slow
def test_it_sketches_what_greedy_decoding_gives():
    """Its pseudo tokens are the output of generation from SnapKV's cache."""
    tokens, lengths = prompts(4, LENGTHS, PROMPT)
    policy = LAQ(window_size=4, draft_window_size=3, kernel_size=3)
    assert policy.sketch_policy == SnapKV(window_size=3, kernel_size=3)
    evicted = Options(budget=8, prefill=policy.sketch_policy)
    out = generate(evicted, tokens, lengths, new=4).tokens
    same = DapQ(
        window_size=4,
        content="fixed",
        fixed_ids=tuple(np.asarray(out)[0, :4].tolist()),
        reduction="sum",
        kernel_size=3,
    )
    (_, cache), (_, want) = (
        prefill(policy, tokens, keep=[8] * 3) for policy in (policy, same)
    )
    for a, b in zip(cache, want, strict=True):
        np.testing.assert_array_equal(a.positions[0], b.positions[0])
