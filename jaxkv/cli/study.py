"""`jaxkv study`: looks into a model, to see why a method works."""

import itertools
import json
from pathlib import Path
from typing import Annotated, Any

import typer

from jaxkv.cli import flags, parsing
from jaxkv.cli.progress import shown
from jaxkv.cli.sweep import print_markdown
from jaxkv.evaluation import digests, perplexity, position_study
from jaxkv.evaluation.folder import check_writable
from jaxkv.evaluation.methods import parse_budgets
from jaxkv.evaluation.position_study import Study
from jaxkv.evaluation.questions import (
    DEVELOPMENT_SEED,
    QUOTING,
    REPORT_SEED,
    RETRIEVAL,
    Cell,
    draw_questions,
    of_text,
)
from jaxkv.language_model import NEEDLE
from jaxkv.provenance import provenance, write_json

TASK = "niah_multikey_uuid"

app = typer.Typer(help="Look into a model.")


@app.callback(invoke_without_command=True)
def _study(context: typer.Context) -> None:
    """Look into a model, to see why a method works."""
    if context.invoked_subcommand is None:
        print(context.get_help())


@app.command()
def positions(
    model: flags.Model = NEEDLE,
    task: Annotated[
        str | None,
        typer.Option(help=f"What the prompts are made of; default: {TASK}."),
    ] = None,
    text: Annotated[
        list[str] | None,
        typer.Option(
            help="Windows of this file instead of a task; may be repeated. "
            f"{perplexity.PYDOC}: Python's own documentation."
        ),
    ] = None,
    length: Annotated[int, typer.Option(min=64, help="Tokens of a sample.")] = 4096,
    samples: Annotated[int, typer.Option(min=1, help="Prompts.")] = 16,
    tokens: Annotated[int, typer.Option(min=1, help="True queries of each.")] = 32,
    sizes: Annotated[
        str, typer.Option(help="Window sizes, with commas.")
    ] = "1,2,4,8,16,32,64,128",
    budgets: Annotated[
        str, typer.Option(help="For the recall: tokens or percentages, with commas.")
    ] = "3%,6%,12.5%",
    seed: flags.Seed = 0,
    development: Annotated[
        bool,
        typer.Option("--development", help="Take other samples than reports do."),
    ] = False,
    batch_size: flags.BatchSize = 8,
    dtype: Annotated[
        str, typer.Option(help="16 bits would blur what is compared.")
    ] = "float32",
    follow_links: flags.FollowLinks = False,
    mesh: flags.Mesh = None,
    out: Annotated[
        Path | None, typer.Option(help="Write the JSON to this file.")
    ] = None,
    json_: flags.Json = False,
) -> None:
    """Compare queries by content and by position, as DapQ's observation study does."""
    _check(task, text, out)
    study = Study(
        tokens=tokens,
        sizes=sorted(parsing.positive("--sizes", sizes)),
        budgets=parse_budgets(budgets),
        seed=seed,
    )
    lm = flags.load_model(model, dtype, follow_links=follow_links, mesh=mesh)
    if text:
        windows = perplexity.chosen_windows(
            *(lm, perplexity.read_texts(text)), length=length, development=development
        )
        questions = of_text(windows[:samples])
    else:
        drawn = DEVELOPMENT_SEED if development else REPORT_SEED
        cell = Cell(task=task or TASK, length=length)
        questions = draw_questions(lm, [cell], samples=samples, seed=drawn)
    done = itertools.count(1)
    with shown("answers") as show:
        found = position_study.measure(
            *(lm, questions, study),
            batch_size=batch_size,
            advance=lambda: show("prompts", next(done), len(questions)),
        )
    config = {
        "model": lm.name,
        "dtype": lm.dtype.name,
        **digests.of_model(lm),
        "questions": digests.of_questions(questions),
        "task": questions[0].cell.task,
        "length": length,
        "samples": len(questions),
        "tokens": tokens,
        "sizes": list(study.sizes),
        "budgets": [budget.name for budget in study.budgets],
        "seed": seed,
        "development": development,
    }
    _tell({"config": config, **found, "run_meta": provenance()}, out=out, json_=json_)


def _check(task: str | None, text: list[str] | None, out: Path | None) -> None:
    """Raise ValueError or OSError before the work, not after it."""
    known = RETRIEVAL + QUOTING
    if task and text:
        raise ValueError("prompts are made of a --task or of a --text; give one.")
    if task is not None and task not in known:
        raise ValueError(f"--task takes one of {', '.join(known)}, got {task!r}.")
    if out is not None:
        if out.is_dir():
            raise ValueError(f"--out takes a file, but {out} is a folder.")
        check_writable(out.parent)


def _tell(record: dict[str, Any], *, out: Path | None, json_: bool) -> None:
    """Write a study's results to a file, if one is asked for, and to the terminal."""
    if out is not None:
        write_json(out, record)
    if json_:
        print(json.dumps(record))
    else:
        print_markdown(position_study.markdown(record))
