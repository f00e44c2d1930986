"""How often a model's answers are right: `jaxkv eval`, and the checkpoint's card.

Samples come from seeds and key vocabularies that training never saw. A prompt ends
where the answer begins, generation is greedy, and retrieval is scored as RULER scores
it (every wanted string must occur in the output); long answers must be right line by
line, quotations word for word.
"""

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from jaxkv import tasks
from jaxkv.inference import Stats, generate
from jaxkv.language_model import LanguageModel
from jaxkv.tasks import reasoning

RETRIEVAL = (
    "niah_single_1",
    "niah_single_words",
    "niah_single_uuid",
    "niah_multikey",
    "niah_multikey_needles",
    "niah_multikey_uuid",
    "niah_multivalue",
    "niah_multiquery",
    "vt",
)
REASONING = ("ledger", "machine")
QUOTING = ("quote", "continue", "edit")

# Development looks at one seed, reports at another; training uses neither, and its
# keys are of another vocabulary besides.
DEVELOPMENT_SEED = 1_000_003
REPORT_SEED = 2_000_003


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cell:
    """One task at one length.

    Attributes:
      task: a name of `tasks.TASKS`.
      length: tokens of prompt and answer together; of the answer alone for the
        reasoning tasks.
      depth: where the needle stands, from 0 (the text's beginning) to 1, for tasks
        with one needle; None draws it.
    """

    task: str
    length: int
    depth: float | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Prediction:
    """One sample and what the model made of it.

    Attributes:
      cell: what was asked.
      index: number of the sample within the cell.
      right: whether the whole answer is right.
      score: fraction of wanted strings found, or of lines right.
      prompt_tokens: length of the prompt.
      output_tokens: length of the output, the stop id included.
      truncated: whether the output was cut at the limit.
      outputs: what was wanted.
      prediction: what came.
      stats: what the batch cost that it was generated in.
    """

    cell: Cell
    index: int
    right: bool
    score: float
    prompt_tokens: int
    output_tokens: int
    truncated: bool
    outputs: tuple[str, ...]
    prediction: str
    stats: Stats


def default_cells(lengths: Sequence[int], answers: Sequence[int]) -> list[Cell]:
    """Return the cells of the card: retrieval and quoting by length, long answers."""
    return [
        *(Cell(task=t, length=n) for n in lengths for t in RETRIEVAL + QUOTING),
        *(Cell(task=t, length=n) for n in answers for t in REASONING),
    ]


def draw(
    cell: Cell, count_tokens: Callable[[str], int], *, seed: int, index: int
) -> tasks.Sample:
    """Return sample `index` of a cell; it depends on nothing but the arguments.

    Cells that differ in depth only have the same needle and the same noise.
    """
    number = list(tasks.TASKS).index(cell.task)
    rng = np.random.default_rng([seed, number, cell.length, index])
    if cell.task in REASONING:
        make = tasks.TASKS[cell.task]
        return make(
            rng,
            answer_tokens=cell.length,
            count_tokens=count_tokens,
            split="eval",
        )
    place = {} if cell.depth is None else {"depth": cell.depth}
    return tasks.make(
        cell.task,
        rng,
        length=cell.length,
        count_tokens=count_tokens,
        split="eval",
        **place,
    )


def counter(tokenizer: Any) -> Callable[[str], int]:
    """Return a function that counts a text's tokens, without special tokens."""
    # Samples are counted piece by piece; transformers' own call costs ten times more.
    fast = getattr(tokenizer, "backend_tokenizer", None)
    if fast is not None:
        return lambda text: len(fast.encode(text, add_special_tokens=False))
    return lambda text: len(tokenizer(text, add_special_tokens=False)["input_ids"])


def evaluate(
    lm: LanguageModel,
    cells: Iterable[Cell],
    *,
    samples: int,
    batch_size: int,
    seed: int = REPORT_SEED,
    **options: Any,
) -> Iterator[Prediction]:
    """Yield a prediction per sample, cell by cell.

    Args:
      lm: a model with a tokenizer.
      cells: what to ask.
      samples: per cell.
      batch_size: prompts generated from together.
      seed: of the samples.
      **options: of `jaxkv.generate`, e.g. budget and policies.
    """
    count_tokens = counter(lm.tokenizer)
    for cell in cells:
        for indices in _batches(range(samples), batch_size):
            drawn = [
                draw(cell, count_tokens, seed=seed, index=index) for index in indices
            ]
            out = generate(
                lm,
                [sample.prompt for sample in drawn],
                max_new_tokens=max(sample.max_new_tokens for sample in drawn),
                **options,
            )
            for row, (index, sample) in enumerate(zip(indices, drawn, strict=True)):
                right, score = judge(sample, out.text[row])
                yield Prediction(
                    cell=cell,
                    index=index,
                    right=right,
                    score=score,
                    prompt_tokens=out.stats.prompt_tokens[row],
                    output_tokens=out.lengths[row],
                    truncated=out.finish_reason[row] == "length",
                    outputs=sample.outputs,
                    prediction=out.text[row],
                    stats=out.stats,
                )


def _batches(indices: range, size: int) -> Iterator[range]:
    return (indices[i : i + size] for i in range(0, len(indices), size))


def judge(sample: tasks.Sample, prediction: str) -> tuple[bool, float]:
    """Return whether an output is right as a whole, and its partial score in [0, 1]."""
    if sample.task in REASONING:
        return reasoning.check(sample, prediction)
    score = tasks.score_all(prediction, sample.outputs)
    return score == 1, score


def summarize(predictions: Sequence[Prediction]) -> list[dict[str, Any]]:
    """Return a row per cell: accuracy with its 95 % Wilson interval, and lengths."""
    groups: dict[Cell, list[Prediction]] = {}
    for prediction in predictions:
        groups.setdefault(prediction.cell, []).append(prediction)
    rows = []
    for cell, group in groups.items():
        right = sum(p.right for p in group)
        low, high = tasks.wilson(right, len(group))
        rows.append(
            {
                "task": cell.task,
                "length": cell.length,
                "samples": len(group),
                "accuracy": right / len(group),
                "low": low,
                "high": high,
                "score": float(np.mean([p.score for p in group])),
                "prompt_tokens": float(np.mean([p.prompt_tokens for p in group])),
                "output_tokens": float(np.mean([p.output_tokens for p in group])),
                "truncated": float(np.mean([p.truncated for p in group])),
            }
        )
    return rows
