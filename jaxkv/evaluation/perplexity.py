"""Loss of real text under a budget: every method on the same windows, by position.

A record is a JSON object: "config" says what decides the numbers, "results" has one
entry per method and budget with the mean loss of each text in each bin of positions, in
nats a token. It is written after each entry, and gone on with by the same command.
"""

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxkv import figures, plot, soundness
from jaxkv.evaluation import digests
from jaxkv.evaluation.likelihood import losses, windows
from jaxkv.evaluation.methods import FULL, Budget, Method, check_budget
from jaxkv.evaluation.statistics import half_width
from jaxkv.evaluation.tables import markdown
from jaxkv.language_model import LanguageModel
from jaxkv.provenance import provenance, write_json
from jaxkv.tasks.records import decode_text

BINS = 32  # of the positions behind the prompt
PYDOC = "pydoc"  # the name of the text that every Python brings

Record = dict[str, Any]


def read_texts(names: Sequence[str]) -> list[str]:
    """Return texts: of files, or the topics of Python's own documentation as one text.

    Raises:
      ValueError: a file is not UTF-8 text.
      OSError: a file cannot be read.
    """
    found = []
    for name in names:
        if name == PYDOC:
            from pydoc_data.topics import topics

            found.append("\n\n".join(topics[key] for key in sorted(topics)))
            continue
        found.append(decode_text(Path(name).read_bytes(), name))
    return found


def chosen_windows(
    lm: LanguageModel, texts: Sequence[str], *, length: int, development: bool
) -> np.ndarray:
    """Return every other window: the even ones to choose by, the odd ones to report.

    Args:
      lm: the model.
      texts: from `read_texts`.
      length: tokens `T` of a window.
      development: which of the two.

    Returns:
      int32 `[B, T]`.

    Raises:
      ValueError: there are no two windows.
    """
    found = windows(lm, list(texts), length=length)
    if len(found) < 2:
        raise ValueError(
            f"the text holds one window of {length} tokens, but one to choose by and "
            "one to report are needed; give more --text."
        )
    return found[0 if development else 1 :: 2]


def measure(
    lm: LanguageModel,
    tokens: np.ndarray,
    methods: Sequence[Method],
    budgets: Sequence[Budget],
    *,
    prompt: int,
    batch_size: int,
    config: Record,
    file: Path | None,
    show: Callable[[str, int, int], Any] = lambda what, done, total: None,
    **implementations: Any,
) -> Record:
    """Return the record of all methods at all budgets.

    Args:
      lm: the model.
      tokens: int32 `[B, T]`, the windows.
      methods: those that keep everything run once.
      budgets: of the others; a percentage is of `T`.
      prompt: tokens that are read at once, before the loss begins to count.
      batch_size: windows at a time.
      config: what else decides the numbers.
      file: where the record goes, and where an earlier run left it; None keeps none.
      show: is told what is done, how much of it, and of how much.
      **implementations: of `Options`.

    Raises:
      ValueError: the file has another configuration, a budget goes with no method, or
        losses are no numbers; what has been measured before is kept.
    """
    length = tokens.shape[1]
    if not 0 < prompt < length:
        raise ValueError(
            f"--prompt must lie between 1 and {length - 1}, the length less one, got "
            f"{prompt}."
        )
    config = config | {
        "model": lm.name,
        "dtype": lm.dtype.name,
        **digests.of_model(lm),
        "length": length,
        "prompt": prompt,
        "texts": len(tokens),
        "tokens": hashlib.blake2b(tokens.tobytes(), digest_size=16).hexdigest(),
    }
    record = _begin(file, config)
    done = {(entry["method"], entry["budget"]) for entry in record["results"]}
    cases = _cases(methods, budgets, length, prompt)
    for number, (method, budget, count) in enumerate(cases):
        show(f"{method.name} {budget}", number, len(cases))
        if (method.name, budget) in done:
            continue
        rows = [
            losses(
                *(lm, _filled(tokens, first, batch_size), method, count),
                prompt=prompt,
                **implementations,
            )[: len(tokens) - first]
            for first in range(0, len(tokens), batch_size)
        ]
        found = np.concatenate(rows)
        if not np.isfinite(found).all():
            raise ValueError(
                f"{_at(method, budget)}: losses are NaN or infinite in "
                f"{int((~np.isfinite(found)).any(1).sum())} of {len(found)} windows; "
                f"{soundness.cause(lm.params)}"
            )
        record["results"].append(
            {
                "method": method.name,
                "budget": budget,
                "budget_tokens": count,
                "losses": _binned(found).round(6).tolist(),
            }
        )
        if file is not None:
            write_json(file, record)
    return record


