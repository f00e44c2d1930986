"""Intervals, averages, tables and pictures, against numbers worked out by hand."""

import csv
import math

import numpy as np
import pytest

from jaxkv import figures
from jaxkv.evaluation import metrics, pictures, tables
from jaxkv.evaluation.coverage import coverage
from jaxkv.evaluation.statistics import half_width, mean_interval
from jaxkv.tasks import wilson


def row(score, *, method="a", budget="6%", task="vt", length=8, depth=None, index=0):
    return {
        "method": method,
        "budget": budget,
        "budget_tokens": 5,
        "task": task,
        "length": length,
        "depth": depth,
        "index": index,
        "score": score,
        "exact": int(score == 1),
        "prompt_tokens": 7,
        "output_tokens": 3,
        "truncated": 0,
        "cache_bytes": 10,
    }


def rows(scores, **options):
    return [row(score, index=i, **options) for i, score in enumerate(scores)]


@pytest.mark.parametrize(
    ("degrees", "quantile"),  # of published tables
    [(1, 12.706), (2, 4.3027), (4, 2.7764), (9, 2.2622), (99, 1.9842), (199, 1.9720)],
)
def test_half_of_student_s_interval(degrees, quantile):
    values = np.random.default_rng(degrees).random(degrees + 1)
    want = quantile * values.std(ddof=1) / (degrees + 1) ** 0.5
    assert half_width(values) == pytest.approx(want, rel=1e-4)
    assert half_width(values[:1]) == math.inf


def test_intervals():
    # Mean 0.5, standard deviation 1/3, five values: 0.5 -+ 2.776 * 0.3333 / sqrt(5).
    scores = [0, 0.25, 0.5, 0.75, 1.0]
    mean, low, high = mean_interval(scores)
    half = 2.7764 * np.std(scores, ddof=1) / 5**0.5
    assert (mean, low, high) == pytest.approx((0.5, 0.5 - half, 0.5 + half), abs=1e-4)
    assert mean_interval([1, 1, 0, 0]) == (0.5, *wilson(2, 4))
    assert mean_interval([0.5] * 4) == (0.5, *wilson(2, 4))
    assert mean_interval([1]) == (1.0, *wilson(1, 1))
    assert mean_interval([0.9, 1, 1, 1, 0.1])[2] == 1.0  # cut at the end


def test_cells():
    (cell,) = metrics.by_cell(rows([1, 0.5, 1, 0.5]))
    assert (cell["score"], cell["exact"], cell["samples"]) == (0.75, 0.5, 4)
    assert (cell["exact_low"], cell["exact_high"]) == wilson(2, 4)
    assert cell["task"] == "vt" and cell["budget_tokens"] == 5


def test_the_macro_average_weighs_tasks_alike():
    some = rows([1, 1, 1, 0], task="vt") + rows([0.25, 0.75] * 10, task="other")
    (record,) = metrics.macro(some)
    assert record["score"] == pytest.approx((0.75 + 0.5) / 2)
    mean, (low, high) = record["score"], wilson(3, 4)
    half = half_width([0.25, 0.75] * 10)
    assert record["low"] == pytest.approx(mean - np.hypot(0.75 - low, half) / 2)
    assert record["high"] == pytest.approx(mean + np.hypot(high - 0.75, half) / 2)
    assert metrics.macro(some, "exact")[0]["exact"] == pytest.approx(0.75 / 2)


def test_the_macro_average_of_one_task_has_the_task_s_interval():
    """Of 200 wrong answers, up to 1.9 % may be right, and the table says so."""
    (record,) = metrics.macro(rows([0] * 200))
    assert (record["low"], record["high"]) == pytest.approx(wilson(0, 200))
    assert "0.0 ± 1.9" in tables.overview([record], {("a", "6%"): (200, 200)})


def test_differences_are_paired():
    spread = [0.0, 0.2, 0.4, 0.6]
    some = rows(spread, method="base") + rows([s + 0.1 for s in spread])
    some += rows([1, 1, 1, 1], method="full", budget="full")
    (record,) = metrics.differences(some, "base")
    assert record["difference"] == pytest.approx(0.1)
    # Each question differs by 0.1, so there is nothing left to doubt.
    assert record["high"] - record["low"] == pytest.approx(0, abs=1e-9)
    with pytest.raises(ValueError, match="no results of a method 'x'; there are base"):
        metrics.differences(some, "x")


def test_differences_from_the_control_are_at_all_budgets():
    some = rows([1, 1], method="full", budget="full")
    some += rows([1, 0], budget="6%") + rows([0, 0], budget="8")
    found = metrics.differences(some, "full")
    assert [(r["budget"], r["difference"]) for r in found] == [("6%", -0.5), ("8", -1)]


