"""The operations of `pointwise` on NVIDIA GPUs, in Triton, through jax-triton.

One program a row for `add_rms_norm`, one a head for `split_and_rotate`: with few rows
it is the launch that costs, not the bytes.
"""

import jax
import jax.numpy as jnp

from jaxkv.kernels import triton_call
from jaxkv.kernels.cache import Heads
from jaxkv.kernels.triton_call import next_power_of_2


def add_rms_norm_triton(
    x: jax.Array, delta: jax.Array | None, weight: jax.Array, *, eps: float
) -> tuple[jax.Array, jax.Array]:
    """Do `pointwise.add_rms_norm`, whose arguments these are."""
    from jaxkv.kernels import pointwise_triton_body as body

    size = x.shape[-1]
    out = jax.ShapeDtypeStruct(x.shape, x.dtype)
    total, normed = triton_call.call(
        body.add_rms_norm,
        (x, x if delta is None else delta, weight),
        (out, out),
        aliases={},
        grid=(x.size // size,),
        num_warps=norm_warps(size),
        num_stages=1,
        **norm_constants(size, eps, parts=0 if delta is None else len(delta)),
    )
    return total, normed


def split_and_rotate_triton(
    qkv: jax.Array,
    q_norm: jax.Array | None,
    k_norm: jax.Array | None,
    cos: jax.Array,
    sin: jax.Array,
    *,
    num_heads: int,
    num_kv_heads: int,
    eps: float,
    dtype: jax.typing.DTypeLike,
) -> Heads:
    """Do `pointwise.split_and_rotate`, whose arguments these are."""
    from jaxkv.kernels import pointwise_triton_body as body

    batch, length, half = cos.shape
    norm = q_norm is not None
    none = jnp.zeros(1, dtype)
    shapes = [
        (batch, length, heads, 2 * half)
        for heads in (num_heads, num_kv_heads, num_kv_heads)
    ]
    return Heads(
        *triton_call.call(
            body.split_and_rotate,
            (qkv, q_norm if norm else none, k_norm if norm else none, cos, sin),
            tuple(jax.ShapeDtypeStruct(shape, dtype) for shape in shapes),
            aliases={},
            grid=(batch * length, num_heads + 2 * num_kv_heads),
            num_warps=1,
            num_stages=1,
            **rotate_constants(
                *(num_heads, num_kv_heads, half, eps), norm=norm, parts=len(qkv)
            ),
        )
    )


def norm_warps(size: int) -> int:
    """Return the warps of one `add_rms_norm`: a thread has four numbers of each part.

    With 32 warps a row of 4096 in four parts takes 1.9 us on an H200, with eight 2.3.
    """
    return max(1, min(32, next_power_of_2(size) // 128))


def norm_constants(size: int, eps: float, *, parts: int) -> dict[str, object]:
    """Return the compile-time arguments of `add_rms_norm`."""
    return dict(SIZE=size, SIZE_PAD=next_power_of_2(size), EPS=eps, PARTS=parts)


def rotate_constants(
    num_heads: int, num_kv_heads: int, half: int, eps: float, *, norm: bool, parts: int
) -> dict[str, object]:
    """Return the compile-time arguments of `split_and_rotate`."""
    return dict(
        HEADS=num_heads,
        KV_HEADS=num_kv_heads,
        HALF=half,
        HALF_PAD=next_power_of_2(half),
        EPS=eps,
        NORM=norm,
        PARTS=parts,
    )