def _begin(file: Path | None, config: Record) -> Record:
    """Return an earlier run's record of this configuration, or an empty one."""
    if file is None or not file.exists():
        return {"config": config, "results": [], "run_meta": [provenance()]}
    try:
        record = json.loads(file.read_text("utf-8"))
        other = record["config"]
        other.keys(), record["results"][:], record["run_meta"][:]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{file} is no record of eval perplexity; choose another --out."
        ) from error
    for name in sorted({*other, *config}):
        if other.get(name) != config.get(name):
            raise ValueError(
                f"{file} holds results with {name}={other.get(name)!r}, this run has "
                f"{name}={config.get(name)!r}; choose another --out."
            )
    return record | {"run_meta": [*record["run_meta"], provenance()]}


def _cases(
    methods: Sequence[Method], budgets: Sequence[Budget], length: int, prompt: int
) -> list[tuple[Method, str, int | None]]:
    cases: list[tuple[Method, str, int | None]] = []
    for method in methods:
        if not method.bounded:
            cases.append((method, FULL, None))
            continue
        for budget in budgets:
            count = budget.tokens(length)
            check_budget(method, budget, count, prompt)
            cases.append((method, budget.name, count))
    return cases


def _at(method: Method, budget: str) -> str:
    return f"{method.name} at {budget}" if method.bounded else method.name


def _filled(tokens: np.ndarray, first: int, size: int) -> np.ndarray:
    """Return a batch; the last one is filled up, since another size compiles anew."""
    rows = np.arange(first, first + min(size, len(tokens))) % len(tokens)
    return tokens[rows]


def _binned(values: np.ndarray) -> np.ndarray:
    """Return the mean of each of `BINS` equal parts of the last axis, or fewer."""
    parts = np.array_split(values, min(BINS, values.shape[1]), axis=1)
    return np.stack([part.mean(1) for part in parts], axis=1)


def report(record: Record) -> str:
    """Return Markdown tables: what each budget costs over keeping everything."""
    config = record["config"]
    whole = _found(record, FULL)
    parts = [
        f"perplexity of {config['model']} ({config['dtype']}) on {config['texts']} "
        f"windows of {config['length']} tokens, the first {config['prompt']} of them "
        "not counted; nats a token, 95 % interval over windows."
    ]
    if whole is not None:
        mean = whole.mean()
        parts.append(f"Everything kept: {mean:.4f} (perplexity {np.exp(mean):.2f}).")
    for title, first in (("All positions", 0.0), ("Last quarter", 0.75)):
        parts.append(f"### {title}\n\n{_table(record, whole, first)}")
    return "\n\n".join(parts)


def _found(record: Record, budget: str) -> np.ndarray | None:
    for entry in record["results"]:
        if entry["budget"] == budget:
            return np.array(entry["losses"])
    return None


def _table(record: Record, whole: np.ndarray | None, first: float) -> str:
    """Return differences to the control, or losses where it has not run."""
    entries = [entry for entry in record["results"] if entry["budget"] != FULL]
    budgets = list(dict.fromkeys(entry["budget"] for entry in entries))
    lines = []
    for method in dict.fromkeys(entry["method"] for entry in entries):
        line = [method]
        for budget in budgets:
            values = [
                np.array(entry["losses"])
                for entry in entries
                if (entry["method"], entry["budget"]) == (method, budget)
            ]
            line.append(_cell(values[0], whole, first) if values else "")
        lines.append(line)
    return markdown(["method", *budgets], lines)


def _cell(values: np.ndarray, whole: np.ndarray | None, first: float) -> str:
    change = values if whole is None else values - whole
    means = change[:, int(first * change.shape[1]) :].mean(1)
    sign = "" if whole is None else "+"
    return f"{means.mean():{sign}.3f} ± {half_width(means):.3f}"


def draw(record: Record, stem: Path) -> list[Path]:
    """Draw loss against position, a panel per budget; return the files.

    Args:
      record: from `measure`.
      stem: the path without the ending.

    Raises:
      ValueError: matplotlib is missing.
    """
    config = record["config"]
    entries = [entry for entry in record["results"] if entry["budget"] != FULL]
    budgets = list(dict.fromkeys(entry["budget"] for entry in entries))
    whole = _found(record, FULL)

    def curve(losses: np.ndarray) -> plot.Curve:
        mean = losses.mean(0)
        behind = config["length"] - config["prompt"]
        at = config["prompt"] + (np.arange(len(mean)) + 0.5) * behind / len(mean)
        return plot.Curve(at=at.tolist(), mean=mean.tolist())

    controls = {} if whole is None else {FULL: curve(whole)}
    panels = []
    for budget in budgets or [FULL]:
        curves = {
            entry["method"]: curve(np.array(entry["losses"]))
            for entry in entries
            if entry["budget"] == budget
        }
        panels.append(
            plot.Panel(curves=curves, controls=controls, title=f"budget {budget}")
        )
    figure = plot.against_position(
        panels,
        label="nats a token",
        title=f"{config['model']}, {config['texts']} texts",
    )
    return figures.save(figure, stem)
