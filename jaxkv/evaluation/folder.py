"""A folder of results that grows batch by batch and can be gone on with.

The layout is kvpress's: `predictions.csv`, `metrics.json`, `config.yaml`, and
`run_meta.json` beside them. Predictions are appended and flushed to the disk with every
batch; `config.yaml` says what they belong to, so that a second run skips what is there
and never mixes two experiments. Whoever writes holds `lock.one_writer`.
"""

import json
import os
import re
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from jaxkv.evaluation.configuration import differences, only_parts_differ, plain
from jaxkv.evaluation.rows import Key, Rows, key, parse, to_text
from jaxkv.provenance import write_json, write_whole

PREDICTIONS = "predictions.csv"
DAMAGED = "predictions.damaged.csv"
# What is made of predictions, and is out of date once there are more of them.
MADE = ("metrics.json", "pictures/heatmap__*", "pictures/budgets.*")


def check_writable(folder: Path) -> None:
    """Make a folder, and raise OSError if nothing can be written there."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=folder):
        pass


def safe_name(text: str) -> str:
    """Return a text as a part of a file's name."""
    text = text.replace("/", "--").replace("%", "pct")
    return re.sub(r"[^A-Za-z0-9._=+-]+", "-", text).strip("-") or "-"


def write_yaml(path: Path, content: Mapping[str, Any]) -> None:
    """Write YAML, whole or not at all."""
    write_whole(path, yaml.safe_dump(plain(content), sort_keys=False))


