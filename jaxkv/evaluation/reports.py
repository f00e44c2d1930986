"""From the predictions in a folder to everything that is made of them."""

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxkv.evaluation import tables
from jaxkv.evaluation.coverage import Coverage, coverage
from jaxkv.evaluation.folder import PREDICTIONS, read, read_config, run_meta
from jaxkv.evaluation.metrics import by_cell, macro
from jaxkv.evaluation.pictures import draw_budgets, draw_heat_maps, write_grids
from jaxkv.evaluation.rows import typed
from jaxkv.provenance import write_json

Record = Mapping[str, Any]


def write_report(folder: Path, *, pictures: bool) -> dict[str, Any]:
    """Write metrics and pictures of the predictions in a folder; return the metrics.

    Args:
      folder: of an experiment.
      pictures: whether to draw.

    Raises:
      ValueError: the folder holds no results, or matplotlib is missing.
    """
    rows, config = _rows(folder), read_config(folder)
    cover = coverage(rows, config)
    there, wanted = cover.total
    metrics = {
        "rows": there,
        "wanted": wanted,
        "cells": _counted(by_cell(rows), cover),
        "macro": _counted(macro(rows), cover),
        "macro_exact": _counted(macro(rows, "exact"), cover),
    }
    write_json(folder / "metrics.json", metrics)
    if not rows:
        return metrics
    drawn, kind = folder / "pictures", config["kind"]
    if kind == "niah":
        write_grids(drawn, rows, cover)
    if not pictures:
        return metrics
    title = f"{kind}, {config['model']}"
    if not cover.complete:
        title += f" ({tables.unfinished(cover)})"
    if kind == "niah":
        draw_heat_maps(drawn, rows, cover, title=title)
        return metrics
    column, label = "score", "score, mean over tasks"
    if kind in ("card", "reasoning"):
        column, label = "exact", "whole answers right"
    draw_budgets(drawn, rows, cover, title=title, column=column, label=label)
    return metrics


def report_of(folder: Path, *, baseline: str | None = None) -> str:
    """Return the report of a folder; see `tables.report`."""
    rows, config = _rows(folder), read_config(folder)
    return tables.report(rows, config, baseline=baseline, command=_command(folder))


def report_beside(folder: Path, other: Path) -> str:
    """Return the tables of two folders side by side; see `tables.beside`."""
    return tables.beside([(_rows(f), read_config(f)) for f in (folder, other)])


def faults_of(folder: Path) -> str:
    """Return what is wrong with a folder's predictions, in a sentence; else ""."""
    faults = read(folder).faults()
    if not faults:
        return ""
    return (
        f"{folder / PREDICTIONS}: {', and '.join(faults)}; not counted here. The file "
        "stays as it is until a run goes on in the folder, which mends it."
    )


def _rows(folder: Path) -> list[dict[str, Any]]:
    return [typed(row) for row in read(folder).rows]


def _counted(records: Sequence[Record], cover: Coverage) -> list[dict[str, Any]]:
    """Return records with how many answers each is to have."""
    names = ("method", "budget", "task", "length", "depth")
    return [
        dict(record)
        | {"wanted": cover.share(**{n: record[n] for n in names if n in record})[1]}
        for record in records
    ]


def _command(folder: Path) -> str | None:
    """Return the command line that goes on in a folder, None where several made it."""
    meta = run_meta(folder)
    if "merged" in meta or not meta["runs"]:
        return None
    words = shlex.split(str(meta["runs"][-1].get("command", "")))
    names = [Path(word).name for word in words]
    if "jaxkv" not in names:
        return None
    return shlex.join(["jaxkv", *words[names.index("jaxkv") + 1 :]])
