"""The small operations of a layer: against float64, and the Triton kernels interpreted.

Run as a script under `TRITON_INTERPRET=1`, this file is its own worker: Triton must be
imported with that variable set.
"""

import json
import types

import jax.numpy as jnp
import numpy as np
import pytest
import triton_on_cpu

from jaxkv.kernels import pointwise

EPS = 1e-6
# parts of the summand (0 for none), rows, size, dtype
NORMS = [
    (0, 1, 64, "float32"),
    (1, 1, 64, "float32"),
    (0, 3, 96, "bfloat16"),
    (1, 3, 96, "bfloat16"),
    (3, 3, 96, "bfloat16"),
    (8, 2, 1000, "float16"),
]
# parts, rows, query heads, KV heads, head size, norm, dtype
HEADS = [
    (1, 1, 4, 2, 64, True, "float32"),
    (1, 3, 3, 1, 96, True, "bfloat16"),
    (4, 3, 3, 1, 96, True, "bfloat16"),
    (2, 2, 2, 2, 8, False, "float16"),
]
# In 16 bits both terms of a rotation have been rounded twice before the last rounding;
# Triton's interpreter truncates to bfloat16 instead, which costs twice as much.
TOLERANCE = {"float32": 2e-6, "bfloat16": 2**-5, "float16": 2**-9}


def norm_oracle(x, delta, weight):
    total = x + (0 if delta is None else delta.sum(0))
    return total, total / np.sqrt((total**2).mean(-1, keepdims=True) + EPS) * weight


def heads_oracle(qkv, q_norm, k_norm, angles, heads, kv_heads):
    rows, half = angles.shape
    split = qkv.sum(0).reshape(rows, -1, 2 * half)
    out = []
    for part, weight in (
        (split[:, :heads], q_norm),
        (split[:, heads : heads + kv_heads], k_norm),
    ):
        if weight is not None:
            part = norm_oracle(part, None, weight)[1]
        # A rotation is a product of complex numbers.
        turned = (part[..., :half] + 1j * part[..., half:]) * np.exp(
            1j * angles[:, None]
        )
        out.append(np.concatenate([turned.real, turned.imag], -1))
    return *out, split[:, heads + kv_heads :]


def off(got, want, dtype) -> float:
    """Return the largest error, in tolerances."""
    got, want = np.asarray(got, np.float64), np.asarray(want)
    error = np.abs(got.reshape(want.shape) - want) / np.maximum(1, np.abs(want))
    return float(error.max()) / TOLERANCE[dtype]


def part_dtype(parts, dtype):
    """Return what a product in so many parts comes in."""
    return "float32" if parts > 1 else dtype


def draw(rng, shape, dtype):
    """Return float32 numbers that are exact in the dtype."""
    numbers = jnp.asarray(rng.standard_normal(shape), dtype)
    return np.asarray(numbers.astype(jnp.float32))


def norm_inputs(case, seed=0):
    parts, rows, size, dtype = case
    rng = np.random.default_rng(seed)
    x, weight = draw(rng, (rows, size), dtype), draw(rng, (size,), dtype)
    delta = draw(rng, (parts, rows, size), part_dtype(parts, dtype))
    return x, delta if parts else None, weight