class Predictions:
    """`predictions.csv` of one experiment, open for appending.

    Attributes:
      done: keys of the rows that are there, each a tuple of the columns `rows.KEY`.
      mended: what was wrong with the file and has been put right, in a sentence; ""
        where nothing was.
    """

    def __init__(self, folder: Path, config: Mapping[str, Any]):
        """Open a folder, which may be new, and mend what is damaged in it.

        Args:
          folder: where the results go; nobody else writes there.
          config: everything that decides them; written to `config.yaml`.

        Raises:
          ValueError: the folder holds results of another configuration.
          OSError: nothing can be written there.
        """
        check_writable(folder)
        refuse_other(folder, config)
        self._folder, self._path = folder, folder / PREDICTIONS
        self._grown = False
        for partial in folder.glob("**/*.[0-9]*-????????.partial"):
            partial.unlink(missing_ok=True)  # of a writer that was killed
        found = read(folder) if self._path.exists() else Rows([], [], 0)
        if not found.rows:
            write_yaml(folder / "config.yaml", config)
        self.mended = self._mend(found)
        self.done: set[Key] = {key(row) for row in found.rows}

    def append(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Append rows; when this returns they are on the disk.

        Raises:
          OSError: they cannot be; the file is what it was before.
        """
        if not self._grown:
            _remove_made(self._folder)
            self._grown = True
        left = memoryview(to_text(rows, header=False).encode())
        try:
            with open(self._path, "r+b", buffering=0) as file:
                end = file.seek(0, os.SEEK_END)
                try:
                    while left:
                        left = left[file.write(left) :]
                    os.fsync(file.fileno())
                except BaseException:  # a full disk, an interrupt
                    file.truncate(end)
                    raise
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(self._path)) from error
        self.done.update(map(key, rows))

    def _mend(self, found: Rows) -> str:
        """Rewrite the file without what is no row; damaged text is set aside first."""
        if found.sound and self._path.exists():
            return ""
        if found.damaged:
            with open(self._folder / DAMAGED, "ab") as file:
                for damage in found.damaged:
                    text = damage.text + "\n"
                    file.write(text.encode("utf-8", errors="surrogateescape"))
                file.flush()
                os.fsync(file.fileno())
        write_whole(self._path, to_text(found.rows, header=True))
        faults = found.faults()
        if not faults:  # a new file
            return ""
        done = "what was damaged now lies in " + DAMAGED if found.damaged else ""
        done = done and f", {done} and is asked again"
        return f"{self._path}: {', and '.join(faults)}; mended{done}."


def _remove_made(folder: Path) -> None:
    for pattern in MADE:
        for path in folder.glob(pattern):
            path.unlink(missing_ok=True)


def read(folder: Path) -> Rows:
    """Return what a folder's predictions hold.

    Raises:
      ValueError: the folder has no predictions of ours.
    """
    path = folder / PREDICTIONS
    if not path.is_file():
        raise ValueError(f"{folder} holds no {PREDICTIONS}; give a folder of results.")
    try:
        return parse(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path} {error}") from error


def refuse_other(folder: Path, config: Mapping[str, Any]) -> None:
    """Raise ValueError if a folder holds results that another experiment has made.

    A folder whose run has ended before its first batch binds nobody.

    Args:
      folder: may be new.
      config: all of an experiment's configuration, or what is known of it.
    """
    saved, begun = folder / "config.yaml", (folder / PREDICTIONS).exists()
    if begun and not saved.exists():
        raise ValueError(
            f"{folder} holds predictions but no config.yaml; choose another --out."
        )
    if not saved.exists() or (begun and not read(folder).rows):
        return
    found = read_config(folder)
    if "weights" in config and "weights" not in found:
        raise ValueError(
            f"{folder} was made before jaxkv wrote digests of weights and questions, "
            "so nothing tells whether they are still the same; choose another --out. "
            "`jaxkv eval report` still reads it."
        )
    changed = differences(found, config)
    if changed:
        raise ValueError(
            f"{folder} holds results with {'; '.join(changed)}; choose another --out, "
            "or bring back what that run had to go on with it."
        )


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
        entries = config[name]
        if not isinstance(entries, list):
            raise ValueError(
                f"{path}: {name} must be a list, got {json.dumps(entries)[:80]}; give "
                "a folder that `jaxkv eval` has made."
            )
    return config


def merge_folders(folder: Path, parts: Sequence[Path]) -> list[str]:
    """Put runs that differ in methods, budgets and cells only into a new folder.

    Args:
      folder: where they go; holds no results yet, and nobody else writes there.
      parts: folders of results. A row that several of them have is taken once.

    Returns:
      What is wrong with parts, a sentence each; the rest of them is taken.

    Raises:
      ValueError: they are of different experiments, or `folder` is in use.
      OSError: nothing can be written there.
    """
    configs = {str(part): read_config(part) for part in parts}
    together = only_parts_differ(configs)
    found = [read(part) for part in parts]
    rows: dict[Key, dict[str, str]] = {}
    for some in found:
        for row in some.rows:
            rows.setdefault(key(row), row)
    meta = [run for part in parts for run in run_meta(part)["runs"]]
    begun = (folder / PREDICTIONS).exists()
    if begun or ((folder / "config.yaml").exists() and read_config(folder) != together):
        raise ValueError(f"{folder} holds results already; choose another folder.")
    # Predictions come last: there are none before there are all.
    merged = {"merged": [str(part) for part in parts], "runs": meta}
    write_json(folder / "run_meta.json", merged)
    whole = to_text(rows.values(), header=True)
    write_yaml(folder / "config.yaml", together)
    write_whole(folder / PREDICTIONS, whole)
    return [
        f"{part / PREDICTIONS}: {', and '.join(some.faults())}; left out."
        for part, some in zip(parts, found, strict=True)
        if some.faults()
    ]


def begin_run(folder: Path, meta: Mapping[str, Any]) -> None:
    """Add a run to `run_meta.json`; predictions may come from several."""
    found = run_meta(folder)
    write_json(folder / "run_meta.json", found | {"runs": [*found["runs"], dict(meta)]})


def end_run(folder: Path, meta: Mapping[str, Any]) -> None:
    """Say of the run that was added last what has become of it."""
    found = run_meta(folder)
    earlier = found["runs"][:-1]
    write_json(folder / "run_meta.json", found | {"runs": [*earlier, dict(meta)]})


def run_meta(folder: Path) -> dict[str, Any]:
    """Return what `run_meta.json` holds: "runs", and "merged" if there is more.

    Raises:
      ValueError: it is none of ours.
    """
    path = folder / "run_meta.json"
    try:
        found = json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        return {"runs": []}
    except ValueError:
        found = None
    runs = found.get("runs") if isinstance(found, dict) else None
    if not isinstance(runs, list) or not all(isinstance(run, dict) for run in runs):
        raise ValueError(
            f'{path} holds no JSON object with a list "runs"; remove it to go on '
            "without what it said of earlier runs."
        )
    return found
