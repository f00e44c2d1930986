"""`jaxkv demo`: what a small cache remembers of a long document, what it forgets."""

import dataclasses
import re
import textwrap
import time
from pathlib import Path
from typing import Annotated, Any

import jax.numpy as jnp
import rich.box
import rich.console
import rich.table
import typer
from rich.text import Text

from jaxkv import figures, plot
from jaxkv.bench.throughput_report import check_picture
from jaxkv.cli import flags
from jaxkv.cli.terminal import (
    announce,
    megabytes,
    progress,
    right_aligned,
)
from jaxkv.evaluation.questions import Cell, counter, draw_sample, judge
from jaxkv.forward import prefill
from jaxkv.language_model import NEEDLE, LanguageModel
from jaxkv.options import Options
from jaxkv.policies.streaming_llm import StreamingLLM
from jaxkv.runtime.programs import bounded_jit
from jaxkv.tasks.samples import Sample
from jaxkv.text.completion import Stats
from jaxkv.text.inference import generate
from jaxkv.text.prompts import encode
from jaxkv.text.terminal import TextStream

RETRIEVAL = ("niah_multikey", "niah_multiquery", "vt")
REASONING = "ledger"
ANSWER = 400  # tokens of the long answer


@dataclasses.dataclass(frozen=True, kw_only=True)
class Answer:
    """What one cache made of one sample.

    Attributes:
      sample: the question.
      text: the answer.
      right: whether all of it is right.
      score: fraction of wanted strings found, or of lines right.
      stats: what it cost.
    """

    sample: Sample
    text: str
    right: bool
    score: float
    stats: Stats


