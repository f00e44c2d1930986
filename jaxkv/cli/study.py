"""`jaxkv study`: looks into a model, to see why a method works."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from jaxkv.cli import flags, parsing, sweep
from jaxkv.cli.terminal import progress
from jaxkv.evaluation import card, folder, methods, position_study
from jaxkv.evaluation import questions as evaluation_questions
from jaxkv.evaluation import tables as evaluation_tables
from jaxkv.evaluation.card import Cell
from jaxkv.evaluation.position_study import Study
from jaxkv.language_model import NEEDLE
from jaxkv.provenance import provenance, write_json

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
        str, typer.Option(help="What the prompts are made of.")
    ] = "niah_multikey_uuid",
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
    out: Annotated[
        Path | None, typer.Option(help="Write the JSON to this file.")
    ] = None,
    json_: flags.Json = False,
) -> None:
    """Compare queries by content and by position, as DapQ's observation study does."""
    _check(task, out)
    study = Study(
        tokens=tokens,
        sizes=sorted(parsing.positive("--sizes", sizes)),
        budgets=methods.parse_budgets(budgets),
        seed=seed,
    )
    lm = flags.load_model(model, dtype)
    drawn = card.DEVELOPMENT_SEED if development else card.REPORT_SEED
    cell = Cell(task=task, length=length)
    questions = evaluation_questions.draw(lm, [cell], samples=samples, seed=drawn)
    with progress() as bar:
        shown = bar.add_task("prompts", total=samples)
        found = position_study.run(
            *(lm, questions, study),
            batch_size=batch_size,
            advance=lambda: bar.advance(shown),
        )
    config = {
        "model": lm.name,
        "dtype": lm.dtype.name,
        "task": task,
        "length": length,
        "samples": samples,
        "tokens": tokens,
        "sizes": list(study.sizes),
        "budgets": [budget.name for budget in study.budgets],
        "seed": seed,
        "development": development,
    }
    _tell({"config": config, **found, "run_meta": provenance()}, out=out, json_=json_)


def _check(task: str, out: Path | None) -> None:
    """Raise ValueError or OSError before the work, not after it."""
    known = card.RETRIEVAL + card.QUOTING
    if task not in known:
        raise ValueError(f"--task takes one of {', '.join(known)}, got {task!r}.")
    if out is not None:
        if out.is_dir():
            raise ValueError(f"--out takes a file, but {out} is a folder.")
        folder.check_writable(out.parent)


def _tell(record: dict[str, Any], *, out: Path | None, json_: bool) -> None:
    """Write a study's results to a file, if one is asked for, and to the terminal."""
    if out is not None:
        write_json(out, record)
    if json_:
        print(json.dumps(record))
    else:
        sweep.print_markdown(tables(record))


def tables(record: dict[str, Any]) -> str:
    """Return a study's results as Markdown tables."""
    config = record["config"]
    columns = {
        "before": "before RoPE",
        "after": "after RoPE",
        "before_centred": "before, centred",
        "after_centred": "after, centred",
    }

    def cosines(row: dict[str, Any]) -> list[str]:
        return [_number(row[name]) for name in columns]

    names = list(columns.values())
    by_content = evaluation_tables.markdown(
        ["content", "position", *names],
        [[r["content"], r["position"], *cosines(r)] for r in record["table"]],
    )
    by_start = evaluation_tables.markdown(
        ["start", *names], [[r["start"], *cosines(r)] for r in record["offsets"]]
    )
    layers = len(record["table"][0]["after"]["layers"])
    by_layer = evaluation_tables.markdown(
        ["content", "position", *(f"layer {i}" for i in range(layers))],
        [
            [r["content"], r["position"], *(f"{x:.3f}" for x in r["after"]["layers"])]
            for r in record["table"]
        ],
    )
    windows = evaluation_tables.markdown(
        ["window", "size", "similarity", *(f"recall {b}" for b in config["budgets"])],
        [
            [
                r["window"],
                str(r["size"] or ""),
                _number(r["similarity"]) if "similarity" in r else "",
                *(_number(r["recall"][b]) for b in config["budgets"]),
            ]
            for r in record["windows"]
        ],
    )
    return "\n\n".join(
        [
            f"Queries of {config['model']} on {config['samples']} prompts of "
            f"{config['task']}, {config['length']} tokens; the truth are the first "
            f"{config['tokens']} tokens that the model writes. Cosines, mean over "
            "tokens, heads and layers.",
            f"### Content and position\n\n{by_content}",
            f"### After RoPE, by layer\n\n{by_layer}",
            f"### The right content at other positions\n\n{by_start}",
            "### Windows: similarity of attention, recall of the truly best\n\n"
            + windows,
        ]
    )


def _number(value: dict[str, float | None]) -> str:
    if value["half"] is None:
        return f"{value['mean']:.4f}"
    return f"{value['mean']:.4f} ± {value['half']:.4f}"
