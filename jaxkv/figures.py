"""What all pictures share. matplotlib is an extra, and is imported at the call."""

import importlib.util
import io
from pathlib import Path
from typing import Any

from jaxkv.provenance import write_whole


def available() -> bool:
    """Return whether matplotlib is installed."""
    return importlib.util.find_spec("matplotlib") is not None


def require() -> None:
    """Raise ValueError if matplotlib is missing."""
    if not available():
        raise ValueError("pictures need matplotlib; pip install 'jaxkv[plot]'.")


def empty(**options: Any) -> Any:
    """Return an empty figure that no window system and no global state knows of.

    Args:
      **options: of `matplotlib.figure.Figure`.

    Raises:
      ValueError: matplotlib is missing.
    """
    require()
    from matplotlib.figure import Figure

    return Figure(layout="constrained", **options)


def save(figure: Any, stem: Path) -> list[Path]:
    """Write a figure as PNG and as SVG, in a folder that may be new.

    Args:
      figure: from `empty`.
      stem: the path without the ending.

    Returns:
      The two files.
    """
    # Not with_suffix: a name may have dots of its own.
    files = [stem.with_name(f"{stem.name}.{kind}") for kind in ("png", "svg")]
    for file in files:
        drawn = io.BytesIO()
        figure.savefig(drawn, dpi=150, format=file.suffix[1:])
        write_whole(file, drawn.getvalue())
    return files
