"""Runs prompts batch by batch, and prints text or JSON as they end."""

import dataclasses
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from jaxkv.cli import prompts
from jaxkv.cli.prompts import Asked
from jaxkv.cli.terminal import announce, progress
from jaxkv.contexts.context import Context
from jaxkv.language_model import LanguageModel
from jaxkv.options import described
from jaxkv.provenance import provenance
from jaxkv.soundness import LogitsError
from jaxkv.text import inference
from jaxkv.text.completion import Completion, Stats
from jaxkv.text.planning import bucket
from jaxkv.text.terminal import TextStream

_BLOCK = 16  # tokens between two pieces of streamed text


@dataclasses.dataclass(frozen=True, kw_only=True)
class Job:
    """What is done with all prompts.

    Attributes:
      arguments: of `jaxkv.generate`.
      context: of one document that all prompts are about, or None.
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
    context: Context | None = None


def run(lm: LanguageModel, asked: Sequence[Asked], job: Job) -> None:
    """Generate from all prompts; results on stdout, a bar and one line on stderr.

    The turns of a conversation come one after the other, with those of its batch. A
    prompt that fails is left out, and told of when all others have been answered.

    Args:
      lm: the model.
      asked: the prompts.
      job: what is done with them.

    Raises:
      ValueError: there is nothing that could be streamed, the logits behind a prompt
        are no numbers, or a later turn of a conversation does not fit the model.
    """
    stream = job.stream
    if stream is None:
        readable = lm.tokenizer is not None and sys.stdout.isatty()
        stream = len(asked) == 1 and not job.as_json and readable
    if stream and lm.tokenizer is None:
        raise ValueError(f"--stream: {lm.name} has no tokenizer.")
    shared = _shared(lm, job.arguments) if job.as_json else {}
    if job.context is not None:
        shared["context"] = repr(job.context)
    stats: list[Stats] = []
    failures: list[ValueError] = []
    with progress(hidden=stream) as bar:  # bar and stream would share the terminal
        task = bar.add_task("prompts", total=len(asked))
        for first in range(0, len(asked), job.batch_size):
            batch = list(asked[first : first + job.batch_size])
            advance = len(batch)
            while batch:
                between = "\n" if stats else ""
                if stream:
                    _write(between)
                batch, out = _answer(lm, batch, job, failures, stream=stream)
                if out is None:
                    break
                stats.append(out.stats)
                if job.as_json:
                    for record in _records(out, batch, job):
                        _write(json.dumps(record | shared, allow_nan=False) + "\n")
                elif not stream:
                    texts = "\n".join(text + "\n" for text in _texts(out))
                    _write(between + texts)
                batch = prompts.next_turns(
                    lm, batch, out.decoded, job.arguments, failures
                )
            bar.advance(task, advance)
            if failures and not stats:
                break  # the network, and not this prompt
    if stats:
        announce(lm, stats)
    _report(failures)


def _report(failures: Sequence[ValueError]) -> None:
    """Raise ValueError where a prompt has failed."""
    if len(failures) > 1:
        raise ValueError(f"{failures[0]} {len(failures) - 1} more failed.")
    if failures:
        raise failures[0]


def _answer(
    lm: LanguageModel,
    batch: list[Asked],
    job: Job,
    failures: list[ValueError],
    *,
    stream: bool,
) -> tuple[list[Asked], Completion | None]:
    """Generate from a batch, and write its only row's text where it is streamed.

    Args:
      lm: the model.
      batch: what is asked.
      job: what is done with it.
      failures: takes what is said of rows whose logits are no numbers.
      stream: write the text as it comes.

    Returns:
      The rows that were answered, and their answers; None where there is no such row.
    """
    text = TextStream(lm.tokenizer, _write) if stream else None
    try:
        out = inference.generate(
            lm,
            [asked.ids for asked in batch],
            seed=[job.seed + asked.number for asked in batch],
            context=job.context,
            on_tokens=text,
            block=_BLOCK,
            **job.arguments,
        )
    except LogitsError as error:
        failures.append(error.of_prompts([asked.number for asked in batch]))
        others = [asked for row, asked in enumerate(batch) if row not in error.tokens]
        if not others:
            return [], None
        return _answer(lm, others, job, failures, stream=stream)
    if text:
        text.finish(out.text[0])
        _write("\n")
    return batch, out


def _records(
    out: Completion, batch: Sequence[Asked], job: Job
) -> Iterator[dict[str, Any]]:
    """Yield what JSON says of each prompt of a batch."""
    drafts = _drafts(out, job.arguments)
    for row, asked in enumerate(batch):
        turn = {"prompt": asked.number, "turn": asked.turn} if asked.turns > 1 else {}
        yield _record(out, row) | drafts | {"seed": job.seed + asked.number} | turn


def _write(text: str) -> None:
    print(text, end="", flush=True)


def _texts(out: Completion) -> Sequence[str]:
    """Return the texts, or token ids where there is no tokenizer."""
    return out.decoded or [" ".join(map(str, row)) for row in out.tokens]


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
        "text": None if out.decoded is None else out.decoded[row],
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