def demo(
    model: flags.Model = NEEDLE,
    length: Annotated[
        int, typer.Option(min=256, help="Tokens of the documents.")
    ] = 4000,
    budget: Annotated[
        int | None, typer.Option(min=8, help="Of the small cache; default: an eighth.")
    ] = None,
    seed: flags.Seed = 0,
    picture: Annotated[
        Path | None,
        typer.Option(help="Draw what the small cache keeps of the first document."),
    ] = None,
    dtype: flags.Dtype = None,
    follow_links: flags.FollowLinks = False,
    mesh: flags.Mesh = None,
) -> None:
    """Ask about long documents, with the full cache and with a small one."""
    if picture is not None:
        check_picture(picture)
    lm = flags.load_model(model, dtype, follow_links=follow_links, mesh=mesh)
    run(lm, length=length, budget=budget or length // 8, seed=seed, picture=picture)


def run(
    lm: LanguageModel, *, length: int, budget: int, seed: int, picture: Path | None
) -> None:
    """Answer every question with the full cache and with a small one; print a table.

    Args:
      lm: the model.
      length: tokens of the documents.
      budget: tokens that the small cache keeps.
      seed: of the documents.
      picture: file that shows which tokens those are; None draws nothing.
    """
    if lm.tokenizer is None:
        raise ValueError(f"{lm.name} has no tokenizer; the demo's documents are text.")
    StreamingLLM().check(budget)

    begin = time.perf_counter()
    console = rich.console.Console()
    if not console.is_terminal:
        console.width = 110  # a log is wider than the 80 that rich assumes
    cells = [Cell(task=name, length=length) for name in RETRIEVAL]
    cells.append(Cell(task=REASONING, length=min(ANSWER, length // 4)))
    count = counter(lm.tokenizer)
    samples = [draw_sample(cell, count, seed=seed, index=0) for cell in cells]
    console.print(
        f"{len(RETRIEVAL)} questions about facts hidden in documents of {length} "
        "tokens, and one calculation of many steps; each with the full cache, and with "
        f"sinks + recent tokens ({budget} in all)."
    )
    small = {"budget": budget, "prefill": StreamingLLM(), "decode": StreamingLLM()}
    answers: list[tuple[Answer, Answer]] = []
    with progress() as bar:
        task = bar.add_task("answers", total=2 * len(RETRIEVAL))
        for sample in samples[:-1]:
            full = _answer(lm, sample)
            bar.advance(task)
            answers.append((full, _answer(lm, sample, **small)))
            bar.advance(task)
    console.print(f"\n{question(samples[-1])}\n", style="bold", markup=False)
    full = _stream(lm, samples[-1], console)
    answers.append((full, _answer(lm, samples[-1], **small)))
    console.print(table(answers, budget))
    announce(lm, (answer.stats for pair in answers for answer in pair))
    counts = [sum(pair[i].right for pair in answers) for i in (0, 1)]
    sizes = [
        megabytes(max(pair[i].stats.cache_bytes for pair in answers)) for i in (0, 1)
    ]
    console.print(
        f"Full cache: {counts[0]} of {len(answers)} right in up to {sizes[0]}; sinks + "
        f"recent: {counts[1]} of {len(answers)} in {sizes[1]}; "
        f"{time.perf_counter() - begin:.0f} s in all.",
        soft_wrap=True,
        highlight=False,
    )
    if picture is not None:
        figures.write(draw(lm, samples[0], budget), picture)
        said = f"{picture}: what is kept of the first document in {budget} tokens"
        console.print(said, soft_wrap=True, highlight=False, markup=False)


def draw(lm: LanguageModel, sample: Sample, budget: int) -> Any:
    """Return a picture of what the small cache keeps, and where the answer stands.

    Args:
      lm: the model.
      sample: a question about a document.
      budget: tokens that are kept.
    """
    (ids,) = encode(lm, [sample.prompt])
    _, cache = bounded_jit(
        implied=("params",), static_argnames=("network", "options", "slots")
    )(prefill)(
        *(lm.network, lm.params, jnp.asarray([ids], jnp.int32)),
        jnp.asarray([len(ids)], jnp.int32),
        options=Options(budget=budget, prefill=StreamingLLM()),
        slots=budget,
    )
    count = counter(lm.tokenizer)
    spans = {}
    for wanted in sample.outputs:
        first = len(ids) - count(sample.prompt[sample.prompt.index(wanted) :])
        spans[wanted] = (first, first + count(wanted))
    kept = plot.kept(cache, length=len(ids))
    return plot.survival(
        {"sinks + recent": kept}, spans=spans, title=_short(question(sample), 80)
    )


def question(sample: Sample) -> str:
    """Return what is asked, without the document and the answer's beginning."""
    if sample.task == REASONING:
        return sample.prompt.rsplit("\n\n", 1)[1].rsplit("\n", 1)[0]
    return re.split(r"(?<=[?.]) ", sample.prompt.rsplit("\n", 1)[1], maxsplit=1)[0]


def table(answers: list[tuple[Answer, Answer]], budget: int) -> rich.table.Table:
    """Return pairs of answers, by the full cache and by the small one, as a table."""
    result = rich.table.Table(
        *("question", "expected", "cache", "got"),
        *right_aligned("right", "bytes", "tokens/s"),
        box=rich.box.SIMPLE,
        padding=(0, 1, 0, 0),
        caption=f"small: sinks + recent tokens, {budget} in all",
    )
    for pair in answers:
        sample = pair[0].sample
        shown = [_short(question(sample), 64), _expected(sample)]
        for name, answer in zip(("full", "small"), pair, strict=True):
            result.add_row(
                *map(Text, shown),
                name,
                Text(_got(answer)),
                "[green]yes[/]" if answer.right else "[red]no[/]",
                megabytes(answer.stats.cache_bytes),
                f"{answer.stats.tokens_per_second:.0f}",
                end_section=name == "small",
            )
            shown = ["", ""]
    return result


def _answer(lm: LanguageModel, sample: Sample, **arguments) -> Answer:
    out = generate(
        lm, [sample.prompt], max_new_tokens=sample.max_new_tokens, **arguments
    )
    by_lines = sample.task == REASONING
    right, score = judge(sample, out.text[0], by_lines=by_lines)
    return Answer(
        sample=sample, text=out.text[0], right=right, score=score, stats=out.stats
    )


def _stream(lm: LanguageModel, sample: Sample, console: rich.console.Console) -> Answer:
    """Answer with the full cache, and show the text as it comes."""

    def write(text: str) -> None:
        console.print(Text(text, style="dim"), end="", soft_wrap=True)

    stream = TextStream(lm.tokenizer, write)
    answer = _answer(lm, sample, on_tokens=stream, block=16)
    stream.finish(answer.text)
    console.print("\n")
    return answer


def _lines(sample: Sample) -> list[str]:
    return sample.answer.strip().split("\n")


def _expected(sample: Sample) -> str:
    if sample.task == REASONING:
        lines = _lines(sample)
        return f"{len(lines)} lines, {lines[-1]}"
    return ", ".join(sample.outputs)


def _got(answer: Answer) -> str:
    if answer.sample.task == REASONING:
        lines = len(_lines(answer.sample))
        return f"{round(answer.score * lines)} of {lines} lines right"
    return _short(answer.text, 48)


def _short(text: str, width: int) -> str:
    return textwrap.shorten(text, width, placeholder=" …")
