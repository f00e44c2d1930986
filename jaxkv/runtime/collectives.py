"""What XLA is told of programs whose devices talk to each other."""

import functools

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

# NCCL alone sends, and a CUDA graph holds what it sends. XLA's own kernels for small
# sums run on a stream beside, which no graph holds: 73 of them cut a step of 36 layers
# into as many graphs.
_TOLD = (
    ("xla_gpu_experimental_use_collective_kernels", ""),
    (
        "xla_gpu_enable_command_buffer",
        "CONDITIONAL,CUBLAS,CUBLASLT,CUDNN,CUSTOM_CALL,DYNAMIC_SLICE_FUSION,FUSION,"
        "COLLECTIVES",
    ),
)


def compiler_options(mesh: Mesh | None) -> tuple[tuple[str, str], ...]:
    """Return what XLA is told of a program over a mesh, as `jax.jit` takes it.

    Measured on two H200s of one host with JAX 0.11.2
    (`2026-11-28-mesh-ways-qwen3-8b-h200.json`). So it is nothing but for several GPUs
    of this process, and where this JAX does not know all of it, as 0.10 does not. It
    goes before what `XLA_FLAGS` says of the same.

    Args:
      mesh: over which the program's arrays are laid out; None without one.
    """
    if mesh is None or mesh.size == 1 or mesh.is_multi_process:
        return ()
    if mesh.devices.flat[0].platform != "gpu":
        return ()
    return _TOLD if _knows(mesh, _TOLD) else ()


@functools.lru_cache(maxsize=16)
def _knows(mesh: Mesh, told: tuple[tuple[str, str], ...]) -> bool:
    """Return whether a program that does nothing compiles when XLA is told so."""
    everywhere = NamedSharding(mesh, PartitionSpec())
    number = jax.ShapeDtypeStruct((), "float32", sharding=everywhere)
    lowered = jax.jit(_itself).lower(number)
    try:
        lowered.compile(compiler_options=dict(told))
    except jax.errors.JaxRuntimeError:
        return False
    return True


def _itself(x: jax.Array) -> jax.Array:
    return x