def heads_inputs(case, seed=0):
    parts, rows, heads, kv_heads, head_dim, norm, dtype = case
    rng = np.random.default_rng(seed)
    columns = (heads + 2 * kv_heads) * head_dim
    qkv = draw(rng, (parts, rows, columns), part_dtype(parts, dtype))
    q_norm, k_norm = (draw(rng, (head_dim,), dtype) for _ in range(2))
    angles = rng.uniform(-3, 3, (rows, head_dim // 2)).astype(np.float32)
    return qkv, q_norm if norm else None, k_norm if norm else None, angles


@pytest.mark.parametrize("case", NORMS, ids=str)
def test_add_rms_norm_against_float64(case):
    x, delta, weight = norm_inputs(case)
    parts, *_, dtype = case
    want = norm_oracle(x.astype(np.float64), delta, weight)
    got = pointwise.add_rms_norm(
        jnp.asarray(x[:, None], dtype),
        jnp.asarray(delta[:, :, None], part_dtype(parts, dtype)) if parts else None,
        jnp.asarray(weight, dtype),
        eps=EPS,
        implementation="xla",
    )
    assert max(off(g, w, dtype) for g, w in zip(got, want, strict=True)) < 1


@pytest.mark.parametrize("case", HEADS, ids=str)
def test_split_and_rotate_against_complex_numbers(case):
    parts, _, heads, kv_heads, _, _, dtype = case
    qkv, q_norm, k_norm, angles = heads_inputs(case)
    want = heads_oracle(qkv.astype(np.float64), q_norm, k_norm, angles, heads, kv_heads)
    cast = [x if x is None else jnp.asarray(x, dtype) for x in (q_norm, k_norm)]
    got = pointwise.split_and_rotate(
        jnp.asarray(qkv[:, :, None], part_dtype(parts, dtype)),
        *cast,
        *(jnp.asarray(f(angles)[:, None]) for f in (np.cos, np.sin)),
        num_heads=heads,
        num_kv_heads=kv_heads,
        eps=EPS,
        dtype=dtype,
        implementation="xla",
    )
    assert max(off(g, w, dtype) for g, w in zip(got, want, strict=True)) < 1


def test_bad_arguments_are_named():
    x, w = jnp.ones((1, 1, 4)), jnp.ones(4)
    with pytest.raises(ValueError, match=r"unknown implementation='magic'"):
        pointwise.add_rms_norm(x, None, w, eps=EPS, implementation="magic")
    with pytest.raises(NotImplementedError, match="needs an NVIDIA GPU"):
        pointwise.add_rms_norm(x, None, w, eps=EPS, implementation="triton")
    with pytest.raises(
        ValueError, match=r"weight must be Float\[D\] with D=4, got float32\[3\]"
    ):
        pointwise.add_rms_norm(x, None, jnp.ones(3), eps=EPS)
    half = jnp.ones((1, 1, 1))
    with pytest.raises(ValueError, match=r"qkv has 4 columns, but 2 \+ 2 x 1 heads of"):
        pointwise.split_and_rotate(
            *(x[None], None, None, half, half),
            num_heads=2,
            num_kv_heads=1,
            eps=EPS,
            dtype="float32",
        )


def test_interpreted_kernels_agree_with_the_oracle():
    pytest.importorskip("triton")
    pytest.importorskip("torch")
    failures = triton_on_cpu.interpreted(__file__)
    assert not failures, "\n".join(failures)


@pytest.mark.parametrize("capability", [80, 90])
def test_kernels_compile(capability):
    # The interpreter lets types change from branch to branch; the compiler does not.
    pytest.importorskip("triton")
    from jaxkv.kernels import pointwise_triton as wrapper
    from jaxkv.kernels import pointwise_triton_body as body

    for kernel, constants, warps in (
        (body.add_rms_norm, wrapper.norm_constants(4096, EPS, parts=4), 8),
        (
            body.split_and_rotate,
            wrapper.rotate_constants(32, 8, 64, EPS, norm=True, parts=2),
            1,
        ),
    ):
        dtypes = dict.fromkeys(kernel.arg_names, "bfloat16")
        floats = ("cos_ptr", "sin_ptr", "delta_ptr", "qkv_ptr")
        dtypes |= dict.fromkeys(floats, "float32")
        tiles = types.SimpleNamespace(warps=warps, stages=1)
        triton_on_cpu.usage(kernel, dtypes, constants, tiles, capability)


def check_interpreted(swap=False) -> list[str]:
    """Run both kernels under the interpreter and return what is wrong with them.

    `swap` passes the queries' norm for the keys' and the other way round, which must be
    noticed.
    """
    import torch

    from jaxkv.kernels import pointwise_triton as wrapper
    from jaxkv.kernels import pointwise_triton_body as body

    def tensor(array, dtype):
        return torch.from_numpy(np.ascontiguousarray(array)).to(getattr(torch, dtype))

    def empty(*shape, dtype):
        return torch.full(shape, float("nan"), dtype=getattr(torch, dtype))

    failures = []
    for case in NORMS:
        parts, rows, size, dtype = case
        x, delta, weight = norm_inputs(case)
        out = [empty(rows, size, dtype=dtype) for _ in range(2)]
        body.add_rms_norm[(rows,)](
            tensor(x, dtype),
            tensor(delta if parts else x, part_dtype(parts, dtype)),
            tensor(weight, dtype),
            *out,
            **wrapper.norm_constants(size, EPS, parts=parts),
        )
        want = norm_oracle(x.astype(np.float64), delta, weight)
        worst = max(
            off(g.to(torch.float64).numpy(), w, dtype)
            for g, w in zip(out, want, strict=True)
        )
        if not worst < 1:
            failures.append(f"add_rms_norm {case}: off by {worst}")
    for case in HEADS:
        parts, rows, heads, kv_heads, head_dim, norm, dtype = case
        qkv, q_norm, k_norm, angles = heads_inputs(case)
        want = heads_oracle(
            qkv.astype(np.float64), q_norm, k_norm, angles, heads, kv_heads
        )
        weights = [np.ones(1) if w is None else w for w in (q_norm, k_norm)]
        weights = weights[::-1] if swap else weights
        out = [
            empty(rows, n, head_dim, dtype=dtype) for n in (heads, kv_heads, kv_heads)
        ]
        body.split_and_rotate[(rows, heads + 2 * kv_heads)](
            tensor(qkv, part_dtype(parts, dtype)),
            *(tensor(a, dtype) for a in weights),
            *(tensor(f(angles), "float32") for f in (np.cos, np.sin)),
            *out,
            **wrapper.rotate_constants(
                *(heads, kv_heads, head_dim // 2, EPS), norm=norm, parts=parts
            ),
        )
        worst = max(
            off(g.to(torch.float64).numpy(), w, dtype)
            for g, w in zip(out, want, strict=True)
        )
        if not worst < 1:
            failures.append(f"split_and_rotate {case}: off by {worst}")
    return failures


if __name__ == "__main__":
    failures = check_interpreted()
    if not any("split_and_rotate" in f for f in check_interpreted(swap=True)):
        failures.append("swapping the norms of queries and keys went unnoticed")
    print(json.dumps(failures))
