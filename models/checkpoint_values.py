"""Values of a checkpoint's keys, each held against what the network can compute."""

from typing import Any, NoReturn

from jaxkv.models.checkpoint import CheckpointError

MOST = 2**31 - 1  # sizes and positions are int32
_LEAST, _LARGEST = 2.0**-126, 2.0**127  # beyond them float32 has zero and infinity
MOST_LAYERS = 10_000  # each is planned for before the first tensor is looked at


def integer(raw: dict[str, Any], key: str, default: int | None = None) -> int:
    """Return a positive integer, or `default` where the key is missing or null.

    Some tools write integers as 2048.0 or 1e6; no digit is lost.
    """
    value: Any = raw.get(key)
    if value is None:
        value = default
    if type(value) is float and value.is_integer() and value <= MOST:
        value = int(value)
    if type(value) is not int or value < 1:
        raise CheckpointError(
            f"{key} must be a positive integer, found {shown(value)}."
        )
    if value > MOST:
        raise CheckpointError(f"{key} must be at most {MOST}, found {value}.")
    return value


def number(raw: dict[str, Any], key: str, default: float | None = None) -> float:
    """Return a positive number that is one in float32, too, or `default`."""
    value: Any = raw.get(key)
    if value is None:
        value = default
    if type(value) not in (int, float) or not _LEAST <= value <= _LARGEST:
        raise CheckpointError(
            f"{key} must be a positive number, found {shown(value)} (float32 holds "
            f"{_LEAST:.1e} to {_LARGEST:.1e})."
        )
    return float(value)


def unsupported(key: str, value: Any, *supported: Any) -> NoReturn:
    """Raise for a value that the network does not compute."""
    choices = ", ".join(repr(choice) for choice in supported) or "none (leave it out)"
    raise CheckpointError(
        f"{key}={shown(value)} is not supported; supported: {choices}."
    )


def shown(value: Any) -> str:
    """Return the start of a value that may be a whole vocabulary."""
    text = repr(value)
    return text if len(text) <= 120 else f"{text[:120]}..."
