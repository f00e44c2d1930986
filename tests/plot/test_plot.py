"""Pictures show the numbers they are given, and refuse what they cannot show."""

import jax.numpy as jnp
import numpy as np
import pytest

from jaxkv import figures, plot, state
from jaxkv.trees import DraftTree

pytest.importorskip("matplotlib")

# The root has children 1 and 3, node 1 has child 2; node 4 is padding.
TREE = DraftTree(
    tokens=jnp.array([[5, 6, 7, 8, 6]]),
    parents=jnp.array([[0, 0, 1, 0, 0]]),
    depths=jnp.array([[0, 1, 2, 1, 1]]),
    valid=jnp.array([[True, True, True, True, False]]),
    kinds=jnp.array([[0, 1, 3, 2, 1]]),
)
CURVE = plot.Curve(at=["128", 64], mean=[0.5, 0.25], low=[0.4, 0.0], high=[0.9, 0.5])
PANELS = [
    plot.Panel(curves={"a": CURVE}, controls={"full": 1.0}, title="short"),
    plot.Panel(curves={"b": CURVE, "a": CURVE}, title="long"),
]
MAP = np.arange(12).reshape(2, 2, 3) % 5 == 0
LABELS = dict(row_label="layer", column_label="position", label="attention")


def labels(figure):
    """Return the names in the figure's legends, in order."""
    return [text.get_text() for legend in figure.legends for text in legend.texts]


def texts(axes):
    return [text.get_text() for text in axes.texts]


def test_kept_reads_positions_whatever_their_slots():
    one = state.init(batch=2, kv_heads=2, slots=3, head_dim=1, dtype=jnp.float32)
    slots = [[[0, 1, 2], [0, 1, 2]], [[4, -1, 0], [-1, 9, 1]]]
    cache = (one.__class__(**(vars(one) | dict(positions=jnp.array(slots)))), one)
    found = plot.kept(cache, length=5, row=1)
    assert found.shape == (2, 2, 5) and found.sum() == 3
    assert found[0].nonzero()[0].tolist() == [0, 0, 1]
    assert found[0].nonzero()[1].tolist() == [0, 4, 1]


def test_survival_has_a_strip_per_layer_and_head():
    figure = plot.survival({"one": MAP, "two": ~MAP}, spans={"fact": (1, 2)}, title="t")
    share, strip, _, other = figure.axes
    assert share.get_title() == "one: 25% kept" and labels(figure) == ["fact"]
    (image,), (inverse,) = strip.images, other.images
    assert image.get_array().tolist() == MAP.reshape(4, 3).tolist()
    assert (inverse.get_array() == 1 - image.get_array()).all()
    assert share.patches[0].get_data().values.tolist() == MAP.mean((0, 1)).tolist()


def test_heat_maps_share_their_colours():
    values = [[0.0, 1.0], [float("nan"), 5.0]]
    figure = plot.heat_maps({"a": values, "b": np.ones((2, 2))}, **LABELS, title="t")
    first, second, _ = figure.axes
    assert first.images[0].get_clim() == second.images[0].get_clim() == (0, 5)
    assert first.images[0].get_array().tolist() == [[0, 1], [None, 5]]
    figure = plot.heat_maps({"a": values}, **LABELS, logarithmic=True, limits=(0.5, 8))
    assert figure.axes[0].images[0].get_array()[0, 0] == 0.5  # and is not left blank
    blank = plot.heat_maps({"a": [[float("nan")]]}, **LABELS, rows=["r"], columns=["c"])
    assert blank.axes[0].images[0].get_clim() == (0, 1)
    assert blank.axes[0].get_yticklabels()[0].get_text() == "r"


def test_budgets_stand_in_their_order_and_curves_look_alike():
    figure = plot.against_budget(PANELS, label="score", limits=(0, 1), title="t")
    first, second = figure.axes
    assert [tick.get_text() for tick in first.get_xticklabels()] == ["64", "128"]
    assert labels(figure) == ["full", "a", "b"]
    (drawn,) = first.containers
    assert drawn.lines[0].get_ydata().tolist() == [0.25, 0.5]
    low, high = drawn.lines[2][0].get_segments()[0][:, 1]
    assert (low, high) == (0.0, 0.5)
    colours = [axes.containers[-1].lines[0].get_color() for axes in (first, second)]
    assert colours[0] == colours[1]


def test_positions_have_shaded_intervals_and_a_black_control():
    curve = plot.Curve(at=[1, 2], mean=[3, 4], low=[2, 3], high=[4, 5])
    panel = plot.Panel(curves={"a": curve}, controls={"full": curve})
    (axes,) = plot.against_position([panel], label="nats").axes
    control, line = axes.lines
    assert control.get_color() == "black" and line.get_ydata().tolist() == [3, 4]
    assert axes.collections[0].get_datalim(axes.transData).bounds == (1, 2, 1, 3)


