"""The one record every task returns, and how it is put together and scored."""

import dataclasses
import math
from collections.abc import Callable, Sequence

CountTokens = Callable[[str], int]
"""Number of tokens of a text, without special tokens."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Exchange:
    """One question and its gold answer.

    Attributes:
      question: Text up to the place where the model goes on; ends in no white space.
      answer: Gold continuation; starts with a space or a line break, so that
        tokenising it apart from the question gives the same tokens.
      outputs: Strings a right answer has to contain.
    """

    question: str
    answer: str
    outputs: tuple[str, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sample:
    """A prompt with its gold answer.

    Attributes:
      task: Name of the task.
      segments: (text, is_answer) pieces in order. One question has two pieces, the
        prompt and the answer; with more questions the pieces alternate and the end
        of sequence follows every answer.
      outputs: Strings a right answer to the last question has to contain.
      max_new_tokens: Enough tokens for the last answer and the end of sequence.
      question: What asks, at the end of the prompt; "" where nothing tells it from what
        it is about.
      answer_prefix: What stands behind the question, and begins the answer. In a chat
        it begins the assistant's turn.
    """

    task: str
    segments: tuple[tuple[str, bool], ...]
    outputs: tuple[str, ...]
    max_new_tokens: int
    question: str = dataclasses.field(default="", repr=False)  # a part of the prompt
    answer_prefix: str = dataclasses.field(default="", repr=False)  # likewise

    @property
    def prompt(self) -> str:
        """All text before the last answer."""
        return "".join(text for text, _ in self.segments[:-1])

    @property
    def answer(self) -> str:
        """The gold continuation of `prompt`."""
        return self.segments[-1][0]


def assemble(
    task: str, context: str, exchanges: Sequence[Exchange], count_tokens: CountTokens
) -> Sample:
    """Put the questions behind the context."""
    segments: list[tuple[str, bool]] = []
    for exchange in exchanges:
        segments += [(exchange.question, False), (exchange.answer, True)]
    segments[0] = (context + segments[0][0], False)
    return Sample(
        task=task,
        segments=tuple(segments),
        outputs=exchanges[-1].outputs,
        # Eight to spare: the end of sequence, and a wrong answer somewhat longer
        # than the right one must not look right because it was cut.
        max_new_tokens=count_tokens(exchanges[-1].answer) + 8,
        question=exchanges[-1].question,
    )


def too_short(task: str, length: int, least: int) -> ValueError:
    """Return the error for a `length` the smallest sample does not fit in."""
    return ValueError(
        f"Task {task!r} expected length >= {least} tokens for its smallest sample, "
        f"got {length}. Ask for a longer sample or fewer questions."
    )


def score_all(prediction: str, outputs: Sequence[str]) -> float:
    """Return the fraction of `outputs` found in the prediction, ignoring case."""
    text = prediction.lower()
    return sum(output.lower() in text for output in outputs) / len(outputs)


def exact(prediction: str, outputs: Sequence[str]) -> bool:
    """Return whether the prediction contains all of `outputs`, ignoring case."""
    return score_all(prediction, outputs) == 1.0


def wilson(successes: float, n: int) -> tuple[float, float]:
    """Return Wilson's 95 % interval in [0, 1], with the proportion in it."""
    if n <= 0:
        raise ValueError(f"Expected n >= 1 trials for an interval, got n={n}.")
    z = 1.959963984540054
    p = successes / n
    scale = 1 + z * z / n
    middle = (p + z * z / (2 * n)) / scale
    half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n)) / scale
    # Rounded, an end that is 0 or 1 may lie on the wrong side of the proportion.
    return max(0.0, min(p, middle - half)), min(1.0, max(p, middle + half))
