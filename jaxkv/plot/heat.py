"""Heat maps: a number for each row and column, as a colour."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from jaxkv import figures

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def heat_maps(
    maps: Mapping[str, Any],
    *,
    row_label: str,
    column_label: str,
    label: str,
    rows: Sequence[str] | None = None,
    columns: Sequence[str] | None = None,
    limits: tuple[float, float] | None = None,
    logarithmic: bool = False,
    colours: str = "viridis",
    title: str = "",
    figsize: tuple[float, float] | None = None,
) -> "Figure":
    """Draw maps of equal size below each other, with one scale of colours.

    Args:
      maps: by name, numbers `[rows, columns]`; NaN leaves a field empty. The name is
        the title of the map.
      row_label: of the vertical axis.
      column_label: of the horizontal axis.
      label: of the colours.
      rows: a name for each row; None counts them.
      columns: a name for each column; None counts them.
      limits: numbers of the first and the last colour; None takes the smallest and the
        largest number of all maps.
      logarithmic: whether equal ratios get equal steps of colour. Numbers below the
        lower limit, which must be positive, get its colour.
      colours: a colour map of matplotlib.
      title: of the picture.
      figsize: inches; None is what the maps need.

    Raises:
      ValueError: no map, maps of other shapes, a lower limit that has no logarithm, or
        matplotlib is missing.
    """
    arrays = {name: np.asarray(array, float) for name, array in maps.items()}
    shapes = {array.shape for array in arrays.values()}
    if len(shapes) != 1 or any(len(shape) != 2 for shape in shapes):
        raise ValueError(
            "heat_maps: maps must be one or more arrays [rows, columns] of one shape, "
            f"got shapes {sorted(map(list, shapes))}."
        )
    ((height, width),) = shapes
    low, high = limits or _limits(arrays.values())
    if logarithmic and not 0 < low < high:
        raise ValueError(
            f"heat_maps: logarithmic colours need limits 0 < low < high, got {low:g} "
            f"and {high:g}; pass limits=."
        )
    figure = figures.empty(
        figsize=figsize or (9, 0.6 + (0.7 + min(2.6, 0.5 + 0.07 * height)) * len(maps))
    )
    panels = figure.subplots(len(arrays), 1, squeeze=False, sharex=True)[:, 0]
    scale = {"norm": "log"} if logarithmic else {}
    for (name, array), axes in zip(arrays.items(), panels, strict=True):
        image = axes.imshow(
            np.maximum(array, low) if logarithmic else array,
            aspect="auto",
            cmap=colours,
            interpolation="nearest" if width < 400 else "antialiased",
            **scale,
        )
        image.set_clim(low, high)
        axes.locator_params(integer=True)  # there are no halves of rows
        if rows is not None:
            axes.set_yticks(range(height), rows)
        axes.set_ylabel(row_label)
        axes.set_title(name, fontsize="medium")
    if columns is not None:
        panels[-1].set_xticks(range(width), columns, rotation=45)
    panels[-1].set_xlabel(column_label)
    figure.colorbar(image, ax=list(panels), label=label)
    figure.suptitle(title)
    return figure


def _limits(arrays: Any) -> tuple[float, float]:
    """Return the smallest and the largest number; 0 and 1 where there is none."""
    values = np.concatenate([array.ravel() for array in arrays])
    values = values[np.isfinite(values)]
    return (float(values.min()), float(values.max())) if len(values) else (0.0, 1.0)
