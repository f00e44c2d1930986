"""`jaxkv batch`: a file of prompts in, a file of answers out."""

import contextlib
import itertools
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

from jaxkv.cli import batch_ray, flags
from jaxkv.cli.batch_job import Answerer, Job
from jaxkv.cli.generate import Sampling, Speculation
from jaxkv.cli.groups import grouped
from jaxkv.cli.progress import shown
from jaxkv.cli.terminal import say
from jaxkv.evaluation.lock import one_writer
from jaxkv.serving.lines import (
    Journal,
    Pace,
    check_files,
    count_lines,
    journal,
    read_lines,
)


@grouped
def batch(
    *,
    source: Annotated[
        Path,
        typer.Argument(
            metavar="IN.jsonl",
            help="A prompt or a conversation per line, in the formats of jaxkv "
            "generate --prompt-file.",
        ),
    ],
    out: Annotated[
        Path, typer.Argument(metavar="OUT.jsonl", help="An answer per line.")
    ],
    model: flags.Asked = None,
    context: flags.ContextFolder = None,
    document: flags.Document = 0,
    chat: flags.Chat = False,
    system: flags.System = None,
    max_new_tokens: flags.MaxNewTokens = 64,
    max_prompt: Annotated[
        int | None,
        typer.Option(
            min=1, help="Longest prompt, in tokens; default: what fits, up to 4096."
        ),
    ] = None,
    eviction: flags.Eviction,
    speculation: Speculation,
    sampling: Sampling,
    seed: flags.Seed = 0,
    stop_id: flags.StopId = None,
    ordered: Annotated[
        bool,
        typer.Option(
            "--ordered", help="Write answers in the order of lines, not as they end."
        ),
    ] = False,
    ray: Annotated[
        str | None,
        typer.Option(
            metavar="ADDRESS",
            help="Share the lines out over a Ray cluster: an address of ray.init, such "
            "as auto, or local for one of this machine.",
        ),
    ] = None,
    ray_workers: Annotated[
        int | None,
        typer.Option(min=1, help="Engines there; default: one a GPU, or one."),
    ] = None,
    dtype: flags.Dtype = None,
    follow_links: flags.FollowLinks = False,
    mesh: flags.Mesh = None,
    batch_size: flags.BatchSize = 8,
    kernels: flags.Kernels,
) -> None:
    """Answer a file of any size; if it is stopped, the same command goes on."""
    if context is not None and (chat or system is not None):
        raise ValueError(
            "--chat and --system come before the document; pass them to jaxkv compress."
        )
    job = Job(
        model=model,
        context=None if context is None else context.resolve(),
        document=document,
        dtype=dtype,
        follow_links=follow_links,
        mesh=mesh,
        arguments={
            "max_new_tokens": max_new_tokens,
            "stop_ids": stop_id or None,
            **kernels.arguments,
            **eviction.arguments,
            **speculation.arguments,
        },
        sampling=sampling,
        rows=batch_size,
        max_prompt=max_prompt,
        seed=seed,
        chat=chat,
        system=system,
        name=str(source),
    )
    flags.check({**job.arguments, "sampler": sampling.sampler})
    if ray is None and ray_workers is not None:
        raise ValueError("--ray-workers does nothing without --ray.")
    if ray is not None and mesh is not None:
        raise ValueError(
            "--mesh spreads one engine over the devices of this machine, and --ray "
            "makes one for each GPU; pass one of them."
        )
    check_files(source, out)
    with contextlib.ExitStack() as stack:
        total = count_lines(source)
        stack.enter_context(one_writer(out.parent, name=out.name))
        settings = job.settings | {"--ordered": ordered}
        written = stack.enter_context(journal(out, source, settings))
        left = (line for line in read_lines(source) if line.number not in written.done)
        first = next(left, None)
        if first is not None and ray is not None:
            found = batch_ray.answers(
                *(job, source, written.done),
                address=ray,
                workers=ray_workers,
                ordered=ordered,
            )
            _answer(found, written, total)
        elif first is not None:
            lines = itertools.chain([first], left)
            _answer(Answerer(job).answers(lines, ordered=ordered), written, total)
        _report(source, out, written)


def _answer(
    found: Iterator[tuple[int, dict[str, Any]]], written: Journal, total: int
) -> None:
    """Write answers as they come, and show how far they are."""
    with shown("the model is loaded") as show:
        pace = Pace(total, len(written.done), time.monotonic)
        for number, answer in found:
            if "error" in answer:
                say(answer["error"])
            written.write(number, answer)
            pace.add(len(answer.get("token_ids", ())))
            show(pace.told(len(written.done)), len(written.done), total)


def _report(source: Path, out: Path, written: Journal) -> None:
    """Say that all is done.

    Raises:
      ValueError: lines have failed.
    """
    number, failed = len(written.done), written.failed
    if failed:
        raise ValueError(
            f"{failed} of {number} lines of {source} failed; {out} says of each why, "
            'under "error".'
        )
    say(f"{out}: {number} lines of {source} answered")
