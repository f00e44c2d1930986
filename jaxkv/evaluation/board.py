"""A folder of results as the public board of KV-cache compression takes it.

kvpress writes a folder for each press and ratio, and names it
`DATASET__LENGTH__MODEL__PRESS__RATIO`, with `__query_aware` behind it if the question
was a part of what was cut. The ratio is the share of the tokens that was removed. In it
lie `predictions.csv`, `metrics.json` (scores of RULER in per cent) and `config.yaml`.
The board leaves out a folder whose `config.yaml` has a field it does not know, or lacks
one, so what else there is to say stands in `jaxkv.yaml` beside it. It reads the ratio
from the predictions, and shows `press_init_command` beside the method's name.
`benchmarks/kvpress_board.py` holds a folder to kvpress' scorer and the board's reader.
"""

import csv
import io
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxkv._version import __version__
from jaxkv.evaluation.coverage import coverage
from jaxkv.evaluation.folder import read, read_config, safe_name, write_yaml
from jaxkv.evaluation.methods import FULL
from jaxkv.evaluation.metrics import groups
from jaxkv.evaluation.rows import typed, was_cut
from jaxkv.evaluation.tables import unfinished
from jaxkv.provenance import write_json, write_whole
from jaxkv.tasks import score_all

DATASET = "ruler"
_COLUMNS = ("task", "index", "answer", "predicted_answer", "compression_ratio")
_CONTROLS = re.compile(r"[\x00-\x1f]")  # what their scorer takes out of an output


def export(
    folder: Path, out: Path, *, length: int | None = None, model: str | None = None
) -> list[Path]:
    """Write a folder for each method, budget and length of an experiment.

    Args:
      folder: of results.
      out: where the folders go.
      length: what the board calls the length of the samples; None takes what the
        experiment asked for.
      model: what the board calls the model; None takes what it was loaded as.

    Returns:
      The folders.

    Raises:
      ValueError: the results are not complete, of another kind than the
        board's, of budgets that no ratio says, or without the ends of outputs, which
        its scorer would miss; or two of them have one name on the board.
    """
    config = read_config(folder)
    rows = [typed(row) for row in read(folder).rows]
    cover = coverage(rows, config)
    if not cover.complete:
        raise ValueError(f"{folder} is {unfinished(cover)}; run it to its end first.")
    if config["kind"] not in ("ruler", "file"):
        raise ValueError(
            f"{folder} is of the kind {config['kind']!r}; the board takes RULER's "
            "tasks, from jaxkv eval ruler or --task-file."
        )
    if config["kind"] == "file" and length is None:
        raise ValueError(
            f"{folder} is of a file, which does not say the length that the board "
            "calls its samples; pass --length, such as 4096."
        )
    cut = config.get("characters") or 0
    if any(
        was_cut(row[name], cut) for row in rows for name in ("outputs", "prediction")
    ):
        raise ValueError(
            f"{folder} holds outputs that were cut at {cut} characters, but the board "
            "scores them whole; run with --characters 0."
        )
    if missing := sorted({"query_aware", "chat", "system"} - set(config)):
        raise ValueError(
            f"{folder}: config.yaml lacks {', '.join(missing)}; run it with this "
            "version of jaxkv."
        )
    planned: dict[Path, Any] = {}
    policies = {one["name"]: one for one in config["methods"]}
    points = groups(rows, ("method", "budget", "length"))
    for (method, budget, tokens), some in points.items():
        ratios = [_ratio(row, query_aware=config["query_aware"]) for row in some]
        named = {
            "dataset": DATASET,
            "data_dir": length or tokens,
            "model": model or config["model"],
            "device": None,
            "press_name": _press(method),
            "compression_ratio": _nominal(budget, ratios),
            "fraction": 1.0,
            "query_aware": bool(config["query_aware"]),
            "press_init_command": f"jaxkv {__version__}: {method}",
            "seed": config["seed"],
        }
        own = {name: config[name] for name in ("dtype", "seed", "chat", "system")}
        own |= {"version": __version__, "method": policies[method], "budget": budget}
        place, said = out / _name(named), f"{method} at {budget} of {tokens} tokens"
        if place in planned:
            raise ValueError(
                f"{planned[place][0]} and {said} are both {place.name} on the board; "
                "run them apart, and export each to a folder of its own."
            )
        planned[place] = said, some, ratios, named, own
    for place, (_, some, ratios, named, own) in planned.items():
        write_whole(place / "predictions.csv", _predictions(some, ratios))
        write_json(place / "metrics.json", _metrics(some))
        write_yaml(place / "config.yaml", named)
        write_yaml(place / "jaxkv.yaml", own)
    return list(planned)


def _press(method: str) -> str:
    return "no_press" if method == FULL else safe_name(method.replace("-", "_"))


def _name(named: Mapping[str, Any]) -> str:
    parts = [
        *(named["dataset"], str(named["data_dir"]), safe_name(named["model"])),
        *(named["press_name"], f"{named['compression_ratio']:.2f}"),
    ]
    return "__".join([*parts, "query_aware"] if named["query_aware"] else parts)


def _ratio(row: Mapping[str, Any], *, query_aware: bool) -> float:
    """Return the share of the tokens that was removed for one row.

    Raises:
      ValueError: nothing says it.
    """
    if row["budget"] == FULL:
        return 0.0
    if query_aware:
        return max(0.0, 1 - row["budget_tokens"] / row["prompt_tokens"])
    if not row["budget"].endswith("%"):
        raise ValueError(
            f"the budget {row['budget']} is a number of tokens, but the board names "
            "results by a ratio; run with percentages, such as --budgets 25%."
        )
    return 1 - float(row["budget"][:-1]) / 100


def _nominal(budget: str, ratios: Sequence[float]) -> float:
    """Return the ratio that names a folder."""
    if budget.endswith("%"):
        return round(1 - float(budget[:-1]) / 100, 6)
    return round(sum(ratios) / len(ratios), 6)


def _predictions(rows: Sequence[Mapping[str, Any]], ratios: Sequence[float]) -> str:
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow(_COLUMNS)
    for row, ratio in zip(rows, ratios, strict=True):
        answer = json.loads(row["outputs"])
        writer.writerow(
            [row["task"], row["index"], answer, row["prediction"], round(ratio, 6)]
        )
    return text.getvalue()


def _metrics(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return each task's score in per cent, as their scorer counts.

    Strings are looked for behind line breaks that an output lacks, and of the wanted
    strings of RULER's question answering ("qa_1") one is enough.
    """
    found = {}
    for (task,), some in groups(rows, ("task",)).items():
        scores = []
        for row in some:
            output = _CONTROLS.sub("", row["prediction"].strip())
            score = score_all(output, json.loads(row["outputs"]))
            scores.append(float(score > 0) if task.split("_")[0] == "qa" else score)
        found[task] = {"string_match": round(sum(scores) / len(scores) * 100, 2)}
    return found
