"""Text whose tokens have colours: a group for each, or a number for each."""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from jaxkv import figures

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_WIDTH = 100  # characters of a line
_POINTS = 8.0  # of the letters
_ADVANCE = 0.602 * _POINTS / 72  # inches of a letter of matplotlib's monospace font


def plain(text: str) -> str:
    """Return a token's text with its line ends and spaces to be seen."""
    shown = text.replace("\n", "⏎").replace("\t", "→")
    return "".join(c if c.isprintable() else "□" for c in shown).replace(" ", "·")


def coloured_text(
    tokens: Sequence[str], groups: Sequence[str], *, title: str = ""
) -> "Figure":
    """Draw a text, each token on the colour of its group.

    Args:
      tokens: what each reads; a line ends where one ends with "\\n".
      groups: of each token; "" has no colour.
      title: of the picture.

    Raises:
      ValueError: not as many groups as tokens, or matplotlib is missing.
    """
    _check("groups", tokens, groups)
    figures.require()
    names = [name for name in dict.fromkeys(groups) if name]
    colours = {name: (f"C{number % 10}", 0.35) for number, name in enumerate(names)}
    figure, axes = _page(tokens, [colours.get(name) for name in groups])
    if names:
        from matplotlib.patches import Patch

        patches = [Patch(facecolor=colours[name], label=name) for name in names]
        figure.legend(handles=patches, loc="outside lower center", ncols=3)
    axes.set_title(title)
    return figure


def shaded_text(
    tokens: Sequence[str], values: Sequence[float], *, label: str, title: str = ""
) -> "Figure":
    """Draw a text, each token the darker the higher its number between 0 and 1 is.

    Args:
      tokens: see `coloured_text`.
      values: of each token.
      label: of the numbers.
      title: of the picture.

    Raises:
      ValueError: not as many numbers as tokens, or matplotlib is missing.
    """
    _check("values", tokens, values)
    figures.require()
    from matplotlib import colormaps
    from matplotlib.cm import ScalarMappable

    colours = colormaps["Oranges"]
    figure, axes = _page(tokens, [colours(0.8 * float(value)) for value in values])
    scale = ScalarMappable(cmap=colours)
    scale.set_clim(0, 1.25)
    bar = figure.colorbar(
        scale, ax=axes, label=label, location="bottom", shrink=0.4, aspect=40
    )
    bar.ax.set_xlim(0, 1)
    axes.set_title(title)
    return figure


def _check(name: str, tokens: Sequence[str], given: Sequence[Any]) -> None:
    if len(tokens) != len(given):
        raise ValueError(
            f"{name} must have one entry for each of the {len(tokens)} tokens, got "
            f"{len(given)}."
        )


def _page(tokens: Sequence[str], colours: Sequence[Any]) -> tuple[Any, Any]:
    """Return a figure, and axes with the text, a unit for each letter and line."""
    from matplotlib.patches import Rectangle

    placed = list(_placed(tokens))
    lines = 1 + max((line for _, line, _, _ in placed), default=0)
    height = 0.18 * lines
    figure = figures.empty(figsize=(0.3 + _WIDTH * _ADVANCE, 0.9 + height))
    axes = figure.subplots()
    for column, line, text, index in placed:
        if colours[index] is not None:
            box = Rectangle((column, line), len(text), 1, facecolor=colours[index])
            axes.add_patch(box)
        axes.text(
            *(column, line + 0.5, text),
            family="monospace",
            fontsize=_POINTS,
            va="center",
            parse_math=False,
        )
    axes.set_xlim(0, _WIDTH)
    axes.set_ylim(lines, 0)
    axes.set_axis_off()
    return figure, axes


def _placed(tokens: Sequence[str]) -> Iterator[tuple[int, int, str, int]]:
    """Yield column, line, text and index of each token, or of a part of a long one."""
    column = line = 0
    for index, token in enumerate(tokens):
        text = plain(token).replace("·", " ")
        while text:
            if column + len(text) > _WIDTH and column:
                column, line = 0, line + 1
                text = text.lstrip(" ") or " "
            part, text = text[:_WIDTH], text[_WIDTH:]
            yield column, line, part, index
            column += len(part)
        if token.endswith("\n"):
            column, line = 0, line + 1
