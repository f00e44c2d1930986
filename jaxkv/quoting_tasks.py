"""Copying tasks: quote a section, go on with a passage, repeat it with one change.

Text comes from the Python standard library's own source files, from the help topics
in `pydoc_data` (both under the PSF licence, read where Python is installed, never
shipped), and from templates over the lexicon, which are always there. A module or
topic belongs to one split, by the checksum of its name.
"""

import dataclasses
import functools
import importlib
import pathlib
import re
import sysconfig
from collections.abc import Iterator, Sequence
from typing import Literal

import numpy as np

from jaxkv import lexicon
from jaxkv.lexicon import Split
from jaxkv.samples import CountTokens, Exchange, Sample, assemble, too_short

Source = Literal["stdlib", "topics", "prose", "code", "words"]
Weights = tuple[tuple[Source, float], ...]

QUOTE_HEADS = (
    "This document has numbered sections.",
    "Here are the sections of a document, each under its number.",
)
CONTINUE_HEADS = (
    "Read the following passages.",
    "Some passages follow, with blank lines between them.",
)


def _blocks_of(text: str, most: int = 600) -> Iterator[str]:
    """Cuts a text into blocks of 120 to `most` characters without blank lines."""
    for paragraph in re.split(r"\n\s*\n", text):
        held: list[str] = []
        size = 0
        for line in [*paragraph.strip("\n").split("\n"), None]:
            if line is None or size + len(line) > most:
                block = "\n".join(held).rstrip()
                if 120 <= len(block) <= most:
                    yield block
                held, size = [], 0
            if line is not None:
                held.append(line.rstrip())
                size += len(line) + 1


@functools.cache
def stdlib_documents(split: Split) -> tuple[tuple[str, ...], ...]:
    """Returns the blocks of the standard library's top-level modules of a split."""
    documents = []
    folder = sysconfig.get_path("stdlib")
    for path in sorted(pathlib.Path(folder).glob("*.py")):
        if lexicon.split_of(path.stem) == split and path.stat().st_size < 80_000:
            text = path.read_text(encoding="utf-8", errors="replace").expandtabs(4)
            documents.append(tuple(_blocks_of(text)))
    return tuple(blocks for blocks in documents if len(blocks) >= 4)


@functools.cache
def topic_documents(split: Split) -> tuple[tuple[str, ...], ...]:
    """Returns the blocks of the help topics of a split; empty if there are none."""
    try:
        topics = importlib.import_module("pydoc_data.topics").topics
    except (ImportError, AttributeError):
        return ()
    documents = [
        tuple(_blocks_of(text))
        for name, text in sorted(topics.items())
        if lexicon.split_of(name) == split
    ]
    return tuple(blocks for blocks in documents if len(blocks) >= 4)


PROSE = (
    "The {a} {n} stood near the {b} {m}.",
    "Nobody in {name} had seen a {a} {n} before.",
    "After {number} days the {n} was {a} and the {m} was {b}.",
    "{Name} gave the {n} to {name} and kept the {a} {m}.",
    "Every {n} needs a {m}, but only a {a} one is {b}.",
    "On the way to the {m}, {name} lost {number} of the {a} {n}s.",
    "It was a {a}, {b} {n} with a {m} on top.",
    "Why the {m} of {name} is {b}, the {n} did not say.",
)


def _prose(rng: np.random.Generator, split: Split) -> str:
    adjectives, nouns = _vocabulary(rng, split)
    sentences = []
    for form in rng.integers(len(PROSE), size=int(rng.integers(3, 8))).tolist():
        a, b = rng.integers(len(adjectives), size=2).tolist()
        n, m = rng.integers(len(nouns), size=2).tolist()
        one, other = lexicon.names(rng, 2, split)
        sentences.append(
            PROSE[form].format(
                a=adjectives[a],
                b=adjectives[b],
                n=nouns[n],
                m=nouns[m],
                name=one,
                Name=other.capitalize(),
                number=int(rng.integers(2, 1000)),
            )
        )
    return " ".join(sentences)


