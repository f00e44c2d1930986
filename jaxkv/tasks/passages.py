"""Passages to copy from: real code and prose where they are, made-up ones everywhere.

Text comes from the Python standard library's own source files, from the help topics
in `pydoc_data` (both under the PSF licence, read where Python is installed, never
shipped), and from templates over the lexicon, which are always there. A module or
topic belongs to one split, by the checksum of its name.
"""

import functools
import importlib
import pathlib
import re
import sysconfig
from collections.abc import Iterator, Sequence
from typing import Literal

import numpy as np

from jaxkv.tasks import lexicon
from jaxkv.tasks.lexicon import Split

Source = Literal["stdlib", "topics", "prose", "code", "words"]
Weights = tuple[tuple[Source, float], ...]


def _blocks_of(text: str, most: int = 600) -> Iterator[str]:
    """Cut a text into blocks of 120 to `most` characters without blank lines."""
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
    """Return the blocks of the standard library's top-level modules of a split."""
    documents = []
    folder = sysconfig.get_path("stdlib")
    for path in sorted(pathlib.Path(folder).glob("*.py")):
        if lexicon.split_of(path.stem) == split and path.stat().st_size < 80_000:
            text = path.read_text(encoding="utf-8", errors="replace").expandtabs(4)
            documents.append(tuple(_blocks_of(text)))
    return tuple(blocks for blocks in documents if len(blocks) >= 4)


@functools.cache
def topic_documents(split: Split) -> tuple[tuple[str, ...], ...]:
    """Return the blocks of the help topics of a split; empty if there are none."""
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
    """Return adjectives and nouns; in training often ones that mean nothing.

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


def blocks(rng: np.random.Generator, sources: Weights, split: Split) -> Iterator[str]:
    """Yield blocks of one source drawn by weight, without end and without repeats.

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
