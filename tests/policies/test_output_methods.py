"""KVzip, DropKV and DefensiveKV, against plain loops over queries in NumPy."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
from prompts_by_hand import ONES, prompt_of

from jaxkv import DefensiveKV, DropKV, KVzip

LENGTH, HEADS, KV, SIZE = 9, 4, 2, 3


def drawn(length=LENGTH, total=LENGTH, keep=6, scale=1.0):
    """Return a prompt of `length` tokens in a buffer of `total`."""
    rng = np.random.default_rng(1)
    shapes = dict(queries=HEADS, keys=KV, values=KV)
    arrays = {
        name: jnp.asarray(scale * rng.normal(size=(1, total, heads, SIZE)), jnp.float32)
        for name, heads in shapes.items()
    }
    output = jnp.asarray(rng.normal(size=(HEADS, SIZE, 5)), jnp.float32)
    base = prompt_of(ONES, ONES, keep=keep)._replace(**arrays, output=output)
    return base._replace(lengths=jnp.asarray([length], jnp.int32))


def paid(prompt, query, head):
    """Return what a query of a head pays to the tokens it sees."""
    keys = np.asarray(prompt.keys)[0, : query + 1, head // (HEADS // KV)]
    logits = keys @ np.asarray(prompt.queries)[0, query, head]
    weights = np.exp(logits - logits.max())
    return weights / weights.sum()


def written(prompt, head, order):
    values = np.asarray(prompt.values)[0, :, head // (HEADS // KV)]
    return np.linalg.norm(values @ np.asarray(prompt.output)[head], ord=order, axis=-1)


@pytest.mark.parametrize("plus", [False, True])
def test_kvzip_takes_the_largest_attention_of_the_repeated_prompt(plus):
    length, asked = 4, 2
    prompt = drawn(length, 2 * length + asked + 3)
    want = np.zeros((KV, length))
    for head in range(HEADS):
        for query in range(length, 2 * length + asked):
            seen = paid(prompt, query, head)[:length]
            if plus:
                seen = seen * written(prompt, head, 2)[:length]
            of = head // (HEADS // KV)
            want[of] = np.maximum(want[of], seen)
    policy = KVzip(repeat_ids=(1,) * asked, n_sink=0, plus=plus)
    got = policy.scores(prompt)[0, :, :length]
    np.testing.assert_allclose(got, want, rtol=1e-5)
    assert KVzip.weighed(n_sink=0).plus and KVzip.weighed().reads_output
    sinks = dataclasses.replace(policy, n_sink=1).scores(prompt)[0]
    assert np.isinf(sinks[:, 0]).all() and np.isfinite(sinks[:, 1:length]).all()


def test_kvzip_repeats_the_prompt_behind_its_request():
    tokens = jnp.asarray([[3, 4, 5], [6, 0, 0]], jnp.int32)
    policy = KVzip(repeat_ids=(8, 9))
    got = policy.pseudo_tokens(
        tokens, jnp.asarray([3, 1]), vocab_size=10, sketch=lambda *_: tokens
    )
    assert got.tolist() == [[8, 9, 3, 4, 5], [8, 9, 6, 0, 0]]


def test_dropkv_measures_by_how_much_an_output_moves():
    prompt, window = drawn(LENGTH, LENGTH + 2), 3
    want = np.zeros((KV, LENGTH))
    for head in range(HEADS):
        of = head // (HEADS // KV)
        values = np.asarray(prompt.values)[0, :, of]
        for query in range(LENGTH - window, LENGTH):
            weights = paid(prompt, query, head)
            output = weights @ values[: query + 1]
            for token in range(query + 1):
                left = np.delete(weights, token)
                rest = np.delete(values[: query + 1], token, axis=0)
                moved = left / left.sum() @ rest - output
                want[of, token] += (moved**2).sum() / (HEADS // KV)
    for kernel in 1, 3:
        policy = DropKV(window_size=window, kernel_size=kernel)
        got = np.asarray(policy.scores(prompt))[0, :, :LENGTH]
        assert np.isinf(got[:, -window:]).all()
        pooled = [np.convolve(of, np.ones(kernel) / kernel, mode="same") for of in want]
        pooled = np.array(pooled)[:, :-window]
        np.testing.assert_allclose(got[:, :-window], pooled, rtol=1e-3)


@pytest.mark.parametrize("kernel", [1, 3])
def test_defensivekv_takes_the_worst_case(kernel):
    prompt, window = drawn(keep=LENGTH, scale=0.3), 3
    before = LENGTH - window
    worst, norms = np.zeros((KV, before)), np.zeros((KV, before))
    for head in range(HEADS):
        of = head // (HEADS // KV)
        norms[of] += written(prompt, head, 1)[:before] / (HEADS // KV)
        for query in range(before, LENGTH):
            seen = paid(prompt, query, head)[:before]
            pooled = np.convolve(seen, np.ones(kernel) / kernel, mode="same")
            pooled *= seen.sum() / pooled.sum()
            worst[of] = np.maximum(worst[of], pooled)
    worst = np.maximum(worst, worst.mean(-1, keepdims=True))
    want = worst * norms / norms.sum(0)
    policy = DefensiveKV(window_size=window, kernel_size=kernel, mass=0.0)
    got = np.asarray(policy.scores(prompt))[0]
    assert np.isinf(got[:, before:]).all()
    np.testing.assert_allclose(got[:, :before], want, rtol=1e-4)
    # All that gathers nearly everything comes first, as far as there is room: the
    # budget's share of the tokens before the window, less a window.
    first = dataclasses.replace(policy, mass=1.0)
    few = prompt._replace(keep=jnp.asarray([LENGTH - 1], jnp.int32))
    counts = np.isinf(np.asarray(first.scores(few))[0, :, :before]).sum(-1)
    assert (counts <= 2).all() and counts.max() == 2
    one = np.isinf(np.asarray(first.scores(prompt))[0, :, :before]).sum(-1)
    assert (one >= counts).all() and one.max() > 2
