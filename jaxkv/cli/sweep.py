"""The flags that all comparisons of `jaxkv eval` share, and how one of them is run."""

import contextlib
import dataclasses
import json
import tempfile
from pathlib import Path
from typing import Annotated, Any

import jax
import rich.console
import typer

from jaxkv import figures
from jaxkv.cli import flags
from jaxkv.cli.progress import shown
from jaxkv.cli.terminal import announce, say
from jaxkv.evaluation.experiment import Experiment, Outcome, run_experiment
from jaxkv.evaluation.folder import PREDICTIONS, safe_name
from jaxkv.evaluation.lock import one_writer
from jaxkv.evaluation.questions import AWARE, Protocol
from jaxkv.evaluation.reports import report_of
from jaxkv.evaluation.rows import to_text
from jaxkv.language_model import LanguageModel
from jaxkv.text.chat import speaks_in_chats

Out = Annotated[
    Path | None,
    typer.Option(help="Folder of results; default: results/KIND__LENGTHS__MODEL."),
]
Pictures = Annotated[
    bool | None,
    typer.Option(help="Draw pictures; default: where matplotlib is installed."),
]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sweep:
    """What is common to all comparisons; each field is a flag.

    Attributes:
      protocol: whether a question is a part of what is cut.
      chat: ask in the model's chat template.
      system: what the system says first, in a chat.
      batch_size: most prompts generated from together.
      mixed: whether a batch may hold rows of different budgets.
      side_by_side: programs that run at the same time.
      seconds: after which no further batch begins.
      characters: of each output that are kept; 0 keeps all.
      out: folder of results.
      pictures: whether to draw; None where matplotlib is installed.
      dtype: of the weights.
      follow_links: whether they may be links out of their folder.
      mesh: devices to spread the model over.
      prefill_implementation: attention over the prompt.
      decode_implementation: attention over the cache.
      as_json: print the metrics as JSON instead of tables.
    """

    protocol: Annotated[
        Protocol,
        typer.Option(
            help="Whether questions are a part of the prompt that is cut, or come "
            "behind documents that have been cut without them."
        ),
    ] = AWARE
    chat: Annotated[
        bool,
        typer.Option("--chat", help="Ask in the model's chat template, as users do."),
    ] = False
    system: Annotated[
        str | None, typer.Option(help="What the system says first; with --chat.")
    ] = None
    batch_size: flags.BatchSize = 8
    mixed: Annotated[
        bool,
        typer.Option(
            help="Put rows of different budgets into one batch: one program for all "
            "of them, and the same answers; not if --decode evicts."
        ),
    ] = True
    side_by_side: Annotated[
        int,
        typer.Option(min=1, help="Programs at a time: one compiles, another computes."),
    ] = 1
    seconds: Annotated[
        float | None,
        typer.Option(min=0, help="Begin no batch after this; run again to go on."),
    ] = None
    characters: Annotated[
        int, typer.Option(min=0, help="Of each output to keep in results; 0: all.")
    ] = 2000
    out: Out = None
    pictures: Pictures = None
    dtype: flags.Dtype = None
    follow_links: flags.FollowLinks = False
    mesh: flags.Mesh = None
    prefill_implementation: flags.PrefillImplementation = None
    decode_implementation: flags.DecodeImplementation = None
    as_json: flags.Json = False

    @property
    def options(self) -> dict[str, Any]:
        """The fields that `Experiment` takes."""
        if self.system is not None and not self.chat:
            raise ValueError("--system goes with --chat; add it.")
        names = [
            "protocol",
            "chat",
            "system",
            "batch_size",
            "mixed",
            "side_by_side",
            "seconds",
        ]
        names.append("characters")
        return {name: getattr(self, name) for name in names} | {
            "arguments": {
                "prefill_implementation": self.prefill_implementation,
                "decode_implementation": self.decode_implementation,
            }
        }


