"""Copying tasks: quote a section, go on with a passage, repeat it with one change.

The text is that of `passages`.
"""

import dataclasses
import re
from collections.abc import Iterator

import numpy as np

from jaxkv.tasks import lexicon, passages
from jaxkv.tasks.lexicon import Split
from jaxkv.tasks.samples import CountTokens, Exchange, Sample, assemble, too_short

QUOTE_HEADS = (
    "This document has numbered sections.",
    "Here are the sections of a document, each under its number.",
)
CONTINUE_HEADS = (
    "Read the following passages.",
    "Some passages follow, with blank lines between them.",
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Document:
    """Blocks in the order of the text; `targets` index those asked about."""

    blocks: tuple[str, ...]
    targets: tuple[int, ...]


def _document(
    rng: np.random.Generator,
    source: Iterator[str],
    *,
    task: str,
    room: int,
    questions: int,
    block_cost: int,
    target_cost: int,
    count_tokens: CountTokens,
    usable=lambda block: True,
) -> _Document:
    """Collect blocks until `room` tokens are used up.

    Args:
      rng: Source of randomness.
      source: Endless blocks.
      task: Name of the task, for errors.
      room: Tokens for all blocks and for the exchanges.
      questions: Largest number of targets; at least one is found.
      block_cost: Tokens a block costs beside its own.
      target_cost: Tokens an exchange costs beside the answer, which costs no more
        than its block.
      count_tokens: Number of tokens of a text.
      usable: Whether a block can be a target.
    """
    left = room
    targets: list[str] = []
    others: list[str] = []
    misses = 0
    for block in source:
        cost = count_tokens("\n" + block) + block_cost
        double = 2 * cost + target_cost
        wants = len(targets) < questions and usable(block)
        if wants and double <= left and (not targets or left - double > room // 3):
            targets.append(block)
            left -= double
        elif cost <= left and (targets or left - cost > room // 2):
            others.append(block)
            left -= cost
        else:
            misses += 1
        if left < 32 or misses > (12 if targets else 60):
            break
    if not targets:
        raise too_short(task, room, 512)
    order = rng.permutation(len(targets) + len(others)).tolist()
    blocks = [*targets, *others]
    return _Document(
        blocks=tuple(blocks[i] for i in order),
        targets=tuple(order.index(i) for i in range(len(targets))),
    )


def _wording(rng: np.random.Generator, heads: tuple[str, ...], split: Split) -> str:
    index = int(rng.integers(len(heads)))
    return heads[index if split == "train" else 0]


def _sections(blocks: tuple[str, ...]) -> str:
    return "".join(
        f"\n\nSection {number}:\n{block}" for number, block in enumerate(blocks, 1)
    )


def quote(
    rng: np.random.Generator,
    *,
    length: int,
    count_tokens: CountTokens,
    split: Split,
    questions: int = 1,
) -> Sample:
    """Repeat one numbered section of a document word for word."""
    head = _wording(rng, QUOTE_HEADS, split)
    form = "\n\nRepeat section {0} word for word.\nSection {0}:"
    document = _document(
        rng,
        passages.blocks(rng, passages.SOURCES, split),
        task="quote",
        room=length - count_tokens(head),
        questions=questions,
        block_cost=count_tokens("\n\nSection 999:"),
        target_cost=count_tokens(form.format(999)),
        count_tokens=count_tokens,
    )
    exchanges = [
        Exchange(
            question=form.format(index + 1),
            answer="\n" + document.blocks[index],
            outputs=(document.blocks[index].strip(),),
        )
        for index in document.targets
    ]
    return assemble("quote", head + _sections(document.blocks), exchanges, count_tokens)


def _cut(rng: np.random.Generator, block: str, document: str) -> tuple[str, str] | None:
    """Cut a block in two at a space between words.

    Returns:
      The words before the cut, a piece the document has only once, and the rest of
      the block, which starts with the space. None where there is no such cut.
    """
    spaces = [m.start() for m in re.finditer(r"(?<=\S) (?=\S)", block)]
    # At most 40 % in: enough words stay to be given back.
    early = [i for i, at in enumerate(spaces) if at < 0.4 * len(block)]
    for choice in rng.permutation(early).tolist()[:8]:
        for size in (6, 10, 16):
            begin = spaces[choice - size] + 1 if choice >= size else 0
            words = block[begin : spaces[choice]].lstrip()
            if len(words) >= 12 and document.count(words) == 1:
                return words, block[spaces[choice] :]
    return None


def go_on(
    rng: np.random.Generator,
    *,
    length: int,
    count_tokens: CountTokens,
    split: Split,
    questions: int = 1,
    sources: passages.Weights = passages.SOURCES,
) -> Sample:
    """Go on word for word, to the passage's end, from words inside a passage.

    With sources of code alone it is the completion of code that stands in the context.
    """
    head = _wording(rng, CONTINUE_HEADS, split)
    form = "\n\nGo on word for word to the end of the passage: "
    document = _document(
        rng,
        passages.blocks(rng, sources, split),
        task="continue",
        room=length - count_tokens(head),
        questions=questions,
        block_cost=count_tokens("\n\n"),
        # The words given and the answer are together no longer than the block.
        target_cost=count_tokens(form) + 4,
        count_tokens=count_tokens,
        usable=lambda block: _cut(rng, block, block) is not None,
    )
    context = head + "".join("\n\n" + block for block in document.blocks)
    exchanges = []
    for index in document.targets:
        found = _cut(rng, document.blocks[index], context)
        if found is not None:
            words, rest = found
            exchanges.append(
                Exchange(question=form + words, answer=rest, outputs=(rest.strip(),))
            )
    if not exchanges:
        # Every target's words stand elsewhere too (very repetitive code): rare.
        return go_on(
            rng,
            length=length,
            count_tokens=count_tokens,
            split=split,
            questions=questions,
            sources=sources,
        )
    return assemble("continue", context, exchanges, count_tokens)


_IDENTIFIER = re.compile(r"\b[A-Za-z_][A-Za-z0-9_]{2,}\b")


def _repeated(block: str) -> list[str]:
    """Return the identifiers a block has twice to six times."""
    words = _IDENTIFIER.findall(block)
    return sorted({word for word in words if 2 <= words.count(word) <= 6})


def edit(
    rng: np.random.Generator,
    *,
    length: int,
    count_tokens: CountTokens,
    split: Split,
    questions: int = 1,
) -> Sample:
    """Repeat one numbered section with one identifier renamed."""
    head = _wording(rng, QUOTE_HEADS, split)
    form = "\n\nRepeat section {0} with every `{1}` changed to `{2}`.\nSection {0}:"
    new_names = lexicon.names(rng, questions, split, syllables=(2, 3))
    # A new name of six letters has at most six tokens, in at most six places.
    document = _document(
        rng,
        passages.blocks(rng, passages.CODE_SOURCES, split),
        task="edit",
        room=length - count_tokens(head),
        questions=questions,
        block_cost=count_tokens("\n\nSection 999:"),
        target_cost=count_tokens(form.format(999, "x", "kimalo")) + 48,
        count_tokens=count_tokens,
        usable=lambda block: bool(_repeated(block)),
    )
    exchanges = []
    for index, new in zip(document.targets, new_names, strict=False):
        block = document.blocks[index]
        choices = _repeated(block)
        old = choices[int(rng.integers(len(choices)))]
        changed = re.sub(rf"\b{old}\b", new, block)
        exchanges.append(
            Exchange(
                question=form.format(index + 1, old, new),
                answer="\n" + changed,
                outputs=(changed.strip(),),
            )
        )
    return assemble("edit", head + _sections(document.blocks), exchanges, count_tokens)
