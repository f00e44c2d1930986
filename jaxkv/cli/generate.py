"""`jaxkv generate`: runs prompts batch by batch, prints text or JSON as they end."""

import dataclasses
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from jaxkv import inference, registry
from jaxkv.cli import flags, prompts
from jaxkv.cli.groups import grouped
from jaxkv.cli.terminal import announce, progress
from jaxkv.inference import Completion
from jaxkv.language_model import NEEDLE, LanguageModel
from jaxkv.options import described
from jaxkv.planning import bucket
from jaxkv.provenance import provenance
from jaxkv.sampling import Categorical, Greedy, Sampler
from jaxkv.soundness import LogitsError
from jaxkv.speculation.rules import Exact
from jaxkv.terminal import TextStream

_BLOCK = 16  # tokens between two pieces of streamed text


@dataclasses.dataclass(frozen=True, kw_only=True)
class Speculation:
    """How tokens are drafted, and which drafts pass."""

    speculate: Annotated[
        str,
        typer.Option(
            help=f"Drafts: none, {', '.join(registry.SPECULATE)}; options likewise."
        ),
    ] = "none"
    accept: Annotated[
        str,
        typer.Option(
            help=f"Which drafts pass: {', '.join(registry.ACCEPT)}; "
            "all but exact are lossy."
        ),
    ] = "exact"

    @property
    def arguments(self) -> dict[str, Any]:
        """Arguments of `jaxkv.generate`.

        Raises:
          ValueError: unknown names or options, or a rule that has nothing to accept.
        """
        if self.speculate == "none":
            drafter = None
        elif self.speculate.partition(":")[0] in registry.SPECULATE:
            drafter = registry.parse(
                self.speculate, registry.SPECULATE, flag="--speculate"
            )
        else:
            raise ValueError(
                f"--speculate: unknown {self.speculate!r}; choose one of none, "
                f"{', '.join(registry.SPECULATE)}."
            )
        rule = registry.parse(self.accept, registry.ACCEPT, flag="--accept")
        if drafter is None and rule != Exact():
            raise ValueError(
                f"--accept {self.accept} does nothing without drafts; add --speculate "
                f"{' or '.join(registry.SPECULATE)}."
            )
        return {"speculate": drafter, "accept": rule}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampling:
    """How a token is chosen."""

    temperature: Annotated[float, typer.Option(help="0 takes the likeliest token.")] = (
        0.0
    )
    top_k: Annotated[int | None, typer.Option(help="Draw from this many; 0: all.")] = (
        None
    )
    top_p: Annotated[
        float | None, typer.Option(help="Draw from this probability mass.")
    ] = None
    min_p: Annotated[
        float | None,
        typer.Option(help="Least probability, relative to the likeliest token's."),
    ] = None
    repetition_penalty: Annotated[
        float, typer.Option(help="Makes tokens seen before less likely; 1 is off.")
    ] = 1.0

    @property
    def sampler(self) -> Sampler:
        """The sampler of the flags.

        Raises:
          ValueError: a value would have no effect.
        """
        values = {n: x for n, x in dataclasses.asdict(self).items() if x is not None}
        if self.temperature != 0:
            return Categorical(**values)
        cuts = [name for name in ("top_k", "top_p", "min_p") if name in values]
        if cuts:
            raise ValueError(
                f"--{cuts[0].replace('_', '-')} does nothing at temperature 0, which "
                "is greedy; add --temperature."
            )
        return Greedy(repetition_penalty=self.repetition_penalty)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Job:
    """What is done with all prompts.

    Attributes:
      arguments: of `jaxkv.generate`.
      batch_size: prompts generated from together.
      seed: prompt `i` draws with `seed + i`, so its output depends on no batch size,
        and it can be had again alone.
      as_json: print one object per prompt.
      stream: show text as it comes; None does so for one prompt on a terminal.
    """

    arguments: Mapping[str, Any]
    batch_size: int
    seed: int
    as_json: bool
    stream: bool | None


