"""TriAttention and its statistics, against plain sums in NumPy."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import CONFIG, NETWORK, language_model, params, prompts

import jaxkv
from jaxkv import Options, TriAttention, calibration
from jaxkv.kernels.rotary import rotate
from jaxkv.laws.programs import compiled
from jaxkv.models.decoder import layer_frequencies
from jaxkv.policies.triattention import (
    OFFSETS,
    Seen,
    Statistics,
    expected_logits,
    read_statistics,
)

FREQUENCIES = np.array([1.0, 0.1])


def turned(x, position):
    """Turn complex pairs by a position."""
    return x * np.exp(1j * FREQUENCIES * position)


def real(x):
    return np.concatenate([x.real, x.imag], axis=-1)


def test_scores_are_a_mean_query_s_over_coming_distances():
    """One row, one key/value head of two query heads, three slots, one of them free."""
    rng = np.random.default_rng(0)
    draws = rng.normal(size=(2, 5, 2)) + 1j * rng.normal(size=(2, 5, 2))
    keys = rng.normal(size=(3, 2)) + 1j * rng.normal(size=(3, 2))
    positions, now = np.array([4, 0, -1]), 7
    stored = np.stack([turned(k, p) for k, p in zip(keys, positions, strict=True)])
    want = np.zeros((2, 2))
    for head, queries in enumerate(draws):
        mean = queries.mean(0)
        for slot in range(2):
            ahead = [
                (turned(mean, now + d) * turned(keys[slot], positions[slot]).conj())
                .sum()
                .real
                for d in OFFSETS
            ]
            spread = np.abs(queries).mean(0) - np.abs(mean)
            want[head, slot] = np.mean(ahead) + (spread * np.abs(keys[slot])).sum()
    seen = Seen(
        mean=jnp.asarray(real(draws.sum(1))[None, None], jnp.float32),
        size=jnp.asarray(np.abs(draws).sum(1)[None, None], jnp.float32),
        number=jnp.asarray([5.0]),
        frequencies=jnp.asarray(FREQUENCIES[None], jnp.float32),
        prompt=jnp.asarray([3]),
    )
    where = (
        jnp.asarray(real(stored)[None, None], jnp.float32),
        jnp.asarray(positions[None, None]),
        jnp.asarray([now]),
    )
    got = expected_logits(seen, *where, standardise=False)[0, 0, :2]
    # The angles of far positions are float32's.
    np.testing.assert_allclose(got, want.max(0), rtol=1e-2, atol=1e-2)
    got = expected_logits(seen, *where, standardise=True)[0, 0, :2]
    signs = np.sign(want - want.mean(1, keepdims=True)).max(0)
    np.testing.assert_allclose(got, signs, rtol=1e-4)


class Words:
    """A tokenizer that reads numbers."""

    def __call__(self, text):
        return {"input_ids": [int(x) for x in text.split()]}


def lm(folder, **changes):
    made = language_model(folder, tokenizer=Words())
    return dataclasses.replace(made, **changes)


def queries_of(tokens):
    """Return each layer's queries before their rotation, `[T, N, H]`."""
    found = []

    def attend(q, k, v, state, weighing):
        index = jnp.arange(q.shape[1], dtype=jnp.int32)[None]
        found.append(rotate(q, -index, layer_frequencies(CONFIG)[0])[0])
        return jax.nn.dot_product_attention(q, k, v, is_causal=True), state

    index = jnp.arange(len(tokens), dtype=jnp.int32)[None]
    with jax.disable_jit():
        NETWORK.apply(
            *({"params": params()}, jnp.asarray([tokens], jnp.int32), index),
            *((None,) * CONFIG.num_layers, attend),
        )
    return np.stack(found)


