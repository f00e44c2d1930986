"""`jaxkv eval`: accuracy of a model, and of every way to keep its cache small."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from jaxkv.cli import flags, parsing
from jaxkv.cli.export import export
from jaxkv.cli.groups import grouped
from jaxkv.cli.perplexity import perplexity
from jaxkv.cli.sweep import Sweep, print_markdown, run_and_print
from jaxkv.cli.terminal import say
from jaxkv.evaluation.experiment import Experiment
from jaxkv.evaluation.folder import merge_folders
from jaxkv.evaluation.lock import FolderInUse, one_writer
from jaxkv.evaluation.methods import (
    FULL,
    Budget,
    Method,
    parse_budgets,
    parse_decode_methods,
    parse_prefill_methods,
)
from jaxkv.evaluation.questions import (
    DEVELOPMENT_SEED,
    QUOTING,
    REASONING,
    REPORT_SEED,
    RETRIEVAL,
    Cell,
    Match,
)
from jaxkv.evaluation.reports import (
    faults_of,
    report_beside,
    report_of,
    write_report,
)
from jaxkv.language_model import NEEDLE
from jaxkv.registry import PREFILL
from jaxkv.text.planning import row_budgets

ALL = ",".join(PREFILL)
NIAH = ("niah_single_1", "niah_single_words", "niah_single_uuid")


class _Group(TyperGroup):
    """`jaxkv eval MODEL` is `card`, and `jaxkv eval --task-file X` is `file`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Put the command in where none is named."""
        if not args or (args[0] not in self.commands and args[0] != "--help"):
            named = any(arg.partition("=")[0] == "--task-file" for arg in args)
            args = ["file" if named else "card", *args]
        return super().parse_args(ctx, args)


app = typer.Typer(
    cls=_Group,
    help="Measure how often answers are right. Without a command: card; with "
    "--task-file: file.",
)

Methods = Annotated[
    str,
    typer.Option(
        help="Methods with commas, each with its options, as in "
        "full,streaming-llm:n_sink=2."
    ),
]
Budgets = Annotated[
    str, typer.Option(help="Tokens such as 256, percentages such as 6%, with commas.")
]
Lengths = Annotated[str, typer.Option(help="Tokens of samples, with commas.")]
Tasks = Annotated[str | None, typer.Option(help="Names with commas; default: all.")]
Samples = Annotated[int, typer.Option(min=1, help="Per task, length and depth.")]
Development = Annotated[
    bool,
    typer.Option(
        "--development", help="Draw other samples than reports do, to choose options."
    ),
]
NewTokens = Annotated[
    int | None,
    typer.Option(min=1, help="Longest output; default: each length's longest answer."),
]


@app.command()
@grouped
def niah(
    model: flags.Model = NEEDLE,
    methods: Methods = "full,streaming-llm",
    budgets: Budgets = "3%,6%,12.5%",
    lengths: Lengths = "1024,2048,3072,4096,6144,8192",
    depths: Annotated[
        str, typer.Option(help="Places of the needle in per cent, with commas.")
    ] = "0,10,20,30,40,50,60,70,80,90,100",
    task: Annotated[str, typer.Option(help=f"One of {', '.join(NIAH)}.")] = NIAH[0],
    samples: Samples = 10,
    decode: flags.Decode = "full",
    development: Development = False,
    max_new_tokens: NewTokens = None,
    *,
    sweep: Sweep,
) -> None:
    """Find a needle at every length and depth; draws the heat map."""
    if task not in NIAH:
        raise ValueError(f"--task takes one of {', '.join(NIAH)}, got {task!r}.")
    experiment = Experiment(
        kind="niah",
        cells=[
            Cell(task=task, length=length, depth=depth)
            for length in parsing.positive("--lengths", lengths)
            for depth in _depths(depths)
        ],
        methods=parse_prefill_methods(methods, decode=decode),
        budgets=parse_budgets(budgets),
        samples=samples,
        seed=_seed(development),
        max_new_tokens=max_new_tokens,
        **sweep.options,
    )
    run_and_print(model, sweep, experiment, what=lengths)


@app.command()
@grouped
def ruler(
    model: flags.Model = NEEDLE,
    methods: Methods = ALL,
    budgets: Budgets = "1.5%,3%,6%,12.5%,25%,50%",
    lengths: Lengths = "4096,8192",
    tasks: Tasks = None,
    samples: Samples = 200,
    decode: flags.Decode = "full",
    development: Development = False,
    max_new_tokens: NewTokens = None,
    *,
    sweep: Sweep,
) -> None:
    """RULER's tasks that need no corpus, by method and budget of the prompt.

    --tasks also takes quote, continue and edit, whose answers are long.
    """
    _by_length(
        model,
        parsing.names(tasks or ",".join(RETRIEVAL), RETRIEVAL + QUOTING),
        lengths,
        kind="ruler",
        methods=parse_prefill_methods(methods, decode=decode),
        budgets=parse_budgets(budgets),
        samples=samples,
        seed=_seed(development),
        max_new_tokens=max_new_tokens,
        sweep=sweep,
    )


@app.command()
@grouped
def reasoning(
    model: flags.Model = NEEDLE,
    methods: Methods = "full,streaming-llm",
    budgets: Budgets = "50%,35%,20%,15%",
    lengths: Annotated[
        str, typer.Option(help="Tokens of the answers, with commas.")
    ] = "1024,2048,4096",
    tasks: Tasks = None,
    samples: Samples = 200,
    prefill: flags.Prefill = "snapkv",
    development: Development = False,
    max_new_tokens: NewTokens = None,
    *,
    sweep: Sweep,
) -> None:
    """Long answers under a budget; percentages are of prompt and answer together."""
    _by_length(
        model,
        parsing.names(tasks, REASONING),
        lengths,
        kind="reasoning",
        methods=parse_decode_methods(methods, prefill=prefill),
        budgets=parse_budgets(budgets),
        samples=samples,
        seed=_seed(development),
        max_new_tokens=max_new_tokens,
        sweep=sweep,
    )


@app.command()
@grouped
def file(
    model: flags.Model = NEEDLE,
    task_file: Annotated[
        Path, typer.Option(help="JSON lines: RULER's, LongBench's, or your own.")
    ] = ...,  # type: ignore[assignment]
    methods: Methods = "full",
    budgets: Budgets = "6%,12.5%,25%,50%",
    decode: flags.Decode = "full",
    max_new_tokens: Annotated[
        int | None,
        typer.Option(
            min=1, help="Longest output; default: what the file says, or 128."
        ),
    ] = None,
    match: Annotated[
        Match, typer.Option(help="Whether all wanted strings must occur, or any.")
    ] = "all",
    *,
    sweep: Sweep,
) -> None:
    """Questions of your own, by method and budget of the prompt."""
    experiment = Experiment(
        kind="file",
        file=task_file,
        methods=parse_prefill_methods(methods, decode=decode),
        budgets=parse_budgets(budgets),
        max_new_tokens=max_new_tokens,
        match=match,
        **sweep.options,
    )
    run_and_print(model, sweep, experiment, what=task_file.stem)


@app.command()
@grouped
def card(
    *,
    model: flags.Model = NEEDLE,
    tasks: Tasks = None,
    lengths: Lengths = "1024,2048,4096,8192",
    answers: Annotated[
        str, typer.Option(help="Tokens of the long answers, with commas.")
    ] = "512,1024,2048,4096",
    samples: Annotated[int, typer.Option(min=1, help="Per task and length.")] = 200,
    batch_size: flags.BatchSize = 8,
    seed: Annotated[int, typer.Option(min=0, help="Of the samples.")] = REPORT_SEED,
    eviction: flags.Eviction,
    dtype: flags.Dtype = None,
    kernels: flags.Kernels,
    out: Annotated[
        Path | None, typer.Option(help="Folder for predictions and metrics.")
    ] = None,
    json_: flags.Json = False,
) -> None:
    """Measure how often answers are right, by task and length."""
    flags.check(eviction.arguments)
    method, budgets = _kept(eviction)
    sweep = Sweep(
        batch_size=batch_size,
        characters=0,
        out=out,
        pictures=False,
        dtype=dtype,
        as_json=json_,
        **kernels.arguments,
    )
    experiment = Experiment(
        kind="card",
        cells=_card_cells(tasks, lengths, answers),
        methods=[method],
        budgets=budgets,
        samples=samples,
        seed=seed,
        **sweep.options,
    )
    run_and_print(model, sweep, experiment, what=None)


app.command()(perplexity)
app.command()(export)


@app.command()
def report(
    folder: Annotated[Path, typer.Argument(help="Folder of results.")],
    baseline: Annotated[
        str | None, typer.Option(help="A method that the others are compared with.")
    ] = None,
    beside: Annotated[
        Path | None,
        typer.Option(
            help="Folder of the same run by the other --protocol; prints both side by "
            "side, and nothing else."
        ),
    ] = None,
    pictures: Annotated[
        bool, typer.Option(help="Draw the pictures too; needs matplotlib.")
    ] = False,
) -> None:
    """Print the tables of a folder as Markdown, and make its metrics anew."""
    if beside is not None:
        print_markdown(report_beside(folder, beside))
        return
    text = report_of(folder, baseline=baseline)
    if faults := faults_of(folder):
        say(faults)
    try:
        with one_writer(folder):
            write_report(folder, pictures=pictures)
    except (FolderInUse, OSError) as error:  # a run is at work, or it is read-only
        if pictures:
            raise
        why = f"{folder} cannot be written" if isinstance(error, OSError) else error
        say(f"the metrics in the folder are not made anew: {why}")
    print(text)


@app.command()
def merge(
    out: Annotated[Path, typer.Argument(help="New folder.")],
    folders: Annotated[list[Path], typer.Argument(help="Folders of results.")],
    pictures: Annotated[
        bool, typer.Option(help="Draw the pictures too; needs matplotlib.")
    ] = False,
) -> None:
    """Put runs that differ in methods or lengths into one folder, and report it.

    So that a comparison can be shared by several processes or machines.
    """
    with one_writer(out):
        for fault in merge_folders(out, folders):
            say(fault)
        write_report(out, pictures=pictures)
    print_markdown(report_of(out))


def _by_length(
    model: str, tasks: Sequence[str], lengths: str, *, sweep: Sweep, **decided: Any
) -> None:
    """Run every task at every length; `decided` is what else an `Experiment` takes."""
    cells = [
        Cell(task=task, length=length)
        for length in parsing.positive("--lengths", lengths)
        for task in tasks
    ]
    experiment = Experiment(cells=cells, **decided, **sweep.options)
    run_and_print(model, sweep, experiment, what=lengths)


def _card_cells(tasks: str | None, lengths: str, answers: str) -> list[Cell]:
    """Return the cells of the card: retrieval and quoting by length, long answers."""
    by_length = parsing.positive("--lengths", lengths)
    by_answer = parsing.positive("--answers", answers)
    wanted = parsing.names(tasks, RETRIEVAL + QUOTING + REASONING)
    cells = [Cell(task=t, length=n) for n in by_length for t in RETRIEVAL + QUOTING]
    cells += [Cell(task=t, length=n) for n in by_answer for t in REASONING]
    return [cell for cell in cells if cell.task in wanted]


def _kept(eviction: flags.Eviction) -> tuple[Method, list[Budget]]:
    """Return the one method of a card, and its budget if it has one.

    Raises:
      ValueError: a budget without an eviction, or one that does not go with it.
    """
    names = [name for name in (eviction.prefill, eviction.decode) if name != FULL]
    arguments = eviction.arguments
    tokens, ratio = arguments.pop("budget"), arguments.pop("compression_ratio")
    method = Method(name="+".join(names) or FULL, **arguments)
    if tokens is None and ratio is None:
        return method, []
    row_budgets(tokens, ratio, [], evicts=method.decode.evicts)
    if not method.bounded:
        flag = "--budget" if ratio is None else "--compression-ratio"
        raise ValueError(
            f"{flag} does nothing where nothing evicts; add --prefill or --decode."
        )
    if ratio is None:
        return method, [Budget(name=str(tokens), value=tokens)]
    kept = 100 * (1 - ratio)
    return method, [Budget(name=f"{kept:g}%", value=kept)]


def _seed(development: bool) -> int:
    return DEVELOPMENT_SEED if development else REPORT_SEED


def _depths(text: str) -> list[float]:
    takes = "--depths takes per cent from 0 to 100 with commas,"
    percent = parsing.numbers(text, takes, read=float, least=0, most=100)
    return list(dict.fromkeys(number / 100 for number in percent))
