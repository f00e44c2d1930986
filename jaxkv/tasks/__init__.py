"""The synthetic tasks by name: `make` draws a sample, the scorers judge an answer."""

from collections.abc import Callable

import numpy as np

from jaxkv.tasks import quoting, reasoning, retrieval
from jaxkv.tasks.lexicon import Split
from jaxkv.tasks.samples import CountTokens, Sample, exact, score_all, wilson

__all__ = ["TASKS", "CountTokens", "Sample", "exact", "make", "score_all", "wilson"]

TASKS: dict[str, Callable[..., Sample]] = {
    "niah_single_1": retrieval.niah_single_1,
    "niah_single_words": retrieval.niah_single_words,
    "niah_single_uuid": retrieval.niah_single_uuid,
    "niah_multikey": retrieval.niah_multikey,
    "niah_multikey_needles": retrieval.niah_multikey_needles,
    "niah_multikey_uuid": retrieval.niah_multikey_uuid,
    "niah_multivalue": retrieval.niah_multivalue,
    "niah_multiquery": retrieval.niah_multiquery,
    "vt": retrieval.vt,
    "ledger": reasoning.ledger,
    "machine": reasoning.machine,
    "quote": quoting.quote,
    "continue": quoting.go_on,
    "edit": quoting.edit,
}


def make(
    task: str,
    rng: np.random.Generator,
    *,
    length: int,
    count_tokens: CountTokens,
    split: Split = "eval",
    **options,
) -> Sample:
    """Draw one sample of a task.

    Args:
      task: A key of `TASKS`.
      rng: Source of randomness; equal state gives an equal sample.
      length: Largest number of tokens of all segments together, without special
        tokens. Tasks with a haystack come within one sentence of it.
      count_tokens: Number of tokens of a text, without special tokens. Counts are
        summed over pieces that start at a space or a line break.
      split: "train" or "eval"; they share no key.
      **options: Options of the task itself, such as `questions`.
    """
    if task not in TASKS:
        raise ValueError(f"Expected a task among {sorted(TASKS)}, got {task!r}.")
    if split not in ("train", "eval"):
        raise ValueError(f'Expected split "train" or "eval", got {split!r}.')
    return TASKS[task](
        rng, length=length, count_tokens=count_tokens, split=split, **options
    )
