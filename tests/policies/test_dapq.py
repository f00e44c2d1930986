"""DapQ: contents and places of pseudo tokens, one pass equals two, what it keeps."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from tiny import NETWORK

from jaxkv import LAQ, DapQ, Options, forward
from jaxkv import state as kv
from jaxkv.attention import append_tokens
from jaxkv.policies.base import Prompt

PROMPT, NEW, BUDGET = 24, 4, 8
LENGTHS = [PROMPT, 3, 13]
SMALL = DapQ(window_size=6, prefix=2, reduction="sum", kernel_size=3, clusters=0)


@pytest.fixture
def params():
    return tiny.params()


def prompts(seed=0):
    return tiny.prompts(seed, LENGTHS, PROMPT)


@functools.cache
def program(policy, budget=BUDGET, implementation=None):
    options = Options(
        budget=budget, prefill=policy, scores_implementation=implementation
    )
    options.check()
    slots = options.num_slots(PROMPT, NEW)
    prefill = functools.partial(forward.prefill, NETWORK, options=options, slots=slots)
    return jax.jit(prefill)


def contents(policy, tokens, lengths):
    return np.asarray(
        policy.pseudo_tokens(tokens, lengths, vocab_size=61, sketch=None)
    ).tolist()


TOKENS = jnp.asarray([[10, 11, 12, 13, 14, 15, 16, 17], [20, 21, 22, 0, 0, 0, 0, 0]])
ROWS = jnp.asarray([8, 3], jnp.int32)


def test_prefix_and_suffix_by_hand():
    first, second = contents(DapQ(window_size=5, prefix=2), TOKENS, ROWS)
    assert first == [10, 11, 15, 16, 17]
    assert second == [20, 21, 20, 21, 22]  # they overlap
    _, second = contents(DapQ(window_size=7, prefix=4), TOKENS, ROWS)
    assert second == [20, 21, 22, 20, 20, 21, 22]  # the prefix goes round the prompt
    _, second = contents(DapQ(window_size=5, prefix=0), TOKENS, ROWS)
    assert second == [21, 22, 20, 21, 22]  # and so does the suffix, backwards
    first, _ = contents(DapQ(window_size=4, prefix=4), TOKENS, ROWS)
    assert first == [10, 11, 12, 13]


def test_other_contents():
    fixed = DapQ(window_size=5, prefix=2, content="fixed", fixed_ids=(7, 8, 9))
    assert contents(fixed, TOKENS, ROWS) == [[7, 8, 9, 7, 8]] * 2
    lengths = jnp.asarray([8, 8], jnp.int32)
    tokens = TOKENS.at[1].set(TOKENS[0])
    for content in ("random_tokens", "random_span", "vocabulary"):
        policy = DapQ(window_size=4, content=content)
        first, second = contents(policy, tokens, lengths)
        assert first == second  # a row gets what it gets alone
        assert [first] == contents(policy, tokens[:1, :8], lengths[:1])
        drawn = {
            tuple(contents(dataclasses.replace(policy, seed=s), tokens, lengths)[0])
            for s in range(8)
        }
        assert len(drawn) > 2
        for one in drawn:
            assert content == "vocabulary" or set(one) <= set(range(10, 18))
            if content == "random_span":
                assert list(one) == list(range(one[0], one[0] + 4))
    _, short = contents(DapQ(window_size=4, content="random_span"), TOKENS, ROWS)
    assert short == [20, 21, 22, 20]


def test_pseudo_tokens_stand_right_behind_each_row():
    extra = jnp.asarray([[1, 2], [3, 4]], jnp.int32)
    tokens, positions = append_tokens(TOKENS, ROWS, extra, offset=0)
    assert tokens.shape == (2, 64)
    assert tokens[0, :11].tolist() == [10, 11, 12, 13, 14, 15, 16, 17, 1, 2, 0]
    assert tokens[1, :6].tolist() == [20, 21, 22, 3, 4, 0]
    np.testing.assert_array_equal(positions, np.tile(np.arange(64), (2, 1)))
    _, positions = append_tokens(TOKENS, ROWS, extra, offset=5)
    assert positions[1, :5].tolist() == [0, 1, 2, 8, 9]
    _, positions = append_tokens(TOKENS, ROWS, extra, offset=-5)
    assert positions[0, 8:10].tolist() == [3, 4]
    assert positions[1, 3:5].tolist() == [0, 1]  # not before the beginning
    same, _ = append_tokens(TOKENS, ROWS, extra[:, :0], offset=0)
    np.testing.assert_array_equal(same, TOKENS)


def plain_attention(q, k, v, whole, weighing):
    """Float32 softmax of one unpadded row; gives `q` and `k` back as the state."""
    del whole, weighing
    repeat = q.shape[2] // k.shape[2]
    keys, values = (jnp.repeat(x, repeat, axis=2) for x in (k, v))
    logits = jnp.einsum("btnh,bsnh->bnts", q, keys) / np.sqrt(q.shape[-1])
    causal = jnp.tril(jnp.ones(logits.shape[2:], bool))
    weights = jax.nn.softmax(jnp.where(causal, logits, -jnp.inf), axis=-1)
    return jnp.einsum("bnts,bsnh->btnh", weights, values), weights


@jax.jit
def plain_network(params, tokens, positions):
    return NETWORK.apply(
        {"params": params}, tokens, positions, (None, None), plain_attention
    )


def scores_by_hand(params, row, pseudo, positions):
    """Return each layer's weights `[N, W, L]`, from a row without any padding."""
    tokens = jnp.concatenate([row, pseudo])[None]
    length = row.shape[0]
    _, weights = plain_network(params, tokens, positions[None])
    return [np.asarray(w)[0, :, length:, :length] for w in weights]


