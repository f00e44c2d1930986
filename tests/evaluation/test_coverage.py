"""What is missing of a comparison stands in every table, picture and title of it."""

import pytest

from jaxkv import figures
from jaxkv.evaluation import pictures, tables
from jaxkv.evaluation.coverage import coverage

FULL = {"name": "Full"}
CONFIG = {
    "kind": "ruler",
    "model": "m",
    "dtype": "float32",
    "seed": 1,
    "samples": 2,
    "methods": [
        {"name": "full", "prefill": FULL, "decode": FULL},
        {"name": "a", "prefill": {"name": "SnapKV"}, "decode": FULL},
        {"name": "b", "prefill": FULL, "decode": {"name": "LongFlow"}},
    ],
    "budgets": ["6%", "50%"],
    "cells": [
        {"task": task, "length": 300, "depth": None, "questions": 2}
        for task in ("vt", "niah")
    ],
}
POINTS = [("full", "full"), ("a", "6%"), ("a", "50%"), ("b", "6%"), ("b", "50%")]


def row(method, budget, task, index, **changes):
    return {
        "method": method,
        "budget": budget,
        "budget_tokens": 5,
        "task": task,
        "length": 300,
        "depth": None,
        "index": index,
        "score": 1.0,
        "exact": 1,
        "prompt_tokens": 7,
        "output_tokens": 3,
        "truncated": 0,
        "cache_bytes": 10,
    } | changes


def some(*points, tasks=("vt", "niah"), indices=(0, 1)):
    return [row(*p, task, i) for p in points for task in tasks for i in indices]


def test_what_is_wanted_follows_from_the_configuration():
    cover = coverage([], CONFIG)
    assert list(cover.points) == POINTS
    assert cover.total == (0, 20) and not cover.complete
    cover = coverage(some(*POINTS), CONFIG)
    assert cover.total == (20, 20) and cover.complete
    cover = coverage(some(*POINTS[:2]) + some(("b", "6%"), indices=[1]), CONFIG)
    assert cover.total == (10, 20)
    assert cover.share("a", "6%") == (4, 4)
    assert cover.share("b", "6%", task="vt") == (1, 2)
    assert cover.share("b", "50%", length=300) == (0, 4)
    assert cover.share("a", "6%", length=9) == (0, 0)


def test_in_older_folders_what_one_has_answered_is_wanted_of_all():
    old = {name: CONFIG[name] for name in ("kind", "model", "dtype", "seed")}
    old |= {"cells": [], "methods": [{"name": "full"}, {"name": "a"}]}
    rows = some(("full", "full")) + some(("a", "6%"), tasks=["vt"])
    cover = coverage(rows, old)
    assert cover.share("full", "full") == (4, 4)
    assert cover.share("a", "6%") == (2, 4)
    # They have no digests, but their cells, and samples of each.
    cells = [{"task": task, "length": 300, "depth": None} for task in ("vt", "niah")]
    assert coverage(rows, CONFIG | {"cells": cells}).total == (6, 20)


def test_a_whole_comparison_has_no_marks():
    text = tables.report(some(*POINTS), CONFIG, baseline="a", command="x")
    assert "Unfinished" not in text and " of " not in text.partition("###")[2].replace(
        "minus that of a", ""
    )


def test_a_mean_over_other_cells_is_marked_and_no_method_is_left_out():
    rows = some(("full", "full")) + some(("a", "6%"), tasks=["vt"])
    text = tables.report(rows, CONFIG, command="jaxkv eval ruler --out x")
    title = text.partition("###")[0]
    assert "**Unfinished: 6 of 20 rows.**" in title
    assert "Nothing yet of a at 50%, b at 6%, b at 50%." in title
    assert "goes on where it stopped: `jaxkv eval ruler --out x`." in title
    lines = text.split("\n")
    assert "| a | 100.0 ± 65.8 [2 of 4] | [0 of 4] |  |" in lines
    assert "| b | [0 of 4] | [0 of 4] |  |" in lines
    assert any(line.startswith("| full |  |  | 100.0 ± ") for line in lines)
    by_task = text.partition("By task:")[2]
    assert "| a | 6% | 100.0 (34.2 to 100.0) | [0 of 2] | 100.0 ± 65.8 [2 of 4] |" in (
        by_task
    )
    assert "| b | 50% | [0 of 2] | [0 of 2] | [0 of 4] |" in by_task


