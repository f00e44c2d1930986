"""What all pictures share. matplotlib is an extra, and is imported at the call."""

import functools
import importlib.util
import io
from pathlib import Path
from typing import Any

from jaxkv.provenance import write_whole

# In notebooks, which hold what they show, so that it should be small.
SHOWN_DPI, SHOWN_COLOURS = 72, 64


def available() -> bool:
    """Return whether matplotlib is installed."""
    return importlib.util.find_spec("matplotlib") is not None


def require() -> None:
    """Raise ValueError if matplotlib is missing."""
    if not available():
        raise ValueError("pictures need matplotlib; pip install 'jaxkv[plot]'.")


def empty(**options: Any) -> Any:
    """Return an empty figure that no window system and no global state knows of.

    A notebook shows it as the last value of a cell.

    Args:
      **options: of `matplotlib.figure.Figure`.

    Raises:
      ValueError: matplotlib is missing.
    """
    require()
    return _kind_of_figure()(layout="constrained", **options)


@functools.cache
def _kind_of_figure() -> Any:
    from matplotlib.figure import Figure

    class Picture(Figure):
        """A figure that a notebook shows, whether or not pyplot was imported."""

        def _repr_png_(self) -> bytes:
            from PIL import Image  # comes with matplotlib

            drawn, small = io.BytesIO(), io.BytesIO()
            self.savefig(drawn, dpi=SHOWN_DPI, format="png")
            image = Image.open(drawn).convert("RGB").quantize(SHOWN_COLOURS)
            image.save(small, "png", optimize=True)
            return small.getvalue()

    return Picture


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
        write(figure, file)
    return files


def write(figure: Any, file: Path) -> None:
    """Write a figure as its file's ending says, in a folder that may be new."""
    drawn = io.BytesIO()
    figure.savefig(drawn, dpi=150, format=file.suffix[1:])
    write_whole(file, drawn.getvalue())