def test_a_baseline_may_lack_a_length():
    some = rows([1, 1]) + rows([0, 1], method="base") + rows([1, 1], length=16)
    config = dict(kind="ruler", model="m", dtype="float32", seed=1)
    text = tables.report(some, config, baseline="base")
    short, long = text.split("### 16 tokens")
    assert "minus that of base on the same questions:\n\n| method | 6%" in short
    assert "minus that of base on the same questions: none." in long
    with pytest.raises(ValueError, match="no results of a method 'x'; there are a, b"):
        tables.report(some, config, baseline="x")


def test_an_overview_has_a_column_per_budget():
    some = rows([1, 1], budget="full", method="full") + rows([1, 0], budget="6%")
    some += rows([0, 0], budget="3%")
    cover = coverage(some, {})
    shares = {point: cover.share(*point) for point in cover.points}
    lines = tables.overview(metrics.macro(some), shares).split("\n")
    assert lines[0] == "| method | 6% | 3% | full |"
    assert lines[2].startswith("| full |  |  | 100.0 ± ")
    assert lines[3].startswith("| a | 50.0 ± ")


def test_a_report_has_what_its_kind_needs():
    config = {"kind": "ruler", "model": "m", "dtype": "float32", "seed": 3}
    some = rows([1, 0.5]) + rows([0, 0.5], method="b") + rows([0, 1], task="niah")
    text = tables.report(some, config, baseline="b")
    assert "### 8 tokens" in text and "minus that of b" in text
    assert "| a | 6% | 75.0 (" in text and "| b | 6% |" in text
    assert "+75.0 ± " in text or "+50.0 ± " in text
    text = tables.report(some, config | {"kind": "reasoning"}, baseline=None)
    assert "Whole answers right" in text and "truncated" in text


GRID = [
    row(1.0, length=100, depth=0.0),
    row(0.0, length=100, depth=0.0, index=1),
    row(1.0, length=100, depth=0.5),
    row(0.25, length=200, depth=0.5),
]


def test_grids(tmp_path):
    want = [["depth", 100, 200], [0.0, 0.5, None], [0.5, 1.0, 0.25]]
    assert pictures.grids(GRID, coverage(GRID, {})) == {("a", "6%"): want}
    (path,) = pictures.write_grids(tmp_path / "p", GRID, coverage(GRID, {}))
    assert path.name == "heatmap__a__6pct.csv"
    with open(path, newline="", encoding="utf-8") as file:
        assert list(csv.reader(file))[1] == ["0.0", "0.5", ""]


def test_missing_matplotlib_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr(figures.importlib.util, "find_spec", lambda _: None)
    cover = coverage(GRID, {})
    with pytest.raises(ValueError, match=r"pip install 'jaxkv\[plot\]'"):
        pictures.draw_heat_maps(tmp_path, GRID, cover, title="t")
    with pytest.raises(ValueError, match="pictures need matplotlib"):
        pictures.draw_budgets(
            tmp_path, GRID, cover, title="t", column="score", label="s"
        )
    assert not list(tmp_path.iterdir())


def test_pictures(tmp_path):
    pytest.importorskip("matplotlib")
    cover = coverage(GRID, {})
    files = pictures.draw_heat_maps(tmp_path, GRID, cover, title="niah, m")
    assert [file.name for file in files] == [
        "heatmap__a__6pct.png",
        "heatmap__a__6pct.svg",
    ]
    some = [*GRID, *rows([1], method="full", budget="full", length=100)]
    files += pictures.draw_budgets(
        tmp_path, some, coverage(some, {}), title="t", column="exact", label="right"
    )
    assert files[0].read_bytes().startswith(b"\x89PNG")
    assert all(file.stat().st_size > 1000 for file in files)
    assert "<svg" in files[-1].read_text()


def test_a_method_looks_the_same_at_every_length(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    drawn = []
    monkeypatch.setattr(figures, "save", lambda figure, stem: drawn.append(figure))
    some = [row(0.5, method=f"m{i}", length=100) for i in range(12)]
    some += [row(0.5, method=f"m{i}", length=200) for i in (11, 5, 12)]
    cover = coverage(some, {})
    pictures.draw_budgets(tmp_path, some, cover, title="t", column="score", label="s")
    (figure,) = drawn
    looks = {}
    for axes in figure.axes:
        for lines, name in zip(*axes.get_legend_handles_labels(), strict=True):
            line = lines.lines[0]
            look = line.get_color(), line.get_marker(), line.get_linestyle()
            assert looks.setdefault(name, look) == look
    assert len(looks) == 13 == len(set(looks.values()))
    (legend,) = figure.legends
    assert sorted(text.get_text() for text in legend.texts) == sorted(looks)