def test_differences_are_marked_too():
    rows = some(("a", "6%")) + some(("b", "6%"), indices=[0])
    text = tables.report(rows, CONFIG, baseline="a")
    minus = text.partition("minus that of a")[2].partition("By task")[0]
    assert "| b | +0.0 ± inf [2 of 4] | [0 of 4] |" in minus


def test_a_length_that_has_not_begun_has_a_table():
    longer = [cell | {"length": 600} for cell in CONFIG["cells"]]
    config = CONFIG | {"cells": [*CONFIG["cells"], *longer]}
    text = tables.report(some(*POINTS), config)
    assert "### 600 tokens" in text and "**Unfinished: 20 of 40 rows.**" in text


def test_outputs_of_reasoning_are_marked():
    rows = some(("full", "full"), indices=[0])
    text = tables.report(rows, CONFIG | {"kind": "reasoning"})
    assert "| full | full | 3 [2 of 4] | 0.0 |" in text


def test_a_card_says_what_it_lacks():
    config = CONFIG | {"kind": "card", "methods": CONFIG["methods"][:1]}
    text = tables.report(some(("full", "full"), tasks=["vt"], indices=[0]), config)
    assert "**Unfinished: 1 of 4 rows.**" in text
    assert "| vt | 300 | 100.0 | 20.7 to 100.0 | 1 of 2 | 0.0 | 0.000 |" in text
    assert "| niah | 300 |  |  | 0 of 2 |  |  |" in text


def test_pictures_draw_whole_means_only(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    drawn = []
    monkeypatch.setattr(figures, "save", lambda figure, _: drawn.append(figure) or [])
    rows = some(*POINTS[:2]) + some(("b", "6%"), tasks=["vt"])
    cover = coverage(rows, CONFIG)
    pictures.draw_budgets(tmp_path, rows, cover, title="t", column="score", label="s")
    (figure,) = drawn
    names = figure.axes[0].get_legend_handles_labels()[1]
    assert sorted(names) == ["a", "full"]
    assert figure.get_suptitle() == "t\nno point yet: b"
    rows = [row("a", "6%", "vt", i, depth=0.5) for i in range(2)]
    rows += [
        row("a", "6%", "vt", 0, depth=1.0),
        row("full", "full", "vt", 0, depth=1.0),
    ]
    cells = [{"task": "vt", "length": 300, "depth": d} for d in (0.5, 1.0)]
    cover = coverage(rows, CONFIG | {"cells": cells, "budgets": ["6%"]})
    grids = pictures.grids(rows, cover)
    assert grids["a", "6%"] == [["depth", 300], [0.5, 1.0], [1.0, None]]
    assert grids["b", "6%"] == [["depth", 300], [0.5, None], [1.0, None]]
    pictures.draw_heat_maps(tmp_path, rows, cover, title="t")
    titles = [figure.axes[0].get_title() for figure in drawn[1:]]
    assert titles[0] == "t: full, budget full, no cell finished"
    assert titles[1] == "t: a, budget 6%, mean 100.0%"


def test_a_name_may_hold_anything_and_stays_in_its_place():
    name = 'my|file\n,"x"\x1b[31m'
    cells = [{"task": name, "length": 300, "depth": None, "questions": 1}]
    config = CONFIG | {"cells": cells, "methods": CONFIG["methods"][:1], "model": name}
    rows = [row("full", "full", name, 0)]
    text = tables.report(rows, config)
    assert '| method | budget | my\\|file ,"x" [31m | mean |' in text.split("\n")
    assert text.startswith('ruler of my|file ,"x" [31m (float32)')
    assert all(c.isprintable() or c == "\n" for c in text)
