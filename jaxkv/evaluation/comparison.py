"""`jaxkv.evaluate`: the comparison of `jaxkv eval` from Python, policies as objects."""

import contextlib
import dataclasses
import tempfile
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxkv.evaluation.experiment import Experiment, run_experiment
from jaxkv.evaluation.folder import read
from jaxkv.evaluation.methods import Method, parse_budgets
from jaxkv.evaluation.questions import (
    AWARE,
    QUOTING,
    REPORT_SEED,
    RETRIEVAL,
    Cell,
    Match,
    Protocol,
)
from jaxkv.evaluation.reports import report_of
from jaxkv.evaluation.rows import typed
from jaxkv.expected import (
    brief,
    check_path,
    check_text,
    check_truth,
)
from jaxkv.language_model import LanguageModel, check_model
from jaxkv.policies.base import DecodePolicy, PrefillPolicy
from jaxkv.policies.full import Full
from jaxkv.text.arguments import integer, integers, is_collection
from jaxkv.text.documents import speaking_of

Policies = PrefillPolicy | tuple[PrefillPolicy, DecodePolicy]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Evaluation:
    """What `evaluate` returns.

    Attributes:
      rows: one per method, budget and question, as in `predictions.csv`.
      metrics: means and intervals, as in `metrics.json`.
      report: the tables, as Markdown; a notebook shows them.
    """

    rows: tuple[dict[str, Any], ...]
    metrics: dict[str, Any]
    report: str

    def __repr__(self) -> str:
        return f"Evaluation({len(self.rows)} rows; print its report)"

    def _repr_markdown_(self) -> str:
        return self.report


def evaluate(
    lm: LanguageModel,
    methods: Mapping[str, Policies],
    *,
    tasks: Sequence[str] = RETRIEVAL,
    lengths: Sequence[int] = (1024,),
    task_file: str | Path | None = None,
    budgets: Sequence[str | int] = ("6%", "12.5%", "25%"),
    samples: int = 20,
    protocol: Protocol = AWARE,
    match: Match = "all",
    chat: bool = False,
    system: str | None = None,
    max_new_tokens: int | None = None,
    batch_size: int = 8,
    seed: int = REPORT_SEED,
    folder: str | Path | None = None,
) -> Evaluation:
    """Ask the same questions of every method at every budget.

    Args:
      lm: from `jaxkv.load`, with a tokenizer.
      methods: by the names that the tables have: what evicts prompts, or a pair of that
        and of what evicts the output. `Full()` is the control.
      tasks: names of `jaxkv eval ruler`.
      lengths: tokens of the samples.
      task_file: questions of your own instead, see `jaxkv eval --task-file`.
      budgets: tokens, or texts such as "6%".
      samples: of each task and length.
      protocol: "query-aware", the question is a part of what is cut, or
        "query-agnostic", it comes behind a document that has been cut without it.
      match: whether all wanted strings must occur, or any.
      chat: whether to ask in the model's chat template.
      system: what the system says first, in a chat.
      max_new_tokens: longest output; None takes each length's longest answer.
      batch_size: most prompts generated from together.
      seed: of the samples.
      folder: where the results go, to be gone on with; None keeps none.

    Raises:
      ValueError: something cannot work, or the folder is of another experiment.
      OSError: the task file cannot be read.
    """
    _check(lm, methods, given=dict(locals()))
    unknown = [task for task in tasks if task not in RETRIEVAL + QUOTING]
    if unknown and task_file is None:
        raise ValueError(
            f"evaluate: unknown task {unknown[0]!r}; choose among "
            f"{', '.join(RETRIEVAL + QUOTING)}."
        )
    asked: dict[str, Any] = {"kind": "file", "file": Path(task_file or "")}
    if task_file is None:
        cells = [Cell(task=t, length=length) for length in lengths for t in tasks]
        asked = {"kind": "ruler", "cells": cells, "samples": samples, "seed": seed}
    experiment = Experiment(
        **asked,
        methods=[_method(name, policies) for name, policies in methods.items()],
        budgets=parse_budgets(",".join(map(str, budgets)), flag="budgets="),
        max_new_tokens=max_new_tokens,
        match=match,
        protocol=protocol,
        chat=chat,
        system=system,
        batch_size=batch_size,
    )
    with contextlib.ExitStack() as stack:
        if folder is None:
            folder = stack.enter_context(tempfile.TemporaryDirectory())
        place = Path(folder)
        outcome = run_experiment(lm, experiment, place, pictures=False)
        return Evaluation(
            rows=tuple(typed(row) for row in read(place).rows),
            metrics=outcome.metrics,
            report=report_of(place),
        )


def _check(lm: Any, methods: Any, given: Mapping[str, Any]) -> None:
    """Raise ValueError for arguments of `evaluate` that are of another kind."""
    check_model("evaluate", lm)
    if not isinstance(methods, Mapping) or not methods:
        raise ValueError(
            "evaluate: methods= takes policies by name, such as {'snapkv': SnapKV()}, "
            f"at least one, got {brief(methods)}."
        )
    for name in ("tasks", "lengths", "budgets"):
        some = given[name]
        if isinstance(some, str | bytes) or not is_collection(some) or not len(some):
            raise ValueError(
                f"evaluate: {name}= takes a list of at least one, got {brief(some)}."
            )
    for task in given["tasks"]:
        check_text("evaluate", tasks=task)
    with speaking_of("evaluate", "prompt"):
        counts = {"samples": given["samples"], "batch_size": given["batch_size"]}
        if given["max_new_tokens"] is not None:
            counts["max_new_tokens"] = given["max_new_tokens"]
        lengths = integers("lengths", given["lengths"])
        counts |= {f"lengths[{i}]": length for i, length in enumerate(lengths)}
        for name, number in (*counts.items(), ("seed", given["seed"])):
            least = 0 if name == "seed" else 1
            if integer(name, number) < least:
                raise ValueError(f"generate: {name} must be >= {least}, got {number}.")
    for name, known in (("protocol", Protocol), ("match", Match)):
        choices = typing.get_args(known)
        if not isinstance(given[name], str) or given[name] not in choices:
            raise ValueError(
                f"evaluate: {name}= takes {' or '.join(choices)}, got "
                f"{brief(given[name])}."
            )
    check_truth("evaluate", chat=given["chat"])
    if given["system"] is not None:
        check_text("evaluate", system=given["system"])
    paths = {name: given[name] for name in ("task_file", "folder")}
    check_path("evaluate", **{n: x for n, x in paths.items() if x is not None})


def _method(name: str, policies: Any) -> Method:
    """Return a method of policies, or raise ValueError for what are none."""
    pair = policies if isinstance(policies, tuple) else (policies, Full())
    if len(pair) != 2 or any(isinstance(policy, type) for policy in pair):
        raise ValueError(
            f"evaluate: {name} must be a prefill policy, such as SnapKV(), or a pair "
            f"of a prefill and a decode policy, got {brief(policies)}."
        )
    prefill, decode = pair
    if not hasattr(prefill, "compress") or not hasattr(decode, "attend"):
        raise ValueError(
            f"evaluate: {name} must be a prefill policy and, in a pair, a decode "
            f"policy behind it, got {brief(policies)}."
        )
    return Method(name=name, prefill=prefill, decode=decode)