@grouped
def generate(
    *,
    model: flags.Model = NEEDLE,
    prompt: Annotated[
        list[str] | None, typer.Option(help="A prompt; may be repeated.")
    ] = None,
    prompt_file: Annotated[
        list[Path] | None,
        typer.Option(
            help="A file that is one prompt, or a .jsonl file with one per line; may "
            "be repeated. Without any prompt, standard input is read."
        ),
    ] = None,
    chat: Annotated[
        bool, typer.Option("--chat", help="Wrap prompts in a chat template.")
    ] = False,
    max_new_tokens: Annotated[
        int, typer.Option(min=1, help="Longest output, in tokens.")
    ] = 64,
    eviction: flags.Eviction,
    speculation: Speculation,
    sampling: Sampling,
    seed: flags.Seed = 0,
    stop_id: Annotated[
        list[int] | None,
        typer.Option(
            min=0,
            max=2**31 - 1,
            help="Token id that ends an output; may be repeated; default: the model's.",
        ),
    ] = None,
    dtype: flags.Dtype = None,
    batch_size: flags.BatchSize = 8,
    kernels: flags.Kernels,
    json_: flags.Json = False,
    stream: Annotated[
        bool | None,
        typer.Option(help="Show text as it comes; default: one prompt, on a terminal."),
    ] = None,
) -> None:
    """Continue prompts; prompt number i draws with seed + i, whatever the batch."""
    arguments = {
        "max_new_tokens": max_new_tokens,
        "sampler": sampling.sampler,
        "stop_ids": stop_id or None,
        **kernels.arguments,
        **eviction.arguments,
        **speculation.arguments,
    }
    flags.check(arguments)
    records = prompts.read(prompt or [], prompt_file or [])
    if stream and (json_ or len(records) > 1):
        raise ValueError("--stream takes one prompt and no --json.")
    lm = flags.load_model(model, dtype)
    # All at once, so that a bad prompt is found before a good one has cost anything.
    ids = prompts.encode(lm, records, chat=chat)
    job = Job(
        arguments=arguments,
        batch_size=batch_size,
        seed=seed,
        as_json=json_,
        stream=stream,
    )
    run(lm, ids, job)


def run(lm: LanguageModel, ids: Sequence[Sequence[int]], job: Job) -> None:
    """Generate from all prompts; results on stdout, a bar and one line on stderr.

    Args:
      lm: the model.
      ids: token ids of each prompt.
      job: what is done with them.

    Raises:
      ValueError: there is nothing that could be streamed.
    """
    stream = job.stream
    if stream is None:
        readable = lm.tokenizer is not None and sys.stdout.isatty()
        stream = len(ids) == 1 and not job.as_json and readable
    if stream and lm.tokenizer is None:
        raise ValueError(f"--stream: {lm.name} has no tokenizer.")
    shared = _shared(lm, job.arguments) if job.as_json else {}
    stats = []
    with progress(hidden=stream) as bar:  # bar and stream would share the terminal
        task = bar.add_task("prompts", total=len(ids))
        for first in range(0, len(ids), job.batch_size):
            batch = ids[first : first + job.batch_size]
            seeds = range(job.seed + first, job.seed + first + len(batch))
            text = TextStream(lm.tokenizer, _write) if stream else None
            try:
                out = inference.generate(
                    lm,
                    batch,
                    seed=seeds,
                    on_tokens=text,
                    block=_BLOCK,
                    **job.arguments,
                )
            except LogitsError as error:
                raise error.of_prompts(first) from None
            stats.append(out.stats)
            if text:
                text.finish((out.text or ("",))[0])
                _write("\n")
            elif job.as_json:
                drafts = _drafts(out, job.arguments)
                for row, seed in enumerate(seeds):
                    record = _record(out, row) | drafts | {"seed": seed} | shared
                    _write(json.dumps(record, allow_nan=False) + "\n")
            else:
                _write("" if first == 0 else "\n")
                _write("\n".join(line + "\n" for line in _texts(out)))
            bar.advance(task, len(batch))
    announce(lm, stats)


def _write(text: str) -> None:
    print(text, end="", flush=True)


def _texts(out: Completion) -> Sequence[str]:
    """Return the texts, or token ids where there is no tokenizer."""
    return out.text or [" ".join(map(str, row)) for row in out.tokens]


def _shared(lm: LanguageModel, arguments: Mapping[str, Any]) -> dict[str, Any]:
    origin = provenance()
    return {
        "model": lm.name,
        "dtype": lm.dtype.name,
        "options": described(arguments),
        "device": origin["device"],
        "versions": origin["versions"],
    }


def _record(out: Completion, row: int) -> dict[str, Any]:
    """Return what JSON says of one prompt; timings are those of its whole batch."""
    stats = out.stats
    return {
        "text": None if out.text is None else out.text[row],
        "token_ids": out.tokens[row],
        "prompt_tokens": stats.prompt_tokens[row],
        "finish_reason": out.finish_reason[row],
        "cache_bytes": stats.cache_bytes // len(out.tokens),
        "timing": {
            "compile_s": stats.compile_seconds,
            "prefill_s": stats.prefill_seconds,
            "decode_s": stats.decode_seconds,
            "tokens_per_s": stats.tokens_per_second,
        },
        "batch_size": len(out.tokens),
        "prefill_implementation": stats.prefill_implementation,
        "decode_implementation": stats.decode_implementation,
    }


def _drafts(out: Completion, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Return what JSON says of a batch's drafts; the matcher is timed by itself."""
    if out.stats.drafts is None:
        return {"drafts": None}
    # It measures, and is needed for this one number.
    from jaxkv.bench.matcher import time_matcher

    prompt, new = max(out.stats.prompt_tokens), arguments["max_new_tokens"]
    matcher_ms = time_matcher(
        arguments["speculate"],
        batch=len(out.tokens),
        width=bucket(prompt) + bucket(new),
        repeats=3,
        rounds=16,
    )
    told = dataclasses.asdict(out.stats.drafts) | {"matcher_ms": matcher_ms}
    return {"drafts": told}
