"""Scores of a window of queries: every version against an oracle in NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxkv.kernels import dispatch
from jaxkv.kernels import window_scores as module
from jaxkv.kernels.window_scores import choose, window_scores

# batch, window, heads, key heads, keys, scored keys: MHA, GQA, MQA, odd sizes
SHAPES = {
    "gqa": (3, 5, 4, 2, 45, 40),
    "mha, one query": (3, 1, 4, 4, 16, 16),
    "mqa, all is window": (2, 7, 3, 1, 7, 7),
    "odd, fewer scored than a tile": (2, 3, 6, 2, 33, 5),
}
# of sums of probabilities up to 7; twice the error of rounding the inputs' products
TOLERANCE = {"float32": 2e-6, "bfloat16": 2e-6}


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    monkeypatch.setattr(module, "_TILE", 16)


def inputs(shape, dtype="float32", seed=0):
    batch, window, heads, kv_heads, keys, _ = shape
    rng = np.random.default_rng(seed)
    query = jnp.asarray(2 * rng.normal(size=(batch, window, heads, 8)), dtype)
    key = np.asarray(rng.normal(size=(batch, keys, kv_heads, 8)))
    start = rng.integers(0, keys - window + 1, batch)
    start[0] = 0
    for row in range(batch):  # nobody sees what comes later
        key[row, start[row] + window :] = np.nan
    return query, jnp.asarray(key, dtype), jnp.asarray(start, jnp.int32)


def oracle(query, key, start, scale, length, count=None, reduction="sum"):
    """One query and one head at a time, in double precision."""
    query, key = (np.asarray(x.astype(jnp.float32), np.float64) for x in (query, key))
    batch, window, heads, _ = query.shape
    kv_heads = key.shape[2]
    out = np.zeros((batch, kv_heads, key.shape[1]))
    for b in range(batch):
        for w in range(window if count is None else int(count[b])):
            seen = int(start[b]) + w + 1
            mine = np.zeros_like(out[b])
            for n in range(heads):
                k = n * kv_heads // heads
                powers = np.exp(scale * key[b, :seen, k] @ query[b, w, n])
                mine[k, :seen] += powers / powers.sum() * kv_heads / heads
            out[b] = out[b] + mine if reduction == "sum" else np.maximum(out[b], mine)
    return out[..., :length]


@pytest.mark.parametrize("reduction", ["sum", "max"])
@pytest.mark.parametrize("implementation", ["reference", "xla"])
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_backend_equals_reference(shape, dtype, implementation, reduction):
    args = inputs(shape, dtype)
    options = dict(scale=0.3, length=shape[-1], reduction=reduction)
    got = window_scores(*args, **options, implementation=implementation)
    assert got.dtype == jnp.float32
    want = oracle(*args, 0.3, shape[-1], reduction=reduction)
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=TOLERANCE[dtype])


@pytest.mark.parametrize("reduction", ["sum", "max"])
@pytest.mark.parametrize("implementation", ["reference", "xla"])
def test_queries_beyond_the_count_do_not_count(implementation, reduction):
    shape = SHAPES["gqa"]
    args = inputs(shape)
    count = jnp.asarray([0, 2, 5], jnp.int32)
    options = dict(scale=0.3, length=40, count=count, reduction=reduction)
    got = window_scores(*args, **options, implementation=implementation)
    want = oracle(*args, 0.3, 40, count, reduction)
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)
    assert not np.asarray(got[0]).any()


def test_two_runs_are_bit_equal():
    args = inputs(SHAPES["gqa"])
    runs = [
        np.asarray(window_scores(*args, scale=0.3, length=40, implementation="xla"))
        for _ in range(2)
    ]
    assert runs[0].tobytes() == runs[1].tobytes()


def test_all_probability_is_given_out():
    query, key, start = inputs(SHAPES["gqa"])
    key = jnp.nan_to_num(key)
    got = window_scores(query, key, start, scale=0.3, length=45, implementation="xla")
    np.testing.assert_allclose(got.sum(-1), np.full((3, 2), 5.0), rtol=1e-5)


@pytest.mark.parametrize(
    "mutate",
    [
        lambda q, k, s: (q, k, s - 1),  # the mask is shifted
        lambda q, k, s: (q, k[:, :, ::-1], s),  # heads are swapped
        lambda q, k, s: (q[:, :, ::2].repeat(2, axis=2), k, s),  # heads are mixed
    ],
)
def test_mutations_are_noticed(mutate):
    query, key, start = inputs(SHAPES["gqa"])
    start = jnp.maximum(start, 1)
    key = jnp.nan_to_num(key)
    want = oracle(query, key, start, 0.3, 40)
    got = window_scores(
        *mutate(query, key, start), scale=0.3, length=40, implementation="xla"
    )
    assert np.abs(got - want).max() > 1e-2


def test_memory_is_that_of_a_tile(monkeypatch):
    """With all scores at once the temporaries would hold `B x N x W x T` floats."""
    monkeypatch.setattr(module, "_TILE", 128)
    shapes = [((1, 16, 8, 32), jnp.bfloat16), ((1, 8192, 2, 32), jnp.bfloat16)]
    shapes.append(((1,), jnp.int32))
    function = jax.jit(
        lambda q, k, s: window_scores(
            q, k, s, scale=0.3, length=8192, implementation="xla"
        )
    )
    program = function.lower(*(jax.ShapeDtypeStruct(*x) for x in shapes)).compile()
    whole = 8 * 16 * 8192 * 4
    # The CPU converts all bfloat16 keys to float32 once, 2 MiB of them.
    assert program.memory_analysis().temp_size_in_bytes < 2.1 * 2**20 + whole / 8


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(length=46), "length must be between 1 and the 45 keys, got 46"),
        (dict(length=0), "length must be between 1"),
        (dict(implementation="magic"), "unknown implementation='magic'"),
        (dict(reduction="mean"), "unknown reduction='mean'; choose one of sum, max"),
        (
            dict(count=jnp.zeros(2, jnp.int32)),
            r"count must be Int32\[B\] with B=3, got",
        ),
        (dict(query=jnp.zeros((3, 5, 3, 8))), "must be a multiple of 2"),
    ],
)
def test_bad_arguments_are_named(change, message):
    query, key, start = inputs(SHAPES["gqa"])
    options = dict(scale=0.3, length=40, implementation="xla") | change
    query = options.pop("query", query)
    with pytest.raises(ValueError, match=message):
        window_scores(query, key, start, **options)


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="says what a CPU cannot do")
@pytest.mark.parametrize("name", ["triton", "pallas_tpu"])
def test_what_cannot_run_says_why(name):
    args = inputs(SHAPES["gqa"])
    with pytest.raises(NotImplementedError, match=f'"{name}" needs .* runs on cpu'):
        window_scores(*args, scale=0.3, length=40, implementation=name)


def test_choice():
    assert choose("cpu") == "xla"
    assert choose("tpu") == "pallas_tpu"
    assert choose("gpu") in ("xla", "triton")


def test_triton_under_vmap_runs_copy_by_copy(monkeypatch):
    """With a stand-in that knows no vmap, as Triton's calls do not."""

    def no_vmap(query, key, start, *, count, **options):
        return jax.pure_callback(
            lambda *x: np.asarray(
                window_scores(*x[:3], count=x[3], implementation="reference", **options)
            ),
            jax.ShapeDtypeStruct((start.shape[0], 2, options["length"]), "float32"),
            *(query, key, start, count),
        )

    monkeypatch.setattr(dispatch, "triton_unavailable", lambda: "")
    monkeypatch.setitem(module._RUNS, "triton", no_vmap)
    query, key, start = inputs(SHAPES["gqa"])
    options = dict(scale=0.3, length=40)

    def run(start, implementation):
        return window_scores(
            query, key, start, implementation=implementation, **options
        )

    starts = jnp.stack([start, start - 3])
    got = jax.vmap(lambda s: run(s, "triton"))(starts)
    want = jnp.stack([run(s, "reference") for s in starts])
    np.testing.assert_allclose(got, want, atol=1e-6)
