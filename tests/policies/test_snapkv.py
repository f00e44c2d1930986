"""SnapKV and its window, by hand."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
from prompts_by_hand import KEYS, LOG, ONES, kept, prompt_of

from jaxkv import H2O, DapQ, PyramidKV, SnapKV
from jaxkv.kernels.rotary import rotate
from jaxkv.policies.scoring import attention_of_last


def test_snapkv_keeps_its_window_and_the_best_before_it():
    prompt = prompt_of(ONES, KEYS, keep=2)
    assert kept(SnapKV(window_size=1, pooling="none"), prompt) == [[3, 4], [0, 4]]
    # Two queries: the one before sees 1, 4, 1, 8 of 14, and 4, 1, 2, 1 of 8.
    prompt = prompt_of(ONES, KEYS, keep=3)
    assert kept(SnapKV(window_size=2, pooling="none"), prompt) == [
        [1, 3, 4],
        [0, 3, 4],
    ]


def test_snapkv_pools_what_lies_before_the_window_only():
    # Weights of the last query: 4, 1, 1, 1, 2, 16; the window is the last token.
    keys = LOG * np.array([[2], [0], [0], [0], [1], [4]])
    prompt = prompt_of(np.ones((6, 1)), keys, keep=3)
    max3 = SnapKV(window_size=1, kernel_size=3, pooling="max")
    # 4, 4, 1, 2, 2 after pooling; with the window's 16 it would have been 4's turn.
    assert kept(max3, prompt) == [[0, 1, 5]]
    # (0 + 4 + 1), (4 + 1 + 1), 3, 4, (1 + 2 + 0)
    assert kept(dataclasses.replace(max3, pooling="avg"), prompt) == [[0, 1, 5]]
    prompt = prompt._replace(keep=jnp.asarray([2]))
    assert kept(dataclasses.replace(max3, pooling="avg"), prompt) == [[1, 5]]


def test_snapkv_s_window_can_be_turned_ahead():
    """One head, frequency 1: turned by one radian a position, until the key is met."""
    angles = jnp.asarray([1.0, 2.0, 3.0, 0.0, 0.0])
    arrows = jnp.stack([jnp.cos(angles), jnp.sin(angles)], axis=-1)[None, :, None]
    prompt = prompt_of(np.ones((5, 1)), np.ones((5, 1)), keep=2)
    prompt = prompt._replace(queries=arrows, keys=arrows)
    policy = SnapKV(window_size=1, pooling="none")
    for offset, best in ((0, 3), (1, 0), (2, 1), (3, 2)):
        turned = dataclasses.replace(policy, offset=offset)
        assert kept(turned, prompt) == [[best, 4]]
    # Not only the first query of a window, and pyramids too.
    for two in (SnapKV(window_size=2, offset=2), PyramidKV(window_size=2, offset=2)):
        two = dataclasses.replace(two, pooling="none")
        three = prompt._replace(keep=jnp.asarray([3]))
        assert kept(two, three) == [[1, 3, 4]]


def test_a_turned_query_is_the_query_of_the_later_position():
    rng = np.random.default_rng(0)
    frequencies = jnp.asarray([1.0, 0.1])
    plain = jnp.asarray(rng.normal(size=(1, 6, 2, 4)), jnp.float32)
    index = jnp.arange(6)[None]
    prompt = prompt_of(np.ones((6, 1)), np.ones((6, 1)))._replace(
        queries=rotate(plain, index, frequencies),
        keys=rotate(plain[:, :, :1], index, frequencies),
        frequencies=frequencies,
    )
    later = prompt._replace(queries=rotate(plain, index + 7, frequencies))
    turned = attention_of_last(prompt, 3, offset=7)
    np.testing.assert_allclose(turned, attention_of_last(later, 3), rtol=1e-5)
    assert not np.allclose(turned, attention_of_last(prompt, 3), rtol=1e-2)


@pytest.mark.parametrize("policy", [SnapKV, H2O, PyramidKV])
def test_a_budget_within_the_window_shortens_it(policy):
    """The same as if the window had been asked for that is left."""
    options = {} if policy is H2O else dict(pooling="none")
    for keep in (2, 3, 4):
        # Room for more in the batch, and a window beyond the prompt, change nothing.
        prompt = prompt_of(ONES, KEYS, keep=keep)
        want = kept(policy(window_size=keep - 1, **options), prompt)
        assert all(len(row) == keep for row in want)
        for size in (keep, 5, 32, 2**31 - 1):
            assert kept(policy(window_size=size, **options), prompt) == want


def test_named_profiles():
    assert SnapKV.longbench() == SnapKV(window_size=32, kernel_size=7, pooling="max")
    assert SnapKV.kvpress() == SnapKV(window_size=64, kernel_size=5, pooling="avg")
    assert SnapKV.kvpress(window_size=8).window_size == 8
    assert PyramidKV.kvpress() == PyramidKV(
        window_size=64, kernel_size=5, pooling="avg", shares="kvpress"
    )
    paper = DapQ(prefix=4, reduction="sum", kernel_size=7, clusters=0)
    assert paper.window_size == 32
    assert DapQ.literal() == dataclasses.replace(paper, pooling="none")
    assert DapQ.tables(offset=2) == dataclasses.replace(paper, offset=2)