def test_calibration_counts_the_queries_of_windows(tmp_path):
    first, second = list(range(1, 8)), [9, 3, 4]
    texts = [" ".join(map(str, first)), " ".join(map(str, second))]
    found = calibration.calibrate(lm(tmp_path), texts, length=4, batch_size=2)
    parts = [queries_of(x) for x in (first[:4], first[4:], second)]
    whole = np.concatenate(parts, axis=1)
    np.testing.assert_allclose(found.mean, whole.mean(1), rtol=1e-4, atol=1e-4)
    size = np.hypot(*np.split(whole, 2, axis=-1)).mean(1)
    np.testing.assert_allclose(found.size, size, rtol=1e-4)
    calibration.save(found, tmp_path / "stats.npz", model="tiny")
    again = read_statistics(str(tmp_path / "stats.npz"), "")
    jax.tree.map(np.testing.assert_array_equal, found, again)

    # With a file the policy starts from it, in each layer; another content is another.
    path = str(tmp_path / "stats.npz")
    policy = TriAttention.paper(stats=path, interval=2)
    options = dict(max_new_tokens=12, budget=24, decode=policy, stop_ids=[])
    asked = [list(range(1, 13)), [5, 6, 7]]
    tokens = jaxkv.generate(lm(tmp_path, tokenizer=None), asked, **options).tokens
    assert [len(row) for row in tokens] == [12, 12]
    other = Statistics(found.mean[::-1], found.size)
    calibration.save(other, tmp_path / "stats.npz")
    assert TriAttention.paper(stats=path, interval=2) != policy
    small = Statistics(found.mean[:1], found.size[:1])
    calibration.save(small, tmp_path / "small.npz")
    options["decode"] = TriAttention(stats=str(tmp_path / "small.npz"), interval=2)
    message = r"small.npz has 1 layers, 4 heads of size 8, but this network 2, 4 of 8"
    with pytest.raises(ValueError, match=message):
        jaxkv.generate(lm(tmp_path, tokenizer=None), asked, **options)


def test_texts_that_say_nothing_are_refused(tmp_path):
    with pytest.raises(ValueError, match="calibrate: the texts hold no token"):
        calibration.calibrate(lm(tmp_path), ["", " \n"])
    with pytest.raises(ValueError, match="texts= takes a list of texts, got the text"):
        calibration.calibrate(lm(tmp_path), "1 2")
    with pytest.raises(ValueError, match="calibrate: tiny has no tokenizer to read"):
        calibration.calibrate(lm(tmp_path, tokenizer=None), ["1 2"])


def test_a_file_that_is_none_is_named(tmp_path):
    mean, size = np.zeros((1, 2, 4), np.float32), np.zeros((1, 2, 2), np.float32)
    files = {
        "missing": None,
        "text": b"no file of NumPy",
        "shapes": dict(mean=mean, size=mean),
        "nan": dict(mean=mean + np.nan, size=size),
        "double": dict(mean=mean.astype(float), size=size),
        "names": dict(means=mean, size=size),
    }
    for name, content in files.items():
        path = tmp_path / f"{name}.npz"
        if isinstance(content, bytes):
            path.write_bytes(content)
        elif content:
            np.savez(path, **content)
        policy = TriAttention(stats=str(path), interval=2)
        message = f"TriAttention: stats=.*{name}.npz is no file of jaxkv calibrate: "
        with pytest.raises(ValueError, match=message) as caught:
            policy.check(9)
        assert "\n" not in str(caught.value)


def test_the_prompt_can_be_protected():
    programs = compiled()
    tokens, lengths = prompts(0, (10, 8), 24)
    for protect in (False, True):
        policy = TriAttention(interval=2, protect_prompt=protect, n_recent=1)
        out = programs.generate(
            *(NETWORK, params(), tokens, lengths),
            jax.random.split(jax.random.key(0), 2),
            *(jnp.asarray([-1], jnp.int32), jnp.int32(16)),
            options=Options(decode=policy, budget=26),
            slots=14,
            max_out=16,
        )
        for state in out.cache:
            held = np.asarray(state.positions)
            for row, length in zip(held, (10, 8), strict=True):
                kept = [(head[head >= 0] < length).sum() for head in row]
                assert (kept == [length] * len(row)) or not protect
        whole = all((np.asarray(s.positions)[0] < 10).sum() >= 20 for s in out.cache)
        assert whole == protect


def test_the_command_writes_a_file_and_refuses_what_is_no_text(jaxkv_, tiny, tmp_path):
    text, out = tmp_path / "a.txt", tmp_path / "stats.npz"
    text.write_text("A short text.")
    code, printed, err = jaxkv_("calibrate", tiny, "--text", text, "--out", out)
    assert (code, printed) == (
        0,
        "",
    ) and "2 layers, 4 heads of size 8" in err
    assert read_statistics(str(out), "").mean.shape == (2, 4, 8)
    for content, said in (
        (b"\xff\xfe\xff", "not UTF-8 text"),
        (b"\n", "no text; name"),
    ):
        text.write_bytes(content)
        assert said in jaxkv_.error(
            "calibrate", tiny, "--text", text, "--out", out, "--overwrite"
        )
    assert "is there already; pass --overwrite" in jaxkv_.error(
        "calibrate", tiny, "--text", text, "--out", out
    )
    text.write_text("A short text.")
    assert "must be a file in a folder that is there" in jaxkv_.error(
        "calibrate", tiny, "--text", text, "--out", tmp_path
    )