def _code(rng: np.random.Generator, split: Split) -> str:
    function, first, second, local, other = lexicon.names(rng, 5, split)
    a, b = rng.integers(2, 1000, size=2).tolist()
    steps = (
        f"    {local} = {first} + {a}",
        f"    {local} = {other}({second}, {b})",
        f"    if {second} > {a}:\n        {local} = {first} * {b}",
        f"    for {other} in {first}:\n        {local} += {other} - {a}",
        f"    while {local} < {b}:\n        {local} += {second}",
        f"    {second} = max({local}, {first}, {a})",
        f'    print("{other}", {local}, {b})',
    )
    chosen = rng.permutation(len(steps))[: int(rng.integers(2, 6))].tolist()
    lines = [f"def {function}({first}, {second}):", f"    {local} = {b}"]
    lines += [steps[i] for i in chosen]
    return "\n".join([*lines, f"    return {local}"])


def _vocabulary(
    rng: np.random.Generator, split: Split
) -> tuple[Sequence[str], Sequence[str]]:
    """Returns adjectives and nouns; in training often ones that mean nothing.

    A model that sees the same few hundred words in every passage learns to recall
    them instead of copying them.
    """
    if split == "train" and rng.random() < 0.6:
        return lexicon.strange(rng, 40), lexicon.strange(rng, 40)
    return lexicon.adjectives(split), lexicon.nouns(split)


def _words(rng: np.random.Generator, split: Split) -> str:
    adjectives, nouns = _vocabulary(rng, split)
    pool = [*adjectives, *nouns]
    real = rng.integers(len(pool), size=int(rng.integers(10, 40))).tolist()
    words = [pool[i] for i in real] + lexicon.names(rng, len(real) // 2, split)
    words += [str(n) for n in rng.integers(0, 10_000, size=len(real) // 6).tolist()]
    return " ".join(words[i] for i in rng.permutation(len(words)).tolist()) + "."


SYNTHETIC = {"prose": _prose, "code": _code, "words": _words}
SOURCES: Weights = (
    ("stdlib", 0.35),
    ("topics", 0.15),
    ("prose", 0.2),
    ("code", 0.15),
    ("words", 0.15),
)
CODE_SOURCES: Weights = (
    ("stdlib", 0.5),
    ("code", 0.35),
    ("prose", 0.15),
)


def _blocks(rng: np.random.Generator, sources: Weights, split: Split) -> Iterator[str]:
    """Yields blocks of one source drawn by weight, without end and without repeats.

    Files and topics are read from a random place on, block after block.
    """
    kinds, weights = zip(*sources, strict=True)
    kind = kinds[int(rng.choice(len(kinds), p=np.array(weights) / sum(weights)))]
    documents = {"stdlib": stdlib_documents, "topics": topic_documents}
    found = documents[kind](split) if kind in documents else ()
    seen: set[str] = set()
    for _ in range(64 if found else 0):
        blocks = found[int(rng.integers(len(found)))]
        for block in blocks[int(rng.integers(len(blocks) - 2)) :]:
            if block not in seen:
                seen.add(block)
                yield block
    # A machine without the files still trains, on made-up text.
    draw = SYNTHETIC["prose" if kind in documents else kind]
    while True:
        block = draw(rng, split)
        if block not in seen:
            seen.add(block)
            yield block


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
    """Collects blocks until `room` tokens are used up.

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
    """Repeats one numbered section of a document word for word."""
    head = _wording(rng, QUOTE_HEADS, split)
    form = "\n\nRepeat section {0} word for word.\nSection {0}:"
    document = _document(
        rng,
        _blocks(rng, SOURCES, split),
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
    """Cuts a block in two at a space between words.

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
    sources: Weights = SOURCES,
) -> Sample:
    """Goes on word for word, to the passage's end, from words inside a passage.

    With sources of code alone it is the completion of code that stands in the context.
    """
    head = _wording(rng, CONTINUE_HEADS, split)
    form = "\n\nGo on word for word to the end of the passage: "
    document = _document(
        rng,
        _blocks(rng, sources, split),
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
    """Returns the identifiers a block has twice to six times."""
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
    """Repeats one numbered section with one identifier renamed."""
    head = _wording(rng, QUOTE_HEADS, split)
    form = "\n\nRepeat section {0} with every `{1}` changed to `{2}`.\nSection {0}:"
    new_names = lexicon.names(rng, questions, split, syllables=(2, 3))
    # A new name of six letters has at most six tokens, in at most six places.
    document = _document(
        rng,
        _blocks(rng, CODE_SOURCES, split),
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
