"""Triton kernels of `pointwise_triton`; imported at the call only: it needs Triton."""

import triton
import triton.language as tl


@triton.jit
def load_sum(parts_ptr, at, real, stride, PARTS: tl.constexpr):
    """Return the float32 sum of what stands at `at` in each part."""
    total = tl.load(parts_ptr + at, real, other=0.0).to(tl.float32)
    for part in tl.static_range(1, PARTS):
        total += tl.load(parts_ptr + part * stride + at, real, other=0.0).to(tl.float32)
    return total


@triton.jit
def add_rms_norm(
    x_ptr,  # [rows, D]
    delta_ptr,  # [PARTS, rows, D]; not read without parts
    weight_ptr,  # [D]
    sum_ptr,  # [rows, D], output
    normed_ptr,  # [rows, D], output
    SIZE: tl.constexpr,
    SIZE_PAD: tl.constexpr,
    EPS: tl.constexpr,
    PARTS: tl.constexpr,
):
    """Add and normalise one row."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, SIZE_PAD)
    real = columns < SIZE
    at = row * SIZE + columns
    x = tl.load(x_ptr + at, real, other=0.0)
    if PARTS:
        # In the stream's own dtype, as the plain sum is.
        stride = tl.num_programs(0).to(tl.int64) * SIZE
        delta = load_sum(delta_ptr, at, real, stride, PARTS)
        x = (x.to(tl.float32) + delta).to(x_ptr.dtype.element_ty)
    tl.store(sum_ptr + at, x, real)
    x32 = x.to(tl.float32)
    scale = tl.rsqrt(tl.sum(x32 * x32, 0) / SIZE + EPS)
    weight = tl.load(weight_ptr + columns, real, other=0.0)
    normed = (x32 * scale).to(x_ptr.dtype.element_ty).to(tl.float32)
    normed = normed * weight.to(tl.float32)
    tl.store(normed_ptr + at, normed.to(normed_ptr.dtype.element_ty), real)


@triton.jit
def split_and_rotate(
    qkv_ptr,  # [PARTS, rows, N + 2 K, H]
    q_norm_ptr,  # [H]; not read without NORM
    k_norm_ptr,  # [H]; not read without NORM
    cos_ptr,  # [rows, H / 2]
    sin_ptr,  # [rows, H / 2]
    q_ptr,  # [rows, N, H], output
    k_ptr,  # [rows, K, H], output
    v_ptr,  # [rows, K, H], output
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HALF: tl.constexpr,  # H / 2
    HALF_PAD: tl.constexpr,
    EPS: tl.constexpr,
    NORM: tl.constexpr,
    PARTS: tl.constexpr,
):
    """Take one head of one row to where it belongs."""
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    columns = tl.arange(0, HALF_PAD)
    real = columns < HALF
    at = (row * (HEADS + 2 * KV_HEADS) + head) * (2 * HALF) + columns
    stride = tl.num_programs(0).to(tl.int64) * ((HEADS + 2 * KV_HEADS) * 2 * HALF)
    a = load_sum(qkv_ptr, at, real, stride, PARTS)
    b = load_sum(qkv_ptr, at + HALF, real, stride, PARTS)
    dtype = q_ptr.dtype.element_ty
    if head >= HEADS + KV_HEADS:
        to_v = (row * KV_HEADS + head - HEADS - KV_HEADS) * (2 * HALF) + columns
        tl.store(v_ptr + to_v, a.to(dtype), real)
        tl.store(v_ptr + to_v + HALF, b.to(dtype), real)
    else:
        is_query = head < HEADS
        if NORM:
            scale = tl.rsqrt((tl.sum(a * a, 0) + tl.sum(b * b, 0)) / (2 * HALF) + EPS)
            # As `real & is_query`, of which Triton's interpreter makes no mask.
            for_q = columns < tl.where(is_query, HALF, 0)
            for_k = columns < tl.where(is_query, 0, HALF)
            weight = tl.load(q_norm_ptr + columns, for_q, other=0.0)
            weight += tl.load(k_norm_ptr + columns, for_k, other=0.0)
            a = (a * scale).to(dtype).to(tl.float32) * weight.to(tl.float32)
            a = a.to(dtype).to(tl.float32)
            weight = tl.load(q_norm_ptr + HALF + columns, for_q, other=0.0)
            weight += tl.load(k_norm_ptr + HALF + columns, for_k, other=0.0)
            b = (b * scale).to(dtype).to(tl.float32) * weight.to(tl.float32)
            b = b.to(dtype).to(tl.float32)
        cos = tl.load(cos_ptr + row * HALF + columns, real, other=0.0)
        sin = tl.load(sin_ptr + row * HALF + columns, real, other=0.0)
        turned = (a * cos - b * sin).to(dtype)
        turned_second = (b * cos + a * sin).to(dtype)
        if is_query:
            to_q = (row * HEADS + head) * (2 * HALF) + columns
            tl.store(q_ptr + to_q, turned, real)
            tl.store(q_ptr + to_q + HALF, turned_second, real)
        else:
            to_k = (row * KV_HEADS + head - HEADS) * (2 * HALF) + columns
            tl.store(k_ptr + to_k, turned, real)
            tl.store(k_ptr + to_k + HALF, turned_second, real)
