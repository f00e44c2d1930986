"""Prefill and decode attention: references against `jax.nn`, the rest against them."""

import functools
import re
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from packed import packed

from jaxkv.kernels import decode, prefill
from jaxkv.kernels.decode import decode_attention
from jaxkv.kernels.dispatch import triton_unavailable
from jaxkv.kernels.prefill import causal_attention, choose

HEADS = {"MHA": (4, 4), "GQA": (6, 2), "MQA": (5, 1)}
heads = pytest.mark.parametrize("heads", HEADS)
TOLERANCE = {"float32": 2e-6, "bfloat16": 2e-2, "float16": 3e-3}


def draw(seed, *shape, dtype="float32"):
    drawn = np.random.default_rng(seed).standard_normal(shape, np.float32)
    return jnp.asarray(drawn, dtype)


def compiled(operation, **options):
    """Return the operation as one program, where each step would be one of its own."""
    return jax.jit(functools.partial(operation, **options))


def prompt(num_heads, kv_heads, length, dtype="float32", head_dim=16):
    return (
        draw(0, 2, length, num_heads, head_dim, dtype=dtype),
        draw(1, 2, length, kv_heads, head_dim, dtype=dtype),
        draw(2, 2, length, kv_heads, head_dim, dtype=dtype),
    )


@heads
def test_prefill_reference_against_jax_nn(heads):
    q, k, v = prompt(*HEADS[heads], 37)
    ours = compiled(causal_attention, scale=0.3, implementation="reference")(q, k, v)
    theirs = jax.nn.dot_product_attention(q, k, v, scale=0.3, is_causal=True)
    np.testing.assert_allclose(ours, theirs, atol=2e-6)


@heads
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("length", [1, 257, 600])
def test_prefill_xla_against_reference(heads, dtype, length):
    q, k, v = prompt(*HEADS[heads], length, dtype)
    run = compiled(causal_attention, scale=0.3, implementation="xla")
    ours = run(q, k, v)
    exact = compiled(causal_attention, scale=0.3, implementation="reference")(
        *(x.astype(jnp.float32) for x in (q, k, v))
    )
    assert ours.dtype == q.dtype
    np.testing.assert_allclose(
        ours.astype(jnp.float32), exact, atol=TOLERANCE[dtype] * 2
    )
    np.testing.assert_array_equal(np.asarray(ours), np.asarray(run(q, k, v)))


@pytest.mark.parametrize("implementation", ["reference", "xla"])
def test_prefill_of_a_window_against_jax_nn(implementation):
    """Windows within a tile, of a tile, over tiles, of all but one and of all."""
    q, k, v = prompt(6, 2, 600)
    for window in (1, 5, 256, 300, 599, 600, 700):
        run = compiled(
            *(causal_attention,),
            scale=0.3,
            window=window,
            implementation=implementation,
        )
        theirs = jax.nn.dot_product_attention(
            q, k, v, scale=0.3, is_causal=True, local_window_size=(window - 1, 0)
        )
        np.testing.assert_allclose(run(q, k, v), theirs, atol=2e-6)
    with pytest.raises(ValueError, match="a window holds at least 1 token, got 0"):
        causal_attention(q, k, v, scale=0.3, window=0)


def test_a_window_goes_through_cudnn(monkeypatch):
    """What it is told of the window; that it does it, a GPU must show."""
    told = []

    def attend(query, key, value, **options):
        told.append(options)
        return query

    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(jax.nn, "dot_product_attention", attend)
    arrays = prompt(6, 2, 40, "bfloat16")
    for window in (None, 7, 40):
        causal_attention(*arrays, scale=0.3, window=window)
    how = dict(scale=0.3, is_causal=True, implementation="cudnn")
    windows = [None, (6, 0), None]  # to the left, without the token itself
    assert told == [how | dict(local_window_size=window) for window in windows]


def test_prefill_memory_is_linear_in_length():
    def temporaries(length):
        q, k, v = prompt(4, 2, length)
        compiled = (
            jax.jit(lambda *x: causal_attention(*x, scale=1.0, implementation="xla"))
            .lower(q, k, v)
            .compile()
        )
        return compiled.memory_analysis().temp_size_in_bytes

    assert temporaries(4096) < 2.5 * temporaries(2048)


