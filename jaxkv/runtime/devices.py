"""Whether JAX has a device at all."""

import jax


def check_devices() -> None:
    """Raise ValueError, with what JAX was told, where it has no device to run on."""
    try:
        jax.devices()
    except Exception as error:  # a missing plug-in is an AssertionError without words
        platforms = jax.config.jax_platforms  # type: ignore[attr-defined]
        asked = f" for JAX_PLATFORMS={platforms}" if platforms else ""
        said = " ".join(str(error).split()) or "its plug-in is not installed"
        raise ValueError(
            f"JAX finds no device{asked} ({said}); unset JAX_PLATFORMS, or install "
            'what it names, such as pip install "jaxkv[cuda13]".'
        ) from error