@pytest.mark.parametrize(
    ("output", "nodes"),
    [([6, 7, 1], (1, 2)), ([8, 7], (3,)), ([7], ()), ([], ()), ([5, 6], ())],
)
def test_accepted_nodes_follow_the_output(output, nodes):
    assert plot.accepted_nodes(TREE, output) == nodes


def test_a_tree_shows_what_passed():
    figure = plot.draft_tree(TREE, text="{} $".format, accepted=(1, 2), title="t")
    (axes,) = figure.axes
    assert texts(axes) == ["5·$", "6·$", "7·$", "8·$"]  # no padding
    filled = [text.get_bbox_patch().get_facecolor()[:3] for text in axes.texts]
    assert filled[0] == filled[1] == filled[2] != filled[3] == (1, 1, 1)
    assert [text.get_position() for text in axes.texts] == [
        *((0, 0), (1, 0), (2, 0), (1, 1))
    ]
    assert labels(figure) == ["accepted", "aligned", "unaligned", "sampled"]
    assert figure._repr_png_().startswith(b"\x89PNG")


def test_text_has_the_colours_of_its_tokens():
    tokens = ["The", " $cat", "\n", "x" * 250]
    figure = plot.coloured_text(tokens, ["", "aligned", "", "plain"], title="t")
    (axes,) = figure.axes
    assert texts(axes)[:3] == ["The", " $cat", "⏎"]
    lines = [text.get_position()[1] for text in axes.texts]
    assert lines == [0.5, 0.5, 0.5, 1.5, 2.5, 3.5]  # a long token goes on below
    assert labels(figure) == ["aligned", "plain"] and len(axes.patches) == 4
    axes, _ = plot.shaded_text(tokens, [0, 1, 0.5, 0], label="share").axes
    light = [sum(patch.get_facecolor()[:3]) for patch in axes.patches]
    assert light[1] < light[2] < light[0] == light[3]
    assert figure._repr_png_() and plot.coloured_text([], [])._repr_png_()


@pytest.mark.parametrize(
    ("draw", "message"),
    [
        (lambda: plot.survival({"a": MAP[0]}), r"'a' must be bool \[layers, heads, po"),
        (lambda: plot.survival({"a": MAP + 0}), "plot.kept.cache, length=.... makes"),
        (lambda: plot.survival({"a": MAP, "b": MAP[..., :2]}), r"got \[2, 3\]"),
        (lambda: plot.survival({}), "one or more of equally many positions"),
        (lambda: plot.heat_maps({}, **LABELS), "one or more arrays"),
        (lambda: plot.heat_maps({"a": [1.0]}, **LABELS), r"got shapes \[\[1\]\]"),
        (
            lambda: plot.heat_maps({"a": [[0.0, 1.0]]}, **LABELS, logarithmic=True),
            "limits 0 < low < high, got 0 and 1",
        ),
        (lambda: plot.Curve(at=[1], mean=[1, 2]), "mean must have a number for each"),
        (lambda: plot.Curve(at=[1], mean=[1], low=[1]), "low and high go together"),
        (
            lambda: plot.against_budget(
                [plot.Panel(curves={"a": plot.Curve(at=["x"], mean=[1])})], label="s"
            ),
            "a budget is a number or a percentage, got 'x'",
        ),
        (lambda: plot.coloured_text(["a"], []), "groups must have one entry for each"),
        (
            lambda: plot.shaded_text(["a"], [], label="s"),
            "values must have one entry for each of the 1 tokens, got 0",
        ),
    ],
)
def test_what_cannot_be_drawn_is_one_line(draw, message):
    with pytest.raises(ValueError, match=message) as caught:
        draw()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "draw",
    [
        lambda: plot.survival({"a": MAP}),
        lambda: plot.heat_maps({"a": [[1.0]]}, **LABELS),
        lambda: plot.against_budget(PANELS, label="score"),
        lambda: plot.against_position([], label="nats"),
        lambda: plot.draft_tree(TREE, text=str),
        lambda: plot.coloured_text(["a"], ["b"]),
        lambda: plot.shaded_text(["a"], [1.0], label="share"),
    ],
)
def test_without_matplotlib_one_line_says_how_to_get_it(draw, monkeypatch):
    monkeypatch.setattr(figures, "available", lambda: False)
    with pytest.raises(ValueError, match=r"pip install 'jaxkv\[plot\]'"):
        draw()


def test_a_figure_shows_itself_in_a_notebook():
    """As a small picture, whether or not pyplot has been imported."""
    shown = plot.survival({"a": MAP})._repr_png_()
    assert shown.startswith(b"\x89PNG") and len(shown) < 20_000
