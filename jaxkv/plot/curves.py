"""Curves with intervals: score against budget, loss against position."""

import dataclasses
import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from jaxkv import figures

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclasses.dataclass(frozen=True, kw_only=True)
class Curve:
    """Means at some places, each with its interval if there is one.

    Attributes:
      at: budgets (numbers of tokens, or names such as "6%"), or positions.
      mean: one number for each.
      low: where each interval begins; None draws none.
      high: where each interval ends; None draws none.
    """

    at: Sequence[Any]
    mean: Sequence[float]
    low: Sequence[float] | None = None
    high: Sequence[float] | None = None

    def __post_init__(self) -> None:
        """Need as many numbers as places."""
        for name in ("mean", "low", "high"):
            values = getattr(self, name)
            if values is not None and len(values) != len(self.at):
                raise ValueError(
                    f"Curve: {name} must have a number for each of the {len(self.at)} "
                    f"places of at, got {len(values)}."
                )
        if (self.low is None) != (self.high is None):
            raise ValueError("Curve: low and high go together; pass both or neither.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Panel:
    """Curves that are drawn into one frame.

    Attributes:
      curves: by name; a name looks the same in each panel of a picture.
      controls: what no budget changes, by name, drawn in black: a number is a level
        line.
      title: of the frame.
    """

    curves: Mapping[str, Curve]
    controls: Mapping[str, float | Curve] = dataclasses.field(default_factory=dict)
    title: str = ""


def against_budget(
    panels: Sequence[Panel],
    *,
    label: str,
    limits: tuple[float, float] | None = None,
    title: str = "",
    budget_label: str = "budget",
) -> "Figure":
    """Draw accuracy or loss against the budget, panels side by side.

    Budgets stand evenly spaced in their order, because they are often powers of two.

    Args:
      panels: of curves whose `at` are budgets.
      label: of the vertical axis.
      limits: of the vertical axis; None is what the curves need.
      title: of the picture.
      budget_label: of the horizontal axes, where budgets are of another kind.

    Raises:
      ValueError: a budget is no number, or matplotlib is missing.
    """
    figure, frames = _frames(panels, label=label, limits=limits, title=title)
    looks = _looks(panels)
    for axes, panel in zip(frames, panels, strict=True):
        # A budget may be a number in one curve and text in another.
        every = {str(at) for curve in panel.curves.values() for at in curve.at}
        ordered = sorted(every, key=_tokens)
        place = {name: number for number, name in enumerate(ordered)}
        axes.set_xticks(range(len(ordered)), ordered)
        axes.set_xlabel(budget_label)
        for name, curve in panel.curves.items():
            at = np.array([place[str(budget)] for budget in curve.at])
            order = np.argsort(at)
            mean = np.asarray(curve.mean, float)[order]
            errors = None
            if curve.low is not None and curve.high is not None:
                low, high = (
                    np.asarray(x, float)[order] for x in (curve.low, curve.high)
                )
                errors = [mean - low, high - mean]
            axes.errorbar(
                at[order], mean, yerr=errors, capsize=3, label=name, **looks[name]
            )
    _legend(figure, frames)
    return figure


def against_position(
    panels: Sequence[Panel], *, label: str, title: str = ""
) -> "Figure":
    """Draw loss against position, panels side by side; intervals are shaded.

    Args:
      panels: of curves whose `at` are positions in ascending order.
      label: of the vertical axis.
      title: of the picture.

    Raises:
      ValueError: matplotlib is missing.
    """
    figure, frames = _frames(panels, label=label, limits=None, title=title)
    looks = _looks(panels)
    for axes, panel in zip(frames, panels, strict=True):
        axes.set_xlabel("position")
        for name, curve in panel.curves.items():
            look = dict(looks[name], marker="")
            axes.plot(curve.at, curve.mean, label=name, **look)
            if curve.low is not None:
                axes.fill_between(
                    curve.at, curve.low, curve.high, color=look["color"], alpha=0.2
                )
    _legend(figure, frames)
    return figure


def _frames(
    panels: Sequence[Panel],
    *,
    label: str,
    limits: tuple[float, float] | None,
    title: str,
) -> tuple[Any, Sequence[Any]]:
    """Return a figure and a frame for each panel, with its controls in it."""
    count = max(1, len(panels))
    figure = figures.empty(figsize=(3 + 4.5 * count, 4.2))
    frames = figure.subplots(1, count, squeeze=False, sharey=True)[0][: len(panels)]
    for axes, panel in zip(frames, panels, strict=True):
        for name, control in panel.controls.items():
            if isinstance(control, Curve):
                axes.plot(control.at, control.mean, color="black", lw=2, label=name)
            else:
                axes.axhline(control, color="black", ls="--", label=name)
        axes.set_title(panel.title)
        axes.grid(alpha=0.3)
        if limits is not None:
            axes.set_ylim(*limits)
    if len(frames):
        frames[0].set_ylabel(label)
    figure.suptitle(title)
    return figure, frames


def _looks(panels: Sequence[Panel]) -> dict[str, dict[str, str]]:
    """Return how each name is drawn, which may be absent from some panels."""
    names = dict.fromkeys(name for panel in panels for name in panel.curves)
    return dict(zip(names, _styles(), strict=False))


def _styles() -> Iterator[dict[str, str]]:
    """Yield ways to draw a line: ten colours, with another marker after each round."""
    for marker, line in itertools.cycle((("o", "-"), ("s", "--"), ("^", ":"))):
        for colour in range(10):
            yield {"color": f"C{colour}", "marker": marker, "ls": line}


def _legend(figure: Any, frames: Sequence[Any]) -> None:
    """Name each curve once, beside the frames."""
    shown: dict[str, Any] = {}
    for axes in frames:
        lines, names = axes.get_legend_handles_labels()
        shown |= {
            n: line for n, line in zip(names, lines, strict=True) if n not in shown
        }
    figure.legend(
        *(list(shown.values()), list(shown)),
        loc="outside right upper",
        fontsize="small",
    )


def _tokens(budget: str) -> float:
    try:
        return float(budget.removesuffix("%"))
    except ValueError:
        raise ValueError(
            f"against_budget: a budget is a number or a percentage, got {budget!r}."
        ) from None
