"""PyramidKV's budgets of the layers, by hand."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from jaxkv import Options, PyramidKV, SnapKV, StreamingLLM


def test_budgets_of_a_pyramid():
    """Integers worked out by hand: 32 layers, budget 256, window 32, beta 20.

    `c = 224`, the highest 2 x 224 - 11 = 437, the lowest 11, steps of 426 // 31 = 13;
    all together 368 tokens more than 32 x 256, as the paper on DapQ measured.
    """
    policy = PyramidKV()
    keep, lengths = np.array([256, 256, 256]), np.array([5000, 400, 200])
    budgets = np.array(policy.layer_keeps(keep, lengths, 32))
    assert budgets[0, 0] == 437 + 32
    assert budgets[1, 0] == 437 + 32 - 13
    assert budgets[31, 0] == 437 + 32 - 31 * 13
    assert budgets[:, 0].sum() == 32 * 256 + 368
    assert (budgets[:, 1] == 256).all()  # shorter than 2 c
    assert (budgets[:, 2] == 256).all()  # fits
    # No layer gets more than there is: 460 - 32 = 428 < 437; then the lowest is 20.
    (short,) = np.array(policy.layer_keeps(keep[:1], np.array([460]), 32)).T
    assert (short[0], short[31]) == (460, 460 - 31 * (408 // 31))
    # A budget of any size, whose double would leave int32.
    huge = np.array([2**31 - 1], np.int32)
    assert (np.array(policy.layer_keeps(huge, np.array([200]), 4)) == huge).all()
    # The window takes it all, so there is nothing to share out.
    assert (
        np.array(policy.layer_keeps(np.array([32, 5]), lengths[:2], 4)) == [32, 5]
    ).all()
    np.testing.assert_array_equal(
        np.array(policy.layer_keeps(jnp.asarray(keep), jnp.asarray(lengths), 32)),
        budgets,
    )


@pytest.mark.parametrize("layers", [1, 3, 8])
def test_slots_of_a_pyramid_are_enough(layers):
    policy = PyramidKV(window_size=2, beta=3)
    slots = np.array(policy.layer_budgets(20, layers))[:, None]
    lengths = np.arange(1, 60)
    for budget in range(2, 21):
        keep = np.full_like(lengths, budget)
        keeps = np.array(policy.layer_keeps(keep, lengths, layers))
        assert (np.minimum(keeps, lengths) <= slots).all()
        assert (keeps >= 2).all()
        whole = lengths <= budget
        assert (keeps[:, whole] >= lengths[whole]).all()


def test_layers_of_different_budgets_need_a_decode_that_appends():
    options = Options(budget=64, prefill=PyramidKV(), decode=StreamingLLM())
    with pytest.raises(ValueError, match="PyramidKV gives layers different budgets"):
        options.check()
    dataclasses.replace(options, prefill=SnapKV()).check()
