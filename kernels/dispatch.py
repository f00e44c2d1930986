"""Which implementation of an operation runs: one answer for all operations.

A named implementation that cannot run raises and says why; it never falls back. What
`None` stands for is each operation's `choose`.
"""

from collections.abc import Callable, Mapping
from typing import Any, get_args

import jax


def resolve(
    where: str,
    implementation: str,
    table: Mapping[str, Callable[..., Any]],
    *,
    unable: Mapping[str, str] | None = None,
) -> Callable[..., Any]:
    """Return the function that a named implementation stands for.

    Args:
      where: the operation, for the messages.
      implementation: by name.
      table: all implementations of the operation, by name.
      unable: why one cannot take these arrays, by name; empty if it can.

    Raises:
      ValueError: the implementation is unknown.
      NotImplementedError: it cannot run here, or not on these arrays.
    """
    if implementation not in table:
        raise ValueError(
            f"{where}: unknown {implementation=}; choose one of "
            f"{', '.join(table)} or None."
        )
    reason = ""
    if implementation in ("triton", "fused"):
        reason = triton_unavailable()
    elif implementation == "pallas_tpu":
        reason = tpu_unavailable()
    reason = reason or (unable or {}).get(implementation, "")
    if reason:
        raise NotImplementedError(
            f'{where}: implementation="{implementation}" {reason}'
        )
    return table[implementation]


def counterpart(implementation: str | None, names: Any) -> Any:
    """Return what goes with a kernel of plain decoding: its namesake, or the best one.

    Args:
      implementation: of `decode.decode_attention` or `longflow.longflow_attention`.
      names: the other operation's `Implementation`.

    Returns:
      The name, if the other operation has one of that name, else None.
    """
    return implementation if implementation in get_args(names) else None


def given(**options: Any) -> dict[str, Any]:
    """Return the options that are not None: what leaves them out need not know them."""
    return {name: value for name, value in options.items() if value is not None}


def arrays(*optional: Any) -> tuple[Any, ...]:
    """Return the arrays at the end of an operation's that are there."""
    return tuple(array for array in optional if array is not None)


def triton_unavailable() -> str:
    """Return why no Triton version can run here, or an empty string."""
    if jax.default_backend() != "gpu":
        return f"needs an NVIDIA GPU, but JAX runs on {jax.default_backend()}."
    device = jax.local_devices()[0]
    capability = str(getattr(device, "compute_capability", "unknown"))
    major = capability.partition(".")[0]  # AMD's are names such as gfx942
    if not major.isdecimal() or int(major) < 8:
        return (
            "needs an NVIDIA GPU of compute capability 8.0 or above, but "
            f"{device.device_kind} has {capability}."
        )
    try:
        import jax_triton  # noqa: F401
    except ImportError as error:
        return f"needs jax-triton ({error}); pip install 'jaxkv[cuda13]'."
    return ""


def tpu_unavailable() -> str:
    """Return why no Pallas version can run here, or an empty string.

    Under a mesh of TPU devices they can, wherever JAX itself runs: that is how a
    program is compiled for TPUs on a machine that has none.
    """
    from jax.experimental.pallas import tpu

    if tpu.is_tpu_device():
        return ""
    return (
        f"needs a TPU, but JAX runs on {jax.default_backend()}, and no mesh of TPU "
        "devices is set (jax.set_mesh)."
    )
