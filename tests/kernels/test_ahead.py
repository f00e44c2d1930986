"""Fetching ahead: what is asked for, and that it is, without a GPU.

Run as a script, this file is its own worker; `triton_on_cpu` says why.
"""

import json
import types

import jax
import numpy as np
import pytest
import triton_on_cpu

from jaxkv.kernels import ahead_triton, pointwise_triton, project_triton

# depth, columns: smaller than what is fetched, larger, and of one chunk a share
MATRICES = [(256, 192), (4096, 6144), (64, 128)]


@pytest.fixture
def hopper(monkeypatch):
    monkeypatch.setattr(ahead_triton, "fetches_in_bulk", lambda: True)


def of(*shape):
    return jax.ShapeDtypeStruct(shape, "bfloat16")


def test_the_beginning_of_each_share_is_fetched(hopper):
    for depth, columns in MATRICES:
        found = ahead_triton.constants(of(depth, columns), warps=4)
        size, share = 2 * depth * columns, 2 * depth * columns // 4
        assert found["AHEAD_STRIDE"] == share and found["LANES"] == 128
        fetched = found["AHEAD_CHUNKS"] * found["AHEAD_CHUNK"]
        wanted = min(size, ahead_triton.MOST_BYTES)
        assert wanted - 4 * found["AHEAD_CHUNK"] < fetched <= wanted


def test_what_cannot_be_fetched_is_not(hopper, monkeypatch):
    for matrix in (None, of(6, 4096), of(4, 1000), of(8, 4)):
        assert ahead_triton.helpers(matrix) == 0
        assert ahead_triton.constants(matrix, warps=1)["AHEAD_CHUNKS"] == 0
    assert ahead_triton.helpers(of(64, 128)) > 0
    monkeypatch.undo()
    assert ahead_triton.helpers(of(64, 128)) == 0  # a device that is no such GPU


def test_each_chunk_is_asked_for_once():
    pytest.importorskip("triton")
    pytest.importorskip("torch")
    failures = triton_on_cpu.interpreted(__file__)
    assert not failures, "\n".join(failures)


def test_launches_that_fetch_compile(hopper):
    pytest.importorskip("triton")
    from jaxkv.kernels import pointwise_triton_body, project_triton_body

    tiles = project_triton.choose_tiles(8, 4096, 12288, gated=True)
    ahead = dict(ahead=of(4096, 6144))
    norm = pointwise_triton.norm_constants(4096, 1e-6, parts=4, **ahead)
    rotate = pointwise_triton.rotate_constants(
        *(32, 8, 64, 1e-6), norm=True, parts=2, **ahead
    )
    gated = project_triton.constants(8, 4096, 12288, tiles, gated=True, **ahead)
    one = types.SimpleNamespace(warps=1, stages=1)
    wide = types.SimpleNamespace(warps=pointwise_triton.norm_warps(4096), stages=1)
    for kernel, constants, how in (
        (pointwise_triton_body.add_rms_norm, norm, wide),
        (pointwise_triton_body.split_and_rotate, rotate, one),
        (project_triton_body.project_gated, gated, tiles),
    ):
        assert constants["AHEAD_CHUNKS"] == 2048
        assert constants["LANES"] == 32 * how.warps
        dtypes = dict.fromkeys(kernel.arg_names, "bfloat16")
        floats = ("cos_ptr", "sin_ptr", "delta_ptr", "qkv_ptr")
        dtypes |= dict.fromkeys(floats, "float32")
        usage = triton_on_cpu.usage(kernel, dtypes, constants, how, 90)
        assert usage["stack"] == 0 and usage["local"] == 0, (kernel, usage)


def check_chunks(depth, columns, programs) -> list[str]:
    """Interpret `fetch_ahead`, and compare what it asks for with a plain list."""
    import torch
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    from jaxkv.kernels.ahead_triton_body import fetch_ahead

    asked = []

    def ask(builder, asm, constraints, args, *_):
        address, wanted, size = (x.data for x in args)
        asked.extend(zip(address[wanted != 0], size[wanted != 0], strict=True))
        nothing = TensorHandle(np.zeros(address.shape, np.int32), tl.int32)
        return types.SimpleNamespace(get_result=lambda i: nothing)

    InterpreterBuilder.create_inline_asm = ask
    ahead_triton.fetches_in_bulk = lambda: True
    found = ahead_triton.constants(of(depth, columns), warps=1)
    names = ("AHEAD_CHUNKS", "AHEAD_CHUNK", "AHEAD_SHARES", "AHEAD_STRIDE", "LANES")
    constants = [found[name] for name in names]
    chunks, chunk, shares, stride, _ = constants
    matrix = torch.zeros(1, dtype=torch.bfloat16)
    for program in range(programs):
        fetch_ahead[(1,)](matrix, program, programs, *constants)
    offsets = [
        share * stride + i * chunk
        for share in range(shares)
        for i in range(chunks // shares)
    ]
    got = sorted((int(at) - matrix.data_ptr(), int(size)) for at, size in asked)
    if got != [(offset, chunk) for offset in offsets]:
        return [f"{depth} x {columns}, {programs}: {len(got)} chunks"]
    return []


if __name__ == "__main__":
    cases = [(*sizes, programs) for sizes in MATRICES for programs in (1, 7)]
    print(json.dumps([f for case in cases for f in check_chunks(*case)]))
