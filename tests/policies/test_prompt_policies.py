"""Prompt policies against numbers worked out by hand, and what they refuse."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from jaxkv import (
    H2O,
    LAQ,
    TOVA,
    DapQ,
    ExpectedAttention,
    KNorm,
    Options,
    PyramidKV,
    Random,
    SnapKV,
    StreamingLLM,
)
from jaxkv import state as kv
from jaxkv.kernels.rotary import rotate
from jaxkv.policies.base import Prompt
from jaxkv.policies.expected_attention import expected_attention
from jaxkv.policies.h2o import attention_of_all
from jaxkv.policies.scoring import attention_of_last, keep_anyway, keep_top, pool

LOG = float(np.log(2.0))


def prompt_of(queries, keys, values=None, *, lengths=None, keep=2):
    """One row; `queries` `[T, N]` and `keys` `[T, K]` are the first of two entries.

    The second entry of each is 0, so logits are plain products.
    """
    queries, keys = (
        jnp.stack([jnp.asarray(x, jnp.float32), jnp.zeros_like(jnp.asarray(x), float)])
        .transpose(1, 2, 0)[None]
        .astype(jnp.float32)
        for x in (queries, keys)
    )
    return Prompt(
        queries=queries,
        keys=keys,
        values=keys if values is None else values,
        lengths=jnp.asarray([lengths or queries.shape[1]], jnp.int32),
        keep=jnp.asarray([keep], jnp.int32),
        frequencies=jnp.ones(1),
        scale=1.0,
        implementation="reference",
    )


def kept(policy, prompt, *, heads=None):
    """Return the positions that each head keeps, as lists."""
    heads = heads or prompt.keys.shape[2]
    budget = int(prompt.keep.max())
    policy.check(budget)
    state = kv.init(batch=1, kv_heads=heads, slots=8, head_dim=2, dtype=jnp.float32)
    state = policy.compress(prompt, state, budget=budget)
    return [row[row >= 0].tolist() for row in np.asarray(state.positions)[0]]


# Two heads, five tokens. The last query looks at keys whose weights are powers of two:
# head 0: 1, 4, 1, 8, 2 of 16; head 1: 4, 1, 2, 1, 8 of 16.
KEYS = LOG * np.array([[0, 2], [2, 0], [0, 1], [3, 0], [1, 3]])
ONES = np.ones((5, 2))


def test_tova_averages_over_heads():
    # Means: 5, 5, 3, 9, 10 of 32.
    assert kept(TOVA(), prompt_of(ONES, KEYS)) == [[3, 4], [3, 4]]
    assert kept(TOVA(), prompt_of(ONES, KEYS, keep=3)) == [[0, 3, 4]] * 2


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


def test_knorm_keeps_small_keys():
    assert kept(KNorm(), prompt_of(ONES, KEYS)) == [[0, 2], [1, 3]]


def test_random_depends_on_seed_and_head_but_not_on_the_buffer():
    prompt = prompt_of(np.ones((40, 2)), np.ones((40, 2)), lengths=30, keep=8)
    cut = {
        name: getattr(prompt, name)[:, :30] for name in ("queries", "keys", "values")
    }
    shorter = prompt._replace(**cut)
    first = kept(Random(), prompt)
    assert first == kept(Random(), shorter)
    assert first[0] != first[1]
    assert first != kept(Random(seed=1), prompt)


def test_streaming_llm_by_hand():
    assert kept(StreamingLLM(n_sink=1), prompt_of(ONES, KEYS, keep=3)) == [
        [0, 3, 4],
        [0, 3, 4],
    ]


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


def test_expected_attention_is_the_mean_over_gaussian_queries():
    rng = np.random.default_rng(0)
    length, head_dim = 6, 4
    frequencies = jnp.asarray([1.0, 0.1])
    index = jnp.arange(length)[None]
    plain = jnp.asarray(rng.normal(size=(1, length, 1, head_dim)), jnp.float32)
    keys = jnp.asarray(rng.normal(size=(1, length, 1, head_dim)), jnp.float32)
    values = jnp.asarray(rng.normal(size=(1, length, 1, head_dim)), jnp.float32)
    prompt = Prompt(
        queries=rotate(plain, index, frequencies),
        keys=keys,
        values=values,
        lengths=jnp.asarray([length], jnp.int32),
        keep=jnp.asarray([2], jnp.int32),
        frequencies=frequencies,
        scale=0.5,
    )
    # Draw queries like the prompt's but its first, and turn them by the mean rotation.
    q = np.asarray(plain, np.float64)[0, 1:, 0]
    drawn = rng.multivariate_normal(q.mean(0), np.cov(q.T, bias=True), size=200_000)
    ahead = np.array([6, 7, 8])[:, None] * np.array([1.0, 0.1])
    cos, sin = np.cos(ahead).mean(0), np.sin(ahead).mean(0)
    turned = np.concatenate(
        [
            drawn[:, :2] * cos - drawn[:, 2:] * sin,
            drawn[:, 2:] * cos + drawn[:, :2] * sin,
        ],
        axis=1,
    )
    z = np.exp(0.5 * turned @ np.asarray(keys)[0, :, 0].T).mean(0)
    want = z / z.sum()
    got = expected_attention(
        prompt, n_future_positions=3, n_sink=1, use_covariance=True
    )
    np.testing.assert_allclose(got[0, 0], want, rtol=0.02)
    # Without the spread, a plain softmax of the mean query.
    mean = np.exp(0.5 * turned.mean(0) @ np.asarray(keys)[0, :, 0].T)
    got = expected_attention(
        prompt, n_future_positions=3, n_sink=1, use_covariance=False
    )
    np.testing.assert_allclose(got[0, 0], mean / mean.sum(), rtol=0.02)

    def best(**options):
        policy = ExpectedAttention(n_future_positions=3, n_sink=1, **options)
        return kept_of_four(policy, prompt)

    norms = np.linalg.norm(np.asarray(values)[0, :, 0], axis=-1)
    for options, scores in [
        ({}, want * norms),
        (dict(use_value_norm=False), want),
        (dict(epsilon=10.0), norms),
    ]:
        assert best(**options) == sorted([0, 1 + int(np.argmax(scores[1:]))]), options


def kept_of_four(policy, prompt):
    state = kv.init(batch=1, kv_heads=1, slots=4, head_dim=4, dtype=jnp.float32)
    positions = policy.compress(prompt, state, budget=2).positions
    return positions[0, 0, :2].tolist()


def test_ties_favour_the_earlier_token_and_padding_never_wins():
    prompt = prompt_of(np.ones((6, 1)), np.ones((6, 1)), lengths=4, keep=3)
    state = kv.init(batch=1, kv_heads=1, slots=8, head_dim=2, dtype=jnp.float32)
    scores = jnp.asarray([[[1.0, 5.0, 1.0, 1.0, 9.0, jnp.nan]]])
    positions = keep_top(prompt, scores, state, budget=5).positions
    assert positions[0, 0].tolist() == [0, 1, 2] + [kv.FREE] * 5


def test_pooling_masks_padding_before_and_after():
    scores = jnp.asarray([[[3.0, 1.0, 2.0, 8.0, 9.0]]])
    real = jnp.asarray([[True, True, True, False, False]])
    low = -np.inf
    for pooling, want in [
        ("none", [3, 1, 2, low, low]),
        ("max", [3, 3, 2, low, low]),
        ("avg", [4 / 3, 2, 1, low, low]),
    ]:
        got = pool(scores, real, pooling=pooling, kernel_size=3)
        np.testing.assert_allclose(got[0, 0], want, rtol=1e-6)


@pytest.mark.parametrize("pooling", ["max", "avg"])
def test_a_kernel_wider_than_the_prompt_holds_all_of_it(pooling):
    """Its memory and time are bounded by the prompt, not by what was asked for."""
    scores = jnp.asarray([[[1.0, 3.0, 2.0, 9.0]]])
    real = jnp.asarray([[True, True, True, False]])
    size = 2**30 + 1
    got = pool(scores, real, pooling=pooling, kernel_size=size)[0, 0]
    want = 3.0 if pooling == "max" else 6.0 / size
    np.testing.assert_allclose(got[:3], [want] * 3, rtol=1e-6)
    assert got[3] == -np.inf


def test_kept_anyway_counts_from_each_row_s_end():
    got = keep_anyway(jnp.zeros((2, 1, 5)), jnp.asarray([5, 3]), n_sink=1, n_recent=1)
    assert np.isinf(got[:, 0]).tolist() == [
        [True, False, False, False, True],
        [True, False, True, True, True],  # beyond its end lies padding
    ]


@pytest.mark.parametrize(
    ("policy", "budget", "message"),
    [
        (SnapKV(window_size=0), 8, "SnapKV: window_size must be at least 1"),
        (SnapKV(window_size=8), 1, "SnapKV: budget=1 leaves no slot beside its win"),
        (SnapKV(kernel_size=4), 64, "kernel_size must be odd"),
        (SnapKV(offset=-1), 64, "SnapKV: offset must be >= 0, got -1"),
        (PyramidKV(window_size=8), 1, "PyramidKV: budget=1 leaves no slot"),
        (PyramidKV(beta=0), 64, "beta must be at least 1"),
        (H2O(window_size=0), 8, "H2O: window_size must be at least 1"),
        (H2O(window_size=8), 1, "H2O: budget=1 leaves no slot"),
        (H2O(window_size=None), 1, "H2O: budget=1 leaves no slot"),
        (ExpectedAttention(n_future_positions=0), 8, "n_future_positions must be"),
        (ExpectedAttention(n_future_positions=1 << 17), 8, "between 1 and 65536"),
        (ExpectedAttention(epsilon=-1.0), 8, "epsilon must be >= 0"),
        (ExpectedAttention(epsilon=float("inf")), 8, "and finite, got inf"),
        (ExpectedAttention(n_sink=8), 8, "leaves no slot .* n_sink=8"),
        (DapQ(window_size=0), 8, "DapQ: window_size must be at least 1"),
        (DapQ(prefix=9), 8, "prefix=9 must lie between 0 and window_size=8"),
        (DapQ(content="fixed"), 8, 'content="fixed" needs fixed_ids'),
        (DapQ(kernel_size=2), 8, "kernel_size must be odd"),
        (DapQ(n_sink=-1), 8, "n_sink must be >= 0"),
        (DapQ(n_sink=4, n_recent=4), 8, "n_sink=4 and n_recent=4 keeps anyway"),
        (LAQ(window_size=0), 64, "LAQ: window_size must be at least 1"),
        (LAQ(draft_window_size=0), 64, "LAQ: draft_window_size must be at least 1"),
        (LAQ(kernel_size=4), 64, "LAQ: kernel_size must be odd"),
        (LAQ(), 1, "LAQ: budget=1 leaves no slot"),
        (LAQ(n_recent=64), 64, "LAQ: budget=64 leaves no slot"),
    ],
)
def test_bad_options_are_named(policy, budget, message):
    with pytest.raises(ValueError, match=message):
        policy.check(budget)


def test_layers_of_different_budgets_need_a_decode_that_appends():
    options = Options(budget=64, prefill=PyramidKV(), decode=StreamingLLM())
    with pytest.raises(ValueError, match="PyramidKV gives layers different budgets"):
        options.check()
    dataclasses.replace(options, prefill=SnapKV()).check()


def test_named_profiles():
    assert SnapKV.longbench() == SnapKV(window_size=32, kernel_size=7, pooling="max")
    assert SnapKV.kvpress() == SnapKV(window_size=64, kernel_size=5, pooling="avg")
    assert SnapKV.kvpress(window_size=8).window_size == 8
    assert PyramidKV.kvpress() == PyramidKV(
        window_size=64, kernel_size=5, pooling="avg"
    )
    paper = DapQ(window_size=32, prefix=4, reduction="sum", kernel_size=7)
    assert DapQ.literal() == dataclasses.replace(paper, pooling="none")
    assert DapQ.tables(offset=2) == dataclasses.replace(paper, offset=2)