def test_swapping_keys_and_values_is_noticed():
    q, k, v = prompt(4, 4, 9)
    right = causal_attention(q, k, v, scale=0.3, implementation="reference")
    wrong = causal_attention(q, v, k, scale=0.3, implementation="xla")
    assert np.abs(np.asarray(right - wrong)).max() > 0.1


@pytest.mark.parametrize(
    ("platform", "dtype", "length", "head_dim", "wanted"),
    [
        ("cpu", "float32", 100, 64, "xla"),
        ("gpu", "bfloat16", 100, 128, "cudnn"),
        ("gpu", "float32", 100, 128, "xla"),
        ("tpu", "bfloat16", 256, 128, "splash"),
        ("tpu", "bfloat16", 100, 128, "xla"),
        ("tpu", "bfloat16", 256, 64, "xla"),
    ],
)
def test_choice_of_prefill(platform, dtype, length, head_dim, wanted):
    assert choose(platform, dtype, length=length, head_dim=head_dim) == wanted


@pytest.mark.parametrize(
    ("dtype", "head_dim", "wanted"),
    [
        ("bfloat16", 128, "pallas_tpu"),
        ("float16", 128, "xla"),
        ("bfloat16", 80, "xla"),
    ],
)
def test_choice_of_decode_on_a_tpu(dtype, head_dim, wanted):
    query = jax.ShapeDtypeStruct((1, 4, head_dim), dtype)
    keys = jax.ShapeDtypeStruct((1, 2, 100, head_dim), dtype)
    assert decode.choose("tpu", query, keys) == wanted
    assert decode.choose("tpu") == "pallas_tpu"


def cache(num_heads, kv_heads, slots, dtype="float32", head_dim=16, batch=3):
    rng = np.random.default_rng(slots)
    occupied = rng.random((batch, kv_heads, slots)) < 0.6
    order = np.broadcast_to(np.arange(slots), occupied.shape)
    positions = np.where(occupied, order, -1)
    free = jnp.asarray(~occupied)[..., None]
    keys = draw(3, batch, kv_heads, slots, head_dim, dtype=dtype)
    values = draw(4, batch, kv_heads, slots, head_dim, dtype=dtype)
    return dict(
        query=draw(5, batch, num_heads, head_dim, dtype=dtype),
        key=draw(6, batch, kv_heads, head_dim, dtype=dtype),
        value=draw(7, batch, kv_heads, head_dim, dtype=dtype),
        keys=jnp.where(free, jnp.nan, keys),
        values=jnp.where(free, jnp.nan, values),
        positions=jnp.asarray(positions, jnp.int32),
        target=jnp.asarray(rng.integers(0, slots, (batch, kv_heads)), jnp.int32),
        position=jnp.asarray([slots, slots + 3, -1], jnp.int32),
    )


def oracle(c, scale):
    """One softmax after another, in numpy."""
    keys, values = np.array(c["keys"], np.float64), np.array(c["values"], np.float64)
    positions = np.array(c["positions"])
    out = np.zeros(c["query"].shape)
    groups = out.shape[1] // keys.shape[1]
    for b, position in enumerate(np.array(c["position"])):
        for k in range(keys.shape[1]):
            slot = int(c["target"][b, k])
            if position >= 0:
                keys[b, k, slot] = np.array(c["key"][b, k], np.float64)
                values[b, k, slot] = np.array(c["value"][b, k], np.float64)
                positions[b, k, slot] = position
            held = positions[b, k] >= 0
            for n in range(k * groups, (k + 1) * groups):
                query = np.array(c["query"][b, n], np.float64)
                logits = scale * keys[b, k, held] @ query
                weights = np.exp(logits - logits.max(initial=-1e30))
                total = weights.sum() or 1.0
                out[b, n] = weights @ values[b, k, held] / total
    return out, keys, values, positions


