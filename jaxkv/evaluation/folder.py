"""A folder of results that grows batch by batch and can be gone on with.

The layout is kvpress's: `predictions.csv`, `metrics.json`, `config.yaml`, and
`run_meta.json` beside them. Predictions are appended and flushed to the disk with every
batch; `config.yaml` says what they belong to, so that a second run skips what is there
and never mixes two experiments.
"""

import csv
import io
import json
import os
import re
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from jaxkv.provenance import write_json, write_whole

COLUMNS = (
    "method",
    "budget",
    "budget_tokens",
    "task",
    "length",
    "depth",
    "index",
    "score",
    "exact",
    "prompt_tokens",
    "output_tokens",
    "truncated",
    "cache_bytes",
    "outputs",
    "prediction",
)
KEY = ("method", "budget", "task", "length", "depth", "index")

MOST_CHARACTERS = 2**31 - 1  # of a field

Key = tuple[str, ...]


def check_writable(folder: Path) -> None:
    """Make a folder, and raise OSError if nothing can be written there."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=folder):
        pass


def safe_name(text: str) -> str:
    """Return a text as a part of a file's name."""
    text = text.replace("/", "--").replace("%", "pct")
    return re.sub(r"[^A-Za-z0-9._=+-]+", "-", text).strip("-") or "-"


def write_yaml(path: Path, content: dict[str, Any]) -> None:
    """Write YAML, whole or not at all."""
    write_whole(path, yaml.safe_dump(_plain(content), sort_keys=False))


def _plain(content: Any) -> Any:
    """Return what YAML and JSON both hold: tuples become lists."""
    return json.loads(json.dumps(content))


class Predictions:
    """`predictions.csv` of one experiment, open for appending.

    Attributes:
      done: keys of the rows that are there, each a tuple of the columns `KEY`.
    """

    def __init__(self, folder: Path, config: dict[str, Any]):
        """Open a folder, which may be new.

        Args:
          folder: where the results go.
          config: everything that decides them; written to `config.yaml`.

        Raises:
          ValueError: the folder holds results of another configuration.
          OSError: nothing can be written there.
        """
        check_writable(folder)
        self._path = folder / "predictions.csv"
        saved = folder / "config.yaml"
        begun = self._path.exists()
        if begun and not saved.exists():
            raise ValueError(
                f"{folder} holds predictions but no config.yaml; choose another --out."
            )
        rows = read_rows(folder) if begun else []
        if rows or (saved.exists() and not begun):
            _refuse_other(saved, _plain(config))
        else:  # new, or of a run that ended before its first batch: nothing to mix with
            write_yaml(saved, config)
        # Also drops a row that an interrupted run has left unfinished.
        self._rewrite(rows)
        self.done = {key(row) for row in rows}

    def append(self, rows: Sequence[dict[str, Any]]) -> None:
        """Append rows; when this returns they are on the disk."""
        text = io.StringIO()
        csv.DictWriter(text, COLUMNS).writerows(rows)
        with open(self._path, "a", encoding="utf-8", newline="") as file:
            file.write(text.getvalue())
            file.flush()
            os.fsync(file.fileno())
        self.done.update(map(key, rows))

    def _rewrite(self, rows: Sequence[dict[str, Any]]) -> None:
        text = io.StringIO()
        writer = csv.DictWriter(text, COLUMNS)
        writer.writeheader()
        writer.writerows(rows)
        write_whole(self._path, text.getvalue())


def key(row: dict[str, Any]) -> Key:
    """Return what tells a row from all others."""
    return tuple(str(row[name]) for name in KEY)


def read_rows(folder: Path) -> list[dict[str, str]]:
    """Return the complete rows of a folder's predictions, all as text.

    Raises:
      ValueError: the folder has no predictions of ours.
    """
    path = folder / "predictions.csv"
    if not path.is_file():
        raise ValueError(
            f"{folder} holds no predictions.csv; give a folder of results."
        )
    text = path.read_bytes().decode("utf-8", errors="ignore")
    rows: list[dict[str, str]] = []
    csv.field_size_limit(MOST_CHARACTERS)  # by default less than a long output has
    reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
    try:
        header = tuple(reader.fieldnames or ())
    except csv.Error:
        header = ()
    if header != COLUMNS:
        raise ValueError(f"{path} has other columns than {', '.join(COLUMNS)}.")
    try:
        rows += reader
    except csv.Error:  # the end is missing within a quoted text
        return rows
    if not text.endswith("\n"):
        rows = rows[:-1]
    return [row for row in rows if None not in row.values()]


