"""What decides the predictions of a folder, and how two of these differ.

A configuration is the content of `config.yaml`. Names of the model and of a file are
what somebody has called them; the digests beside them say what lay there.
"""

import json
from collections.abc import Mapping
from typing import Any

Config = Mapping[str, Any]

PLACE = ("task", "length", "depth")
_DIGESTS = {
    "weights": "other weights",
    "network": "another network configuration",
    "tokenizer": "another tokenizer",
}
# What differs because something else does, which alone is told.
_FOLLOWS = {
    "weights": {"model", "dtype"},
    "network": {"model"},
    "tokenizer": {"model"},
    "stop_ids": {"model"},
    "cells": {"model", "tokenizer", "samples", "seed", "file", "jaxkv"},
}


def plain(content: Any) -> Any:
    """Return what YAML and JSON both hold: tuples become lists."""
    return json.loads(json.dumps(content))


def differences(saved: Config, config: Config) -> list[str]:
    """Return how a run differs from a folder's, a part of a sentence each.

    Args:
      saved: of the folder.
      config: of the run. If it has no "cells" it is not known in full, and is compared
        in what it has.
    """
    config = plain(config)
    names = {*saved, *config} if "cells" in config else {*config}
    changed = {name for name in names if saved.get(name) != config.get(name)}
    found = []
    for name in sorted(changed):
        old, new = saved.get(name), config.get(name)
        if name == "cells" and _places(old) == _places(new):
            if not changed & _FOLLOWS["cells"]:
                found.append(_other_questions(old, new))
        elif name in _FOLLOWS and name != "cells" and changed & _FOLLOWS[name]:
            continue
        elif name in _DIGESTS:
            what = _DIGESTS[name]
            found.append(f"{what} (digest {_digest(old)}, this run has {_digest(new)})")
        else:
            found.append(f"{name}={_short(old)}, this run has {name}={_short(new)}")
    return found


def only_parts_differ(configs: Mapping[str, Config]) -> dict[str, Any]:
    """Return the configuration of runs that shared methods, budgets and cells.

    Args:
      configs: by the names of their folders.

    Raises:
      ValueError: they differ in something else.
    """
    (first, start), *_ = configs.items()
    together = dict(start)
    lists = ["methods", "cells"]
    if all(isinstance(config.get("budgets"), list) for config in configs.values()):
        lists.append("budgets")
    asked: dict[tuple, tuple[str, Any]] = {}
    for part, config in configs.items():
        for name in sorted({*together, *config} - {*lists}):
            if together.get(name) != config.get(name):
                raise ValueError(
                    f"{part} has {name}={_short(config.get(name))}, {first} has "
                    f"{name}={_short(together.get(name))}; only runs of one experiment "
                    "can be merged, which differ in methods, budgets and cells alone."
                )
        for cell in config["cells"]:
            other, same = asked.setdefault(_place(cell), (part, cell))
            if same != cell:
                raise ValueError(
                    f"{part} asks other questions of {_named(cell)} than {other}; only "
                    "runs of one experiment can be merged."
                )
    for name in lists:
        entries = [entry for config in configs.values() for entry in config[name]]
        together[name] = [x for i, x in enumerate(entries) if x not in entries[:i]]
    return together


def _place(cell: Any) -> tuple:
    """Return task, length and depth; a cell may be anything in a file."""
    if not isinstance(cell, dict):
        return (json.dumps(cell, default=str),)
    return tuple(cell.get(name) for name in PLACE)


def _places(cells: Any) -> list[tuple]:
    return [_place(cell) for cell in cells] if isinstance(cells, list) else []


def _named(cell: Any) -> str:
    task, length, depth = (*_place(cell), None, None)[:3]
    return f"{task} at {length}" + ("" if depth is None else f", depth {depth:g}")


def _other_questions(old: Any, new: Any) -> str:
    pairs = zip(old, new, strict=True)
    changed = [(then, now) for then, now in pairs if then != now]
    then, now = changed[0]
    rest = f" and {len(changed) - 1} other cells" if len(changed) > 1 else ""
    counts = [
        f"{cell.get('questions', '?')} of digest {_digest(cell.get('digest'))}"
        for cell in (then, now)
    ]
    where = f"{_named(now)}{rest}"
    return f"other questions in {where} ({counts[0]}, this run has {counts[1]})"


def _digest(value: Any) -> str:
    return value[:8] if isinstance(value, str) else "none"


def _short(value: Any) -> str:
    text = json.dumps(value, default=str)  # YAML knows dates
    return text if len(text) <= 120 else text[:119] + "…"