@heads
@pytest.mark.parametrize("implementation", ["reference", "xla"])
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("slots", [1, 7, 129])
def test_backend_equals_reference(heads, implementation, dtype, slots):
    c = cache(*HEADS[heads], slots, dtype)
    run = compiled(decode_attention, scale=0.3, implementation=implementation)
    got, slots = run(**packed(c))
    out, keys, values, positions = oracle(c, 0.3)
    live = np.asarray(c["position"]) >= 0
    np.testing.assert_allclose(
        np.asarray(got, np.float64)[live], out[live], atol=2 * TOLERANCE[dtype]
    )
    assert np.isfinite(np.asarray(got, np.float32)).all()
    np.testing.assert_array_equal(np.asarray(slots.keys, np.float64), keys)
    np.testing.assert_array_equal(np.asarray(slots.values, np.float64), values)
    np.testing.assert_array_equal(slots.positions, positions)
    np.testing.assert_array_equal(slots.target, c["target"])
    np.testing.assert_array_equal(np.asarray(got), np.asarray(run(**packed(c))[0]))


def test_misshapen_arguments_are_named():
    c = cache(4, 2, 8)
    for name, value, message in [
        (
            *("values", c["values"][:, :, :7]),
            "decode_attention: slots.values must be Float[B K S H] with B=3, K=2, "
            "S=8, H=16, got float32[3 2 7 16].",
        ),
        (
            *("keys", c["keys"][0]),
            "decode_attention: slots.keys must be Float[B K S H] with B=3, K=2, H=16, "
            "got float32[2 8 16].",
        ),
        (
            *("position", c["position"].astype("float32")),
            "decode_attention: token.position must be Int32[B] with B=3, got "
            "float32[3].",
        ),
    ]:
        with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
            decode_attention(**packed(c, **{name: value}), scale=1.0)
    with pytest.raises(ValueError, match="4 query heads must be a multiple of 3"):
        q, k, v = prompt(4, 3, 8)
        causal_attention(q, k, v, scale=1.0)


def test_named_implementations_never_fall_back():
    q, k, v = prompt(4, 2, 8)
    with pytest.raises(ValueError, match="unknown implementation='fast'"):
        causal_attention(q, k, v, scale=1.0, implementation="fast")
    with pytest.raises(ValueError, match="unknown implementation='fast'"):
        decode_attention(**packed(cache(4, 2, 8)), scale=1.0, implementation="fast")
    if jax.default_backend() != "gpu":
        with pytest.raises(NotImplementedError, match="needs an NVIDIA GPU"):
            causal_attention(q, k, v, scale=1.0, implementation="cudnn")
        with pytest.raises(NotImplementedError, match="needs an NVIDIA GPU"):
            decode_attention(
                **packed(cache(4, 2, 8)), scale=1.0, implementation="triton"
            )
    if jax.default_backend() != "tpu":
        with pytest.raises(NotImplementedError, match="needs a TPU, but JAX runs on"):
            decode_attention(
                **packed(cache(4, 2, 8)), scale=1.0, implementation="pallas_tpu"
            )
    with pytest.raises(NotImplementedError, match="multiples of 128"):
        causal_attention(q, k, v, scale=1.0, implementation="splash")


def test_cudnn_names_what_it_does_not_take(monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    with pytest.raises(
        NotImplementedError, match="takes bfloat16 or float16, got float32; use"
    ):
        causal_attention(*prompt(4, 2, 8), scale=1.0, implementation="cudnn")


@pytest.mark.parametrize("capability", ["7.5", "gfx942"])
def test_triton_names_a_gpu_that_is_too_old(capability, monkeypatch):
    device = types.SimpleNamespace(device_kind="T4", compute_capability=capability)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(jax, "local_devices", lambda: [device])
    with pytest.raises(
        NotImplementedError, match=f"8.0 or above, but T4 has {capability}"
    ):
        decode_attention(**packed(cache(4, 2, 8)), scale=1.0, implementation="triton")
    device.compute_capability = "12.0"
    assert "compute capability" not in triton_unavailable()


@pytest.mark.slow
@heads
@pytest.mark.parametrize("length", [128, 640])
def test_splash_against_reference(heads, length):
    """JAX's own kernel, as `causal_attention` calls it, interpreted."""
    q, k, v = prompt(*HEADS[heads], length, head_dim=128)
    ours = prefill._splash(q, k, v, scale=0.09, interpret=True)
    exact = causal_attention(q, k, v, scale=0.09, implementation="reference")
    np.testing.assert_allclose(ours, exact, atol=2e-5)
    ours = prefill._splash(q, k, v, scale=0.09, window=70, interpret=True)
    exact = causal_attention(q, k, v, scale=0.09, window=70, implementation="reference")
    np.testing.assert_allclose(ours, exact, atol=2e-5)