def read_config(folder: Path) -> dict[str, Any]:
    """Return a folder's configuration.

    Raises:
      ValueError: there is none, or it is no YAML of ours.
    """
    path = folder / "config.yaml"
    if not path.is_file():
        raise ValueError(f"{folder} holds no config.yaml; give a folder of results.")
    try:
        config = yaml.safe_load(path.read_text("utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not valid YAML: {error}") from error
    needed = {"kind", "model", "dtype", "seed", "methods", "cells"}
    missing = needed - config.keys() if isinstance(config, dict) else needed
    if missing:
        raise ValueError(
            f"{path} is no configuration of a comparison: it lacks "
            f"{', '.join(sorted(missing))}; give a folder that `jaxkv eval` has made."
        )
    for name in ("methods", "cells"):
        if not isinstance(config[name], list):
            raise ValueError(
                f"{path}: {name} must be a list, got {_short(config[name])}; give a "
                "folder that `jaxkv eval` has made."
            )
    return config


def merge_folders(folder: Path, parts: Sequence[Path]) -> None:
    """Put runs that differ in methods, budgets and cells only into a new folder.

    Args:
      folder: where they go; holds no results yet.
      parts: folders of results. A row that several of them have is taken once.

    Raises:
      ValueError: they are of different experiments, or `folder` is in use.
      OSError: nothing can be written there.
    """
    configs = [read_config(part) for part in parts]
    together = dict(configs[0])
    lists = ["methods", "cells"]
    if all(isinstance(config.get("budgets"), list) for config in configs):
        lists.append("budgets")
    for part, config in zip(parts, configs, strict=True):
        for name in sorted({*together, *config} - {*lists}):
            if together.get(name) != config.get(name):
                raise ValueError(
                    f"{part} has {name}={_short(config.get(name))}, {parts[0]} has "
                    f"{name}={_short(together.get(name))}; only runs of one experiment "
                    "can be merged, which differ in methods, budgets and cells alone."
                )
    for name in lists:
        entries = [entry for config in configs for entry in config[name]]
        together[name] = [x for i, x in enumerate(entries) if x not in entries[:i]]
    rows = {key(row): row for part in parts for row in read_rows(part)}
    runs = [run for part in parts for run in _runs(part)]
    if any((folder / name).exists() for name in ("predictions.csv", "config.yaml")):
        raise ValueError(f"{folder} holds results already; choose another folder.")
    Predictions(folder, together).append(list(rows.values()))
    write_json(folder / "run_meta.json", {"runs": runs})


def add_run(folder: Path, meta: dict[str, Any]) -> None:
    """Add a run to `run_meta.json`; predictions may come from several."""
    write_json(folder / "run_meta.json", {"runs": [*_runs(folder), meta]})


def _runs(folder: Path) -> list[dict[str, Any]]:
    path = folder / "run_meta.json"
    try:
        runs = json.loads(path.read_text("utf-8"))["runs"]
    except FileNotFoundError:
        return []
    except (ValueError, TypeError, KeyError):
        runs = None
    if not isinstance(runs, list):
        raise ValueError(
            f'{path} holds no JSON object with a list "runs"; remove it to go on '
            "without what it said of earlier runs."
        )
    return runs


def _refuse_other(path: Path, config: dict[str, Any]) -> None:
    saved = read_config(path.parent)
    for name in sorted({*saved, *config}):
        if saved.get(name) != config.get(name):
            raise ValueError(
                f"{path.parent} holds results with {name}={_short(saved.get(name))}, "
                f"this run has {name}={_short(config.get(name))}; choose another "
                "--out, or the flags of that run to go on with it."
            )


def _short(value: Any) -> str:
    text = json.dumps(value, default=str)  # YAML knows dates
    return text if len(text) <= 120 else text[:119] + "…"