def smooth(scores, kernel):
    padded = np.pad(scores, ((0, 0), (kernel // 2,) * 2), constant_values=-np.inf)
    windows = np.lib.stride_tricks.sliding_window_view(padded, kernel, axis=1)
    return windows.max(-1)


@pytest.mark.parametrize(
    "policy",
    [
        SMALL,
        dataclasses.replace(SMALL, pooling="none", offset=4),
        dataclasses.replace(SMALL, pooling="none", granularity="query_head"),
        dataclasses.replace(SMALL, pooling="none", reduction="max"),
    ],
    ids=["pooled", "literal, offset", "query heads", "largest"],
)
def test_one_pass_equals_two(params, policy):
    """What is kept is what a plain softmax over each row alone says should be."""
    tokens, lengths = prompts()
    _, cache = program(policy)(params, tokens, lengths)
    for row, length in enumerate(LENGTHS):
        pseudo = contents(policy, tokens, lengths)[row]
        behind = length + policy.offset + np.arange(policy.window_size)
        positions = jnp.asarray(np.concatenate([np.arange(length), behind]))
        layers = scores_by_hand(
            params, tokens[row, :length], jnp.asarray(pseudo), positions
        )
        for scores, state in zip(layers, cache, strict=True):
            if policy.granularity == "kv_head":
                scores = scores.reshape(2, 2, -1, length).mean(1)
            scores = scores.max(1) if policy.reduction == "max" else scores.sum(1)
            if policy.pooling == "max":
                scores = smooth(scores, policy.kernel_size)
            for head, held in enumerate(np.asarray(state.positions)[row]):
                held = held[held >= 0]
                assert len(held) == min(BUDGET, length)
                best = np.sort(scores[head])[::-1]
                least = best[len(held) - 1]
                # Ties by pooling are fair; a worse token than the last one is not.
                assert (scores[head][held] >= least - 1e-5).all()


@pytest.mark.slow
def test_query_heads_store_more_and_decode_the_same(params):
    """At full budget each query head has its own copy, and nothing else changes."""
    tokens, lengths = prompts(2)
    by_query = dataclasses.replace(SMALL, granularity="query_head")
    both = [
        program(policy, PROMPT)(params, tokens, lengths) for policy in (SMALL, by_query)
    ]
    (_, shared), (_, apart) = both
    assert apart[0].keys.shape[1] == 2 * shared[0].keys.shape[1]
    assert kv.num_bytes(apart) == 2 * kv.num_bytes(shared)
    step = jax.jit(
        lambda cache: forward.decode_step(
            NETWORK,
            params,
            jnp.asarray([1, 2, 3], jnp.int32),
            lengths,
            cache,
            options=Options(),
        ),
    )
    (want, _), (got, after) = step(shared), step(apart)
    np.testing.assert_allclose(got, want, rtol=2e-4, atol=2e-4)
    count = np.asarray(kv.occupancy(after[0]))
    np.testing.assert_array_equal(count, np.tile(lengths[:, None] + 1, (1, 4)))
    # With a small budget heads of one group keep different tokens.
    _, cache = program(by_query)(params, tokens, lengths)
    heads = np.asarray(cache[1].positions)[0]
    assert (heads[0] != heads[1]).any()


@pytest.mark.slow
def test_implementations_of_the_scores_agree(params):
    tokens, lengths = prompts()
    one, two = (
        program(SMALL, BUDGET, name)(params, tokens, lengths)[1]
        for name in ("reference", "xla")
    )
    for a, b in zip(one, two, strict=True):
        np.testing.assert_array_equal(a.positions, b.positions)


@pytest.mark.parametrize(
    "change",
    [
        dict(window_size=3),
        dict(pooling="none"),
        dict(pooling="avg"),
        dict(reduction="max"),
        dict(kernel_size=5),
        dict(n_recent=3),
        dict(n_sink=3),
    ],
    ids=str,
)
def test_each_option_changes_what_is_kept(change):
    """Contents and offset have tests of their own above."""
    rng = np.random.default_rng(0)
    queries, keys = (
        jnp.asarray(2 * rng.normal(size=(1, 40, heads, 8)), jnp.float32)
        for heads in (4, 2)
    )
    lengths = jnp.asarray([30], jnp.int32)

    @functools.partial(jax.jit, static_argnums=0)
    def positions(policy):
        prompt = Prompt(
            *(queries, keys, keys, lengths, lengths * 0 + 8, jnp.ones(4), 0.3)
        )
        empty = kv.init(batch=1, kv_heads=2, slots=8, head_dim=8, dtype=jnp.float32)
        return policy.compress(prompt, empty, budget=8).positions[0]

    before = positions(SMALL)
    after = positions(dataclasses.replace(SMALL, **change))
    assert (before != after).any()
    if "n_recent" in change:
        assert after[:, 5:].tolist() == [[27, 28, 29]] * 2
        laq = LAQ(window_size=6, draft_window_size=2, kernel_size=3)
        assert (positions(laq) == before).all()
        assert (positions(dataclasses.replace(laq, **change)) == after).all()
    if "n_sink" in change:
        assert after[:, :3].tolist() == [[0, 1, 2]] * 2


def test_keep_needs_a_budget(params):
    tokens, lengths = prompts()
    with pytest.raises(ValueError, match=r"set Options\(budget=\)"):
        forward.prefill(
            *(NETWORK, params, tokens, lengths),
            options=Options(),
            slots=PROMPT,
            keep=lengths,
        )
