"""Training rows for the shipped checkpoint: tokens and loss weights as arrays."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from jaxkv import tasks
from jaxkv.needle.tokenizer import ASSISTANT, BOS, END, EOS, PAD, USER
from jaxkv.tasks.lexicon import Split
from jaxkv.tasks.samples import Sample

# What is learnt late gets the most: variable tracking, editing, quoting.
MIXTURE: Mapping[str, float] = {
    "niah_single_1": 0.02,
    "niah_single_words": 0.04,
    "niah_single_uuid": 0.03,
    "niah_multikey": 0.03,
    "niah_multikey_needles": 0.06,
    "niah_multikey_uuid": 0.06,
    "niah_multivalue": 0.05,
    "niah_multiquery": 0.04,
    "vt": 0.17,
    "ledger": 0.09,
    "machine": 0.15,
    "quote": 0.08,
    "continue": 0.08,
    "edit": 0.10,
}

PROMPT_WEIGHT = 0.1
MOST_QUESTIONS = 8
LEAST_LENGTH = 128
# Samples of these tasks fit into what is left of a row, however little that is.
FILLERS = ("ledger", "niah_single_1", "niah_single_words")
FILLER_LENGTH = 512
NO_QUESTIONS = ("ledger", "machine")


def _fast(tokenizer: Any) -> Any:
    """Return the `tokenizers.Tokenizer` inside a transformers tokenizer."""
    return getattr(tokenizer, "backend_tokenizer", tokenizer)


class _Encoder:
    """Turn text and samples into token ids."""

    def __init__(self, tokenizer: Any):
        self._tokenizer = _fast(tokenizer)
        names = {"bos": BOS, "eos": EOS, "pad": PAD}
        names |= {"user": USER, "assistant": ASSISTANT, "end": END}
        ids = {name: self._tokenizer.token_to_id(text) for name, text in names.items()}
        missing = sorted(names[name] for name, token in ids.items() if token is None)
        if missing:
            raise ValueError(
                f"Expected the tokenizer of jaxkv.needle.tokenizer, got one without "
                f"{missing}. Build it with: python -m jaxkv.needle.tokenizer OUT_DIR"
            )
        self.ids: dict[str, int] = ids

    def count(self, text: str) -> int:
        return len(self._tokenizer.encode(text, add_special_tokens=False))

    def text(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def sample(self, sample: Sample, *, chat: bool) -> tuple[list[int], list[float]]:
        """Return ids and weights; weights[i] is that of predicting ids[i].

        The segments are tokenised one by one, as at inference.
        """
        ids = [self.ids["bos"]]
        weights = [0.0]
        for text, is_answer in sample.segments:
            piece = self.text(text)
            if is_answer:
                piece.append(self.ids["eos"])
            elif chat:
                piece = [
                    self.ids["user"],
                    *piece,
                    self.ids["end"],
                    self.ids["assistant"],
                ]
            loss = [1.0 if is_answer else PROMPT_WEIGHT] * len(piece)
            if not is_answer and len(ids) > 1:
                # Nothing says that another question follows an answer.
                loss[0] = 0.0
            ids += piece
            weights += loss
        return ids, weights


def _draw(
    encoder: _Encoder,
    rng: np.random.Generator,
    *,
    room: int,
    names: tuple[str, ...],
    shares: np.ndarray,
    split: Split,
    chat: bool,
) -> tuple[list[int], list[float]]:
    """Draw a sample of at most `room` tokens, all special tokens included."""
    size = room
    # Two in five samples are shorter than the room there is: easy cases at every
    # row length.
    if room > 2 * FILLER_LENGTH and rng.random() < 0.4:
        size = int(np.exp(rng.uniform(np.log(FILLER_LENGTH / 2), np.log(room))))
    task = names[int(rng.choice(len(names), p=shares))]
    questions = int(rng.integers(1, MOST_QUESTIONS + 1))
    while True:
        options = {} if task in NO_QUESTIONS else {"questions": questions}
        # The start, and for every question the end and three chat markers.
        special = 1 + options.get("questions", 1) * (4 if chat else 1)
        try:
            sample = tasks.make(
                task,
                rng,
                length=size - special,
                count_tokens=encoder.count,
                split=split,
                **options,
            )
            return encoder.sample(sample, chat=chat)
        except ValueError:
            if task == "ledger":
                raise
            # Too short for this task. A ledger fits wherever a sample is drawn.
            small = size < FILLER_LENGTH / 2 or task in FILLERS
            task = "ledger" if small else FILLERS[int(rng.integers(len(FILLERS)))]
            questions = 1


def row(
    encoder: _Encoder,
    rng: np.random.Generator,
    *,
    length: int,
    mixture: Mapping[str, float],
    split: Split,
    chat: float,
) -> tuple[np.ndarray, np.ndarray]:
    """Draw one row: samples one after the other, then padding.

    Returns:
      tokens uint16[length + 1] and weights float16[length + 1].
    """
    names = tuple(mixture)
    shares = np.array([mixture[name] for name in names], dtype=np.float64)
    shares /= shares.sum()
    tokens = np.full(length + 1, encoder.ids["pad"], dtype=np.uint16)
    weights = np.zeros(length + 1, dtype=np.float16)
    at = 0
    while length + 1 - at >= LEAST_LENGTH or at == 0:
        ids, loss = _draw(
            encoder,
            rng,
            room=length + 1 - at,
            names=names,
            shares=shares,
            split=split,
            chat=bool(rng.random() < chat),
        )
        tokens[at : at + len(ids)] = ids
        weights[at : at + len(ids)] = loss
        at += len(ids)
    return tokens, weights


def rows(
    tokenizer: Any,
    *,
    length: int,
    count: int,
    seed: int,
    mixture: Mapping[str, float] | None = None,
    start: int = 0,
    split: Split = "train",
    chat: float = 0.1,
) -> tuple[np.ndarray, np.ndarray]:
    """Draw training rows.

    A row holds one sample of about `length` tokens or several shorter ones, each as
    `<s> question answer </s> question answer </s> ...`. Row i depends on `seed`
    and `start + i` alone, so any process can make any shard.

    Args:
      tokenizer: The needle tokenizer (from `tokenizers` or `transformers`).
      length: Tokens a training step sees; a row has one more.
      count: Number of rows.
      seed: Seed of all rows.
      mixture: Task to probability, normalised here; `MIXTURE` by default.
      start: Index of the first row.
      split: Split of the keys.
      chat: Fraction of samples written with the chat markers, as the tokenizer's
        chat template does.

    Returns:
      tokens uint16[count, length + 1], and weights float16[count, length + 1], where
      weights[i, t] belongs to predicting tokens[i, t] from what stands before: 1.0
      on answers and the end of sequence, 0.1 on prompts, 0 on starts and padding.
    """
    if length < LEAST_LENGTH:
        raise ValueError(
            f"Expected length >= {LEAST_LENGTH} tokens, got {length}. Rows shorter "
            "than that hold no sample."
        )
    mixture = MIXTURE if mixture is None else mixture
    unknown = sorted(set(mixture) - set(tasks.TASKS))
    if unknown:
        raise ValueError(
            f"Expected mixture keys among {sorted(tasks.TASKS)}, got {unknown}."
        )
    encoder = _Encoder(tokenizer)
    tokens = np.empty((count, length + 1), dtype=np.uint16)
    weights = np.empty((count, length + 1), dtype=np.float16)
    for i in range(count):
        tokens[i], weights[i] = row(
            encoder,
            np.random.default_rng([seed, start + i]),
            length=length,
            mixture=mixture,
            split=split,
            chat=chat,
        )
    return tokens, weights
