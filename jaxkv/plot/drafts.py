"""The tree of one speculation step: what was drafted, and what became of it.

Axis letters: `B` batch, `T` nodes of a tree.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from jaxkv import figures
from jaxkv.plot.words import plain
from jaxkv.trees import KINDS, DraftTree

if TYPE_CHECKING:
    from matplotlib.figure import Figure

ACCEPTED = "#a6dba0"
_EDGES = dict(
    zip(KINDS, ("dimgrey", "tab:blue", "tab:orange", "tab:purple"), strict=True)
)
_COLUMN, _LINE = 1.1, 0.27  # inches of a node


def accepted_nodes(
    tree: DraftTree, output: Sequence[int], *, row: int = 0
) -> tuple[int, ...]:
    """Return the nodes that an output goes through, the root left out.

    Args:
      tree: arrays `[B, T]`.
      output: the tokens that came after the root's.
      row: of the batch.
    """
    tokens, parents, valid = (
        np.asarray(x)[row] for x in (tree.tokens, tree.parents, tree.valid)
    )
    path: list[int] = []
    for token in output:
        below = valid & (parents == (path[-1] if path else 0)) & (tokens == token)
        below[0] = False  # the root is its own parent
        if not below.any():
            break
        path.append(int(below.argmax()))
    return tuple(path)


def draft_tree(
    tree: DraftTree,
    *,
    text: Callable[[int], str],
    accepted: Iterable[int] = (),
    row: int = 0,
    title: str = "",
) -> "Figure":
    """Draw a tree of drafts from left to right: filled what passed, by kind the frame.

    Args:
      tree: arrays `[B, T]`, as `jaxkv.speculation` has them.
      text: returns what a token reads, such as `lm.tokenizer.decode`.
      accepted: nodes that passed, from `accepted_nodes`.
      row: of the batch.
      title: of the picture.

    Raises:
      ValueError: matplotlib is missing.
    """
    tokens, parents, depths, valid, kinds = (np.asarray(x)[row] for x in tree)
    lines = _lines(parents, valid)
    width, height = int(depths[valid].max()) + 1, 1 + max(lines.values())
    passed = {0, *accepted}
    figure = figures.empty(
        figsize=(0.6 + max(6.5, _COLUMN * width), 1.0 + _LINE * height)
    )
    axes = figure.subplots()
    for node, line in lines.items():
        on_path = node in passed
        if node:
            start = depths[parents[node]], lines[int(parents[node])]
            axes.plot(
                *zip(start, (depths[node], line), strict=True),
                color="tab:green" if on_path else "lightgrey",
                lw=2 if on_path else 1,
                zorder=1,
            )
        axes.text(
            depths[node],
            line,
            plain(text(int(tokens[node]))),
            family="monospace",
            fontsize=8,
            ha="center",
            va="center",
            parse_math=False,
            bbox=dict(
                boxstyle="round,pad=0.2",
                facecolor=ACCEPTED if on_path else "white",
                edgecolor=_EDGES[KINDS[kinds[node]]] if node else "black",
            ),
        )
    axes.set_xlim(-0.5, width - 0.5)
    axes.set_ylim(height - 0.4, -0.6)
    axes.set_xticks(range(width), ["newest", *map(str, range(1, width))])
    axes.set_xlabel("depth")
    axes.set_yticks([])
    axes.set_frame_on(False)
    there = {KINDS[kinds[node]] for node in lines if node}
    _legend(figure, [kind for kind in KINDS if kind in there])
    figure.suptitle(title)
    return figure


def _lines(parents: np.ndarray, valid: np.ndarray) -> dict[int, int]:
    """Return the line of each node: a first child stands beside its parent."""
    children: dict[int, list[int]] = {}
    for node in map(int, np.flatnonzero(valid)):
        if node:
            children.setdefault(int(parents[node]), []).append(node)
    lines: dict[int, int] = {}
    free, open_nodes = 0, [(0, True)]  # whether a node is its parent's first child
    while open_nodes:
        node, first = open_nodes.pop()
        if not first:
            free += 1
        lines[node] = free
        below = children.get(node, [])
        open_nodes += [(child, child == below[0]) for child in reversed(below)]
    return lines


def _legend(figure: Any, kinds: Sequence[str]) -> None:
    from matplotlib.patches import Patch

    names = [Patch(facecolor=ACCEPTED, edgecolor="white", label="accepted")]
    names += [
        Patch(facecolor="white", edgecolor=_EDGES[kind], label=kind) for kind in kinds
    ]
    figure.legend(handles=names, loc="outside lower center", ncols=len(names))
