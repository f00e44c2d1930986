"""Launches of Triton kernels through jax-triton, and what their tiles are cut for."""

import inspect
import math
import warnings
from typing import Any

import jax


def call(kernel, arrays, out_types, *, aliases, grid, **options):
    """Launch through jax-triton, whichever side of its version 0.4.

    Before 0.4 an aliased buffer is passed a second time, as the output in whose place
    it is; from 0.4 on, once, as an input. So aliased outputs come last, and the last
    parameters of a kernel, whose names start with an underscore, are theirs and not
    used: from 0.4 on they get a constant.

    Args:
      kernel: a function under `triton.jit`.
      arrays: its inputs; None for one that this call has not, which the compiled kernel
        then has no parameter for.
      out_types: shapes and dtypes of its outputs.
      aliases: index of an input to the index of the output that takes its place.
      grid: of programs.
      **options: compile-time arguments, `num_warps` and `num_stages`.

    Returns:
      The outputs.
    """
    import jax_triton

    # Both versions make a constant of a parameter that is given this number.
    arrays = tuple(1 if array is None else array for array in arrays)
    if "out_type" in inspect.signature(jax_triton.triton_call).parameters:
        options |= {name: 0 for name in kernel.arg_names if name[0] == "_"}
        options["out_type"] = out_types
        # As before 0.4: a * b + c is rounded once. Triton is to change its default.
        options["backend_options"] = {"enable_fp_fusion": True}
    else:
        options["out_shape"] = out_types
    with warnings.catch_warnings():
        # 0.4 would rather be given mutable references; 0.3 does not know them.
        warnings.filterwarnings(
            "ignore", "input_output_aliases is deprecated", DeprecationWarning
        )
        return jax_triton.triton_call(
            *arrays,
            kernel=kernel,
            grid=grid,
            input_output_aliases=aliases,
            name=kernel.__name__,
            **options,
        )


def weighing(sink: jax.Array | None, cap: float | None) -> dict[str, Any]:
    """Return the compile-time arguments that say what `weighing_triton_body` does.

    Args:
      sink: see `decode.decode_attention`; the kernel's last input, None included.
      cap: likewise.
    """
    return dict(
        SINK=sink is not None,
        CAP=None if cap is None else float(cap) * math.log2(math.e),
    )


def num_processors() -> int:
    """Return the number of streaming multiprocessors of the default GPU."""
    return getattr(jax.local_devices()[0], "core_count", 132)


def shared_memory() -> int:
    """Return the bytes of shared memory that a program may have on the default GPU."""
    capability = getattr(jax.local_devices()[0], "compute_capability", "9.0")
    # CUDA C++ Programming Guide, technical specifications per compute capability.
    large = {"8.0": 163, "8.7": 163, "9.0": 227, "10.0": 227, "10.3": 227}
    return 1024 * large.get(str(capability), 99)


def next_power_of_2(number: int) -> int:
    """Return the least power of two that is not below `number`, which is positive."""
    return 1 << (number - 1).bit_length()
