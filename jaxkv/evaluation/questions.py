"""What an evaluation asks: samples drawn and tokenised once for all methods, or a file.

Samples come from seeds and key vocabularies that training never saw. A question holds
its prompt as an array of token ids, so that a hundred runs over it cost one
tokenisation. Retrieval is scored as RULER scores it (every wanted string must occur in
the output); long answers must be right line by line, quotations word for word.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, Literal

import numpy as np

from jaxkv.language_model import LanguageModel
from jaxkv.models.hf import tokenizer as hf_tokenizer
from jaxkv.tasks import TASKS, Sample, make, reasoning, score_all
from jaxkv.text.chat import encode_chats, encode_documents, encode_question
from jaxkv.text.prompts import encode

Match = Literal["all", "any"]
Protocol = Literal["query-aware", "query-agnostic"]
AWARE: Protocol = "query-aware"  # the question is a part of the prompt that is cut
AGNOSTIC: Protocol = "query-agnostic"  # it comes behind a document that has been cut

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

OUTPUT = 128  # tokens of the longest output where nothing says it

# Development looks at one seed, reports at another; training uses neither, and its
# keys are of another vocabulary besides.
DEVELOPMENT_SEED = 1_000_003
REPORT_SEED = 2_000_003

CHAT_WORDS = 32  # tokens that an answer in a conversation may begin with

# Texts that a tokenizer reads in one call, on all cores; until it ends they take some
# hundred bytes a token.
_TOGETHER = 128


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


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Question:
    """A sample, ready for a model.

    Attributes:
      cell: the task and length that it belongs to.
      index: its number within the cell.
      ids: int32 `[P]`, the prompt; `[0]` of one that is not tokenised yet.
      sample: the text it was made of, and what is wanted.
      answer_tokens: of the gold answer; 0 where none is known.
      by_lines: whether the answer must be right line by line, instead of containing
        what is wanted.
      document: tokens of the prompt that the question is about, at its beginning; 0
        where the two are one.
    """

    cell: Cell
    index: int
    ids: np.ndarray
    sample: Sample
    answer_tokens: int
    by_lines: bool
    document: int = 0


def draw_sample(
    cell: Cell, count_tokens: Callable[[str], int], *, seed: int, index: int
) -> Sample:
    """Return sample `index` of a cell; it depends on nothing but the arguments.

    Cells that differ in depth only have the same needle and the same noise.
    """
    number = list(TASKS).index(cell.task)
    rng = np.random.default_rng([seed, number, cell.length, index])
    if cell.task in REASONING:
        return TASKS[cell.task](
            rng, answer_tokens=cell.length, count_tokens=count_tokens, split="eval"
        )
    place = {} if cell.depth is None else {"depth": cell.depth}
    return make(
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


def draw_questions(
    lm: LanguageModel,
    cells: Sequence[Cell],
    *,
    samples: int,
    seed: int,
    advance: Callable[[int], Any] = lambda done: None,
) -> list[Question]:
    """Draw the samples of all cells and tokenise their prompts, each once.

    Args:
      lm: a model with a tokenizer.
      cells: what to ask.
      samples: per cell.
      seed: of the samples.
      advance: called with the number of questions that are drawn.

    Raises:
      ValueError: as `draw`.
    """
    drawn = draw(lm, cells, samples=samples, seed=seed, advance=advance)
    return as_prompts(lm, drawn)


def draw(
    lm: LanguageModel,
    cells: Sequence[Cell],
    *,
    samples: int,
    seed: int,
    advance: Callable[[int], Any] = lambda done: None,
) -> list[Question]:
    """Draw the samples of all cells, for one of the functions below to tokenise.

    Args:
      lm: a model with a tokenizer.
      cells: what to ask.
      samples: per cell.
      seed: of the samples.
      advance: called with the number of questions that are drawn.

    Raises:
      ValueError: the model has no tokenizer, or a cell is longer than its positions or
        shorter than its task's smallest sample.
    """
    need_tokenizer(lm)
    longest = max((cell.length for cell in cells), default=0)
    if longest > lm.config.max_positions:
        # Before they are made: a length with a few noughts too many fills the memory.
        raise ValueError(
            f"samples of {longest} tokens exceed the {lm.config.max_positions} "
            f"positions that {lm.name} was made for; ask for shorter ones."
        )
    # In one process: 2 ms a sample of 4,096 tokens, while another process would take
    # longer to import JAX and transformers than it could save.
    count_tokens = counter(lm.tokenizer)
    questions = []
    for cell in cells:
        for index in range(samples):
            sample = draw_sample(cell, count_tokens, seed=seed, index=index)
            questions.append(
                Question(
                    cell=cell,
                    index=index,
                    ids=np.zeros(0, np.int32),
                    sample=sample,
                    answer_tokens=count_tokens(sample.answer),
                    by_lines=cell.task in REASONING,
                )
            )
        advance(len(questions))
    return questions


def as_prompts(lm: LanguageModel, questions: Sequence[Question]) -> list[Question]:
    """Return questions as texts, without a chat template."""
    texts = [question.sample.prompt for question in questions]
    rows = _in_parts(lambda some: hf_tokenizer.encode(lm.tokenizer, some), texts)
    return [
        dataclasses.replace(question, ids=np.array(ids, np.int32))
        for question, ids in zip(questions, rows, strict=True)
    ]


def of_text(tokens: np.ndarray) -> list[Question]:
    """Return windows of a text, int32 `[B, T]`, which ask nothing."""
    sample = Sample(
        task="text", segments=(("", False), ("", True)), outputs=(), max_new_tokens=0
    )
    return [
        Question(
            cell=Cell(task=sample.task, length=len(row)),
            index=index,
            ids=row,
            sample=sample,
            answer_tokens=0,
            by_lines=False,
        )
        for index, row in enumerate(tokens)
    ]


def as_chat(
    lm: LanguageModel, questions: Sequence[Question], *, system: str | None = None
) -> list[Question]:
    """Return questions as a user's turn in the model's chat template.

    The answer that a prompt begins stays in the user's turn, and an output may have
    `CHAT_WORDS` tokens more, since a sentence comes before what is asked for.

    Args:
      lm: a model whose tokenizer has a chat template.
      questions: from `draw`; they need not be tokenised.
      system: what the system says first; None leaves it to the template.

    Raises:
      ValueError: there is no template, or it fails.
    """
    said = [turns(question.sample.prompt, system) for question in questions]
    rows = _in_parts(lambda some: encode_chats(lm, some), said)
    return [
        dataclasses.replace(question, ids=np.array(ids, np.int32))
        for question, ids in zip(with_chat_words(questions), rows, strict=True)
    ]


def with_chat_words(questions: Sequence[Question]) -> list[Question]:
    """Return questions whose outputs may have `CHAT_WORDS` tokens more."""
    return [
        dataclasses.replace(
            question,
            sample=dataclasses.replace(
                question.sample,
                max_new_tokens=question.sample.max_new_tokens + CHAT_WORDS,
            ),
        )
        for question in questions
    ]


def apart(
    lm: LanguageModel,
    questions: Sequence[Question],
    *,
    chat: bool = False,
    system: str | None = None,
) -> list[Question]:
    """Return questions whose documents can be cut before they are asked.

    Args:
      lm: a model with a tokenizer.
      questions: from `draw`, `as_chat` or `read_task_file`; they need not be tokenised.
      chat: whether document and question are a user's turn in the chat template.
      system: what the system says first, in a chat.

    Raises:
      ValueError: nothing tells a question from its document.
    """
    documents, asked = [], []
    for question in questions:
        sample = question.sample
        behind = sample.question + sample.answer_prefix
        document = sample.prompt.removesuffix(behind)
        if not sample.question or not document:
            raise ValueError(
                f"question {question.index} of {question.cell.task}: nothing tells it "
                'from what it is about; write "context" and "question" in the file, or '
                "take --protocol query-aware."
            )
        documents.append(document)
        asked.append(behind)
    if chat:
        heads = _in_parts(
            lambda some: encode_documents(lm, some, system=system), documents
        )
        tails = [
            encode_question(lm, s.question, between="", answer_prefix=s.answer_prefix)
            for s in (question.sample for question in questions)
        ]
    else:
        heads = _in_parts(lambda some: encode(lm, some), documents)
        tails = _in_parts(lambda some: encode(lm, some, behind=True), asked)
    return [
        dataclasses.replace(
            question,
            ids=np.array([*head, *tail], np.int32),
            document=len(head),
        )
        for question, head, tail in zip(questions, heads, tails, strict=True)
    ]


def turns(text: str, system: str | None) -> list[dict[str, str]]:
    """Return a conversation in which the user says a text, behind the system's."""
    said = [] if system is None else [{"role": "system", "content": system}]
    return [*said, {"role": "user", "content": text}]


def judge(
    sample: Sample, prediction: str, *, by_lines: bool, match: Match = "all"
) -> tuple[bool, float]:
    """Return whether an output is right as a whole, and its score in [0, 1].

    Args:
      sample: what was asked.
      prediction: the output.
      by_lines: see `Question`.
      match: "any" makes one of the wanted strings enough, as in RULER's question
        answering.
    """
    if by_lines:
        return reasoning.check(sample, prediction)
    score = score_all(prediction, sample.outputs)
    if match == "any":
        score = float(score > 0)
    return score == 1, score


def need_tokenizer(lm: LanguageModel) -> None:
    """Raise ValueError where a model has no tokenizer."""
    if lm.tokenizer is None:
        raise ValueError(f"{lm.name} has no tokenizer, and the tasks are made of text.")


def _in_parts(
    encode: Callable[[list[Any]], Sequence[Any]], texts: Sequence[Any]
) -> list[Any]:
    """Return the token ids of texts or conversations, `_TOGETHER` of them a call."""
    found: list[Any] = []
    for first in range(0, len(texts), _TOGETHER):
        found += encode(list(texts[first : first + _TOGETHER]))
    return found
