"""Which tokens a cache holds: a strip per layer and head.

Axis letters: `L` layers, `K` key/value heads, `S` slots, `T` positions.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from jaxkv import figures
from jaxkv.state import KVState

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_TICKS = 8  # names of layers beside a strip, at most


def kept(cache: Sequence[KVState], *, length: int, row: int = 0) -> np.ndarray:
    """Return which positions each layer and head holds.

    Args:
      cache: one state per layer, of `prefill`, `decode_step` or `generate_tokens`.
      length: positions `T`, from 0; later ones are left out.
      row: of the batch.

    Returns:
      Bool `[L, K, T]`.
    """
    found = np.zeros((len(cache), cache[0].positions.shape[1], length), bool)
    for of_layer, state in zip(found, cache, strict=True):
        for of_head, positions in zip(
            of_layer, np.asarray(state.positions[row]), strict=True
        ):
            of_head[positions[(positions >= 0) & (positions < length)]] = True
    return found


def survival(
    maps: Mapping[str, Any],
    *,
    spans: Mapping[str, tuple[int, int]] | None = None,
    title: str = "",
) -> "Figure":
    """Draw which positions are kept: a panel per map, in it a strip per layer and head.

    Above each panel stands the share of all layers and heads that keep a position.

    Args:
      maps: by name, bool `[L, K, T]` of one `T`, from `kept`.
      spans: stretches of positions to mark, by name: the first, and the one after the
        last.
      title: of the picture.

    Raises:
      ValueError: no map, one of another shape, or matplotlib is missing.
    """
    arrays = {name: _checked(name, array) for name, array in maps.items()}
    lengths = {array.shape[2] for array in arrays.values()}
    if len(lengths) != 1:
        raise ValueError(
            "survival: maps must be one or more of equally many positions, got "
            f"{sorted(lengths)}."
        )
    (length,) = lengths
    strips = [min(3.0, 0.6 + 0.02 * array[..., 0].size) for array in arrays.values()]
    heights = [height for strip in strips for height in (0.55, strip)]
    figure = figures.empty(figsize=(9, 0.8 + sum(heights) + 0.3 * len(strips)))
    panels = figure.subplots(
        *(len(heights), 1), sharex=True, squeeze=False, height_ratios=heights
    )[:, 0]
    for number, (name, array) in enumerate(arrays.items()):
        share, strip = panels[2 * number : 2 * number + 2]
        _share(share, array, spans or {})
        share.set_title(f"{name}: {array.mean():.0%} kept", fontsize="medium")
        _strip(strip, array)
    panels[0].set_xlim(-0.5, length - 0.5)
    panels[-1].set_xlabel("position")
    if spans:
        figure.legend(*panels[0].get_legend_handles_labels(), loc="outside right upper")
    figure.suptitle(title)
    return figure


def _checked(name: str, array: Any) -> np.ndarray:
    found = np.asarray(array)
    if found.ndim != 3 or found.dtype != bool or not found.size:
        raise ValueError(
            f"survival: {name!r} must be bool [layers, heads, positions], got "
            f"{found.dtype} {list(found.shape)}; plot.kept(cache, length=...) makes it."
        )
    return found


def _share(axes: Any, array: np.ndarray, spans: Mapping[str, tuple[int, int]]) -> None:
    """Draw the share of layers and heads that keep each position."""
    share = array.mean((0, 1))
    edges = np.arange(len(share) + 1) - 0.5
    axes.stairs(share, edges, fill=True, color="tab:blue")
    for number, (name, (first, end)) in enumerate(spans.items()):
        colour = f"C{number % 9 + 1}"
        axes.axvspan(first - 0.5, end - 0.5, color=colour, alpha=0.35, label=name)
    axes.set_ylim(0, 1)
    axes.set_yticks([0, 1], ["0", "all"])


def _strip(axes: Any, array: np.ndarray) -> None:
    """Draw a line of pixels per layer and head."""
    layers, heads, length = array.shape
    axes.imshow(
        array.reshape(-1, length).astype(float),
        aspect="auto",
        cmap="Blues",
        vmin=0,
        vmax=1,
        interpolation="antialiased",
    )
    shown = range(0, layers, -(-layers // _TICKS))
    axes.set_yticks([(layer + 0.5) * heads - 0.5 for layer in shown], map(str, shown))
    axes.set_ylabel("layer")
