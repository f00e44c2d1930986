"""`jaxkv generate`: runs prompts batch by batch, prints text or JSON as they end."""

import dataclasses
import json
import sys
from collections.abc import Sequence
from typing import Any

from jaxkv.bench.matcher import time_matcher
from jaxkv.cli.terminal import TextStream, announce, progress
from jaxkv.inference import Completion, generate
from jaxkv.language_model import LanguageModel
from jaxkv.options import described
from jaxkv.planning import bucket
from jaxkv.provenance import provenance

_BLOCK = 16  # tokens between two pieces of streamed text


def run(
    lm: LanguageModel,
    ids: Sequence[Sequence[int]],
    *,
    batch_size: int,
    seed: int,
    as_json: bool,
    stream: bool | None,
    **arguments: Any,
) -> None:
    """Generate from all prompts; results on stdout, a bar and one line on stderr.

    Args:
      lm: the model.
      ids: token ids of each prompt.
      batch_size: prompts generated from together.
      seed: prompt `i` draws with `seed + i`, so its output depends on no batch size,
        and it can be had again alone.
      as_json: print one object per prompt.
      stream: show text as it comes; None does so for one prompt on a terminal.
      **arguments: of `jaxkv.generate`.

    Raises:
      ValueError: there is nothing that could be streamed.
    """
    if stream is None:
        readable = lm.tokenizer is not None and sys.stdout.isatty()
        stream = len(ids) == 1 and not as_json and readable
    if stream and lm.tokenizer is None:
        raise ValueError(f"--stream: {lm.name} has no tokenizer.")
    shared = _shared(lm, arguments) if as_json else {}
    stats = []
    with progress(hidden=stream) as bar:  # bar and stream would share the terminal
        task = bar.add_task("prompts", total=len(ids))
        for first in range(0, len(ids), batch_size):
            batch = ids[first : first + batch_size]
            seeds = range(seed + first, seed + first + len(batch))
            text = TextStream(lm.tokenizer, _write) if stream else None
            out = generate(
                lm, batch, seed=seeds, on_tokens=text, block=_BLOCK, **arguments
            )
            stats.append(out.stats)
            if text:
                text.finish(out.text[0])
                _write("\n")
            elif as_json:
                drafts = _drafts(out, arguments)
                for row, row_seed in enumerate(seeds):
                    record = _record(out, row) | drafts | {"seed": row_seed} | shared
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


def _shared(lm: LanguageModel, arguments: dict[str, Any]) -> dict[str, Any]:
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


def _drafts(out: Completion, arguments: dict[str, Any]) -> dict[str, Any]:
    """Return what JSON says of a batch's drafts; the matcher is timed by itself."""
    if out.stats.drafts is None:
        return {"drafts": None}
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