def run_and_print(
    model: str, sweep: Sweep, experiment: Experiment, *, what: str | None
) -> None:
    """Run an experiment in its folder and print what came out.

    Args:
      model: what to load.
      sweep: the shared flags.
      experiment: what to run.
      what: lengths or the like, for the folder's default name; None keeps nothing
        where no folder is named, and prints with the metrics what a folder would say.
    """
    if experiment.side_by_side > 1 and jax.default_backend() == "gpu":
        # Seen on an H200: a thread that waits breaks the other one's graph capture.
        raise ValueError(
            "--side-by-side does not work on a GPU, where one program disturbs "
            "another's launches; leave it out."
        )
    kept = sweep.out
    if kept is None and what is not None:
        parts = [experiment.kind, what, model]
        if experiment.protocol != AWARE:
            parts.append(experiment.protocol)
        kept = Path("results") / "__".join(map(safe_name, parts))
    if kept is not None:
        with one_writer(kept):  # is it free, and can it be written? Before the work
            pass
    lm = flags.load_model(
        model, sweep.dtype, follow_links=sweep.follow_links, mesh=sweep.mesh
    )
    with contextlib.ExitStack() as stack:
        folder = kept or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        before = _size(folder)
        try:
            outcome = _run(lm, sweep, experiment, folder)
        except BaseException as error:
            interrupted = isinstance(error, KeyboardInterrupt)
            if kept is not None and (interrupted or _size(folder) > before):
                how = "interrupted" if interrupted else "stopped"
                say(f"{how}; the same command goes on in {kept}")
            raise
        if sweep.as_json:
            print(json.dumps(_record(outcome, None if what is None else kept)))
        else:
            print_markdown(report_of(folder))
    if kept is not None and not sweep.as_json:
        rich.console.Console(stderr=True).print(f"Results: {kept}", soft_wrap=True)
    if outcome.ran.failed:
        raise ValueError(
            f"out of memory: {'; '.join(outcome.ran.failed)} could not run, all others "
            "have. Lower --batch-size or --max-new-tokens, take --dtype bfloat16, or "
            "leave these out; what is there is kept."
        )


def _size(folder: Path) -> int:
    """Return the size of a folder's predictions; a new file begins with a header."""
    path = folder / PREDICTIONS
    return path.stat().st_size if path.exists() else len(to_text([], header=True))


def _run(
    lm: LanguageModel, sweep: Sweep, experiment: Experiment, folder: Path
) -> Outcome:
    """Run an experiment with a progress bar, and say on stderr how it went."""
    drawn = figures.available() if sweep.pictures is None else sweep.pictures
    with shown("begins") as show:
        outcome = run_experiment(
            lm, experiment, folder, pictures=drawn, show=show, tell=say
        )
    if not experiment.chat and speaks_in_chats(lm):
        say(f"{lm.name} has a chat template, and is asked without; see --chat")
    if outcome.stats:
        announce(lm, outcome.stats)
    if sweep.pictures is None and not drawn and outcome.metrics["cells"]:
        say(
            "no pictures without matplotlib; pip install 'jaxkv[plot]', then "
            f"jaxkv eval report {folder} --pictures"
        )
    if outcome.ran.late:
        say(f"--seconds is over; the same command goes on in {folder}")
    return outcome


def _record(outcome: Outcome, folder: Path | None) -> dict[str, Any]:
    """Return what `--json` prints: what a folder would hold, or where it is."""
    if folder is not None:
        return {"folder": str(folder)} | outcome.metrics
    return {
        "config": outcome.config,
        "metrics": outcome.metrics,
        "run_meta": outcome.meta,
    }


def print_markdown(text: str) -> None:
    """Print Markdown: rendered on a terminal, as it is elsewhere."""
    console = rich.console.Console()
    if console.is_terminal:
        from rich.markdown import Markdown  # with all languages of code blocks

        console.print(Markdown(text))
    else:
        print(text)
