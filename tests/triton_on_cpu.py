"""Triton without a GPU: kernels run by its interpreter, or are compiled and measured.

Triton must be imported with `TRITON_INTERPRET=1` set to interpret, and then cannot
compile, so a test file whose kernels are interpreted is its own worker, a script.
"""

import concurrent.futures
import contextlib
import functools
import io
import json
import multiprocessing
import multiprocessing.forkserver
import pathlib
import re
import runpy
import subprocess
import sys
import tempfile

import pytest

SHORT = {"float32": "*fp32", "bfloat16": "*bf16", "float16": "*fp16", "int32": "*i32"}


@functools.cache
def with_imports() -> multiprocessing.context.BaseContext:
    """Return what starts processes that have torch, Triton and JAX imported.

    Each is forked from one that has; importing takes longer than most workers do.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "triton.language", "jax.numpy"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        patch.setenv("JAX_PLATFORMS", "cpu")
        multiprocessing.forkserver.ensure_running()
    return context


def run_script(file: str, arguments: tuple[str, ...]) -> str:
    """Run a file as a script in this process; return the last line that it prints."""
    sys.argv = [file, *arguments]
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        runpy.run_path(file, run_name="__main__")
    return printed.getvalue().splitlines()[-1]


def interpreted(file: str, *arguments: str) -> list[str]:
    """Run a test file as a worker; return the failures that its last line lists."""
    processes = concurrent.futures.ProcessPoolExecutor(1, mp_context=with_imports())
    with processes:
        return json.loads(processes.submit(run_script, file, arguments).result())


def assert_interpreted(file: str, cases: str) -> None:
    """Run the cases of a test file in its worker, where Triton and torch are there."""
    pytest.importorskip("triton")
    pytest.importorskip("torch")
    failures = interpreted(file, cases)
    assert not failures, "\n".join(failures)


fast_and_slow = pytest.mark.parametrize(
    "cases", ["FAST", pytest.param("SLOW", marks=pytest.mark.slow)]
)


def compiled_for(shapes, slow_shapes):
    """Return the mark of a test that compiles for each shape and GPU generation."""
    capability = pytest.mark.parametrize("capability", [80, 90])
    shape = pytest.mark.parametrize(
        "shape",
        [*shapes, *(pytest.param(s, marks=pytest.mark.slow) for s in slow_shapes)],
        ids=lambda s: "-".join(map(str, s)),
    )
    return lambda test: capability(shape(test))


# What a kernel without sinks and caps is compiled for, as `triton_call` has it.
PLAIN = dict(SINK=False, CAP=None, sink_ptr=1)


def usage(kernel, dtypes, constants, tiles, capability) -> dict[str, int]:
    """Compile one kernel to machine code and read what it uses.

    `dtypes` maps the names of the array arguments to dtypes.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = kernel.arg_names
    signature = {
        name: "constexpr" if name in constants else SHORT[dtypes[name]]
        for name in names
    }
    compiled = triton.compile(
        ASTSource(
            kernel,
            signature,
            constexprs={(names.index(name),): v for name, v in constants.items()},
            # What jax-triton promises the compiler about every array.
            attrs={
                (i,): [["tt.divisibility", 16]]
                for i, name in enumerate(names)
                if name not in constants
            },
        ),
        target=GPUTarget("cuda", capability, 32),
        options=dict(
            num_warps=tiles.warps, num_stages=tiles.stages, enable_fp_fusion=True
        ),
    )
    tool = pathlib.Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        report = subprocess.run(
            [tool, "-res-usage", file.name], capture_output=True, text=True, check=True
        )
    numbers = dict(re.findall(r"(REG|STACK|LOCAL):(\d+)", report.stdout))
    return dict(
        registers=int(numbers["REG"]),
        stack=int(numbers["STACK"]),
        local=int(numbers["LOCAL"]),
        shared=compiled.metadata.shared,
    )


def call(kernel, arrays, out_types, *, aliases, grid, **constants):
    """Do what `triton_call.call` does, in the interpreter, on the CPU.

    Outputs start out as NaN and -1. As with jax-triton before 0.4, a kernel gets
    aliased buffers twice, and a number for an array that is not there. The inputs stay
    as they are.
    """
    del constants["num_warps"], constants["num_stages"]
    import jax.numpy as jnp
    import numpy as np
    import torch

    def to_torch(array):
        if array is None:
            return 1
        array = np.array(array, order="C")  # a copy
        if array.dtype == jnp.bfloat16:
            return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
        return torch.from_numpy(array)

    def to_jax(tensor):
        if tensor.dtype == torch.bfloat16:
            return jnp.asarray(tensor.view(torch.int16).numpy().view(jnp.bfloat16))
        return jnp.asarray(tensor.numpy())

    inputs = [to_torch(x) for x in arrays]
    sources = {output: source for source, output in aliases.items()}
    outputs = []
    for i, out in enumerate(out_types):
        if i in sources:
            source = arrays[sources[i]]
            assert (out.shape, out.dtype) == (source.shape, source.dtype)
            outputs.append(inputs[sources[i]])
        else:
            junk = -1 if jnp.issubdtype(out.dtype, jnp.integer) else jnp.nan
            outputs.append(to_torch(np.full(out.shape, junk, out.dtype)))
    kernel[grid](*inputs, *outputs, **constants)
    return tuple(map(to_jax, outputs))


def teach_bfloat16_dot():
    """Make the interpreter's `dot` read bfloat16, whose bits it takes for integers.

    Its sums are float64, rounded once: NumPy's order of a sum depends on the number of
    rows, and that of the tensor cores does not.
    """
    import numpy as np
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    def widen(builder, x):
        is_bfloat16 = x.dtype.scalar == tl.bfloat16
        x = builder.cast_impl(x, tl.float32) if is_bfloat16 else x
        return x.data.astype(np.float64)

    def create_dot(builder, a, b, d, *_):
        product = np.matmul(widen(builder, a), widen(builder, b)) + d.data
        return TensorHandle(product.astype(d.data.dtype), d.dtype.scalar)

    InterpreterBuilder.create_dot = create_dot
