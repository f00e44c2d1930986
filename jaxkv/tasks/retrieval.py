"""Retrieval tasks: needles in a haystack and variable tracking.

The tasks and the wording of needles and questions follow RULER (Hsieh et al. 2024,
"RULER: What's the Real Context Size of Your Long-Context Language Models?",
arXiv:2404.06654), those of its tasks that need no corpus. The introductions are ours.
"""

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Literal

import numpy as np

from jaxkv.tasks import haystack, lexicon
from jaxkv.tasks.lexicon import Split
from jaxkv.tasks.samples import CountTokens, Exchange, Sample, assemble

Kind = Literal["number", "word", "uuid"]

# The first wording of each list is the one evaluation uses.
NIAH_HEADS = (
    "The text below hides some special magic {kind}s. Remember them, because "
    "questions about them come at the end.",
    "Read this text with care. A few special magic {kind}s are mentioned in it and "
    "you will have to name them.",
    "Special magic {kind}s stand between the lines that follow. Keep them in mind.",
)
NIAH_QUESTIONS = (
    "{ask} for {keys} mentioned in the provided text? "
    "The {what} for {keys} mentioned in the provided text {verb}",
    "{ask} for {keys}? The {what} for {keys} {verb}",
)
VT_HEADS = (
    "The text below assigns values to variables, directly or by way of another "
    "variable. Follow the assignments.",
    "Some lines of this text set a variable to a number or to another variable. "
    "Keep track of what each one holds.",
)
VT_QUESTIONS = (
    "Find all variables that are assigned the value {value} in the text above. "
    "The variables assigned the value {value} are",
    "Which variables hold the value {value}? The variables assigned the value "
    "{value} are",
)


def _wording(rng: np.random.Generator, choices: Sequence[str], split: Split) -> str:
    # Drawn for both splits, so that what follows does not depend on the split.
    index = int(rng.integers(len(choices)))
    return choices[index if split == "train" else 0]


def _listed(items: Sequence[str]) -> str:
    if len(items) == 1:
        return items[0]
    return ", ".join(items[:-1]) + " and " + items[-1]


def _draw(
    rng: np.random.Generator, kind: Kind, count: int, split: Split, invented: bool
) -> list[str]:
    if kind == "number":
        return lexicon.numbers(rng, count)
    if kind == "uuid":
        return lexicon.uuids(rng, count, split)
    return lexicon.word_keys(rng, count, split, invented=invented)


def _niah(
    task: str,
    rng: np.random.Generator,
    *,
    length: int,
    count_tokens: CountTokens,
    split: Split,
    questions: int = 1,
    key: Kind = "word",
    value: Kind = "number",
    asked: int = 1,
    values: int = 1,
    distractors: int = 0,
    needles_only: bool = False,
    depth: float | None = None,
) -> Sample:
    """Draw a needle-in-a-haystack sample.

    Args:
      task: Name of the task.
      rng: Source of randomness.
      length: Bound on the tokens of the sample.
      count_tokens: Number of tokens of a text.
      split: Split of the keys.
      questions: Number of questions; fewer are kept where they do not fit.
      key: What keys are.
      value: What values are.
      asked: Keys one question names.
      values: Values a key has.
      distractors: Needles nobody asks for.
      needles_only: Fill the haystack with distractors instead of noise.
      depth: Place of the needles in the noise, from 0 to 1; by default drawn.
    """
    # Pseudo-words among the training keys teach copying, not a vocabulary.
    invented = split == "train" and rng.random() < 0.5

    def needle(name: str, content: str) -> str:
        return f"One of the special magic {value}s for {name} is: {content}."

    wanted = questions * asked
    if needles_only:
        probe = needle(*(_draw(rng, k, 1, split, False)[0] for k in (key, value)))
        distractors = math.ceil(1.3 * length / count_tokens("\n" + probe))
    keys = _draw(rng, key, wanted + distractors, split, invented)
    contents = _draw(rng, value, wanted * values + distractors, split, invented)
    form = _wording(rng, NIAH_QUESTIONS, split)
    asks = []
    for start in range(0, wanted, asked):
        names = keys[start : start + asked]
        held = [contents[i * values :][:values] for i in range(start, start + asked)]
        asks.append(_ask(form, value, names, held, needle))
    head = _wording(rng, NIAH_HEADS, split).format(kind=value) + "\n"
    asks, left = haystack.fit_questions(
        task,
        asks,
        length=length,
        head_cost=count_tokens(head),
        in_noise=not needles_only,
        count_tokens=count_tokens,
    )
    extra, left = haystack.fill(
        list(map(needle, keys[wanted:], contents[wanted * values :])),
        left,
        count_tokens,
        in_noise=not needles_only,
    )
    # The values of one key keep their order, which is that of the answer. Different
    # keys are shuffled, so the order of questions says nothing about depth.
    own = [
        ask.needles[i : i + values]
        for ask in asks
        for i in range(0, len(ask.needles), values)
    ]
    needles = haystack.interleave(rng, [*own, *((line,) for line in extra)])
    first = int(rng.integers(len(haystack.NOISE)))
    if needles_only:
        text = "\n".join(needles)
    else:
        text = haystack.hide(
            rng, needles, haystack.make_noise(left, count_tokens, first), depth
        )
    return assemble(task, head + text, [ask.exchange for ask in asks], count_tokens)


def _ask(
    form: str,
    value: Kind,
    names: Sequence[str],
    held: Sequence[Sequence[str]],
    needle: Callable[[str, str], str],
) -> haystack.Ask:
    """Return the question for the values `held` by these keys, and its needles."""
    flat = [content for row in held for content in row]
    plural = len(flat) > 1
    what = f"special magic {value}s" if plural else f"special magic {value}"
    question = form.format(
        ask=f"What are all the {what}" if plural else f"What is the {what}",
        what=what,
        keys=_listed(names),
        verb="are" if plural else "is",
    )
    return haystack.Ask(
        exchange=Exchange(
            question="\n" + question,
            answer=" " + ", ".join(flat),
            outputs=tuple(flat),
        ),
        needles=tuple(
            needle(name, content)
            for name, row in zip(names, held, strict=True)
            for content in row
        ),
    )


# Each takes the keywords of `tasks.make` (length, count_tokens, split) and the number
# of questions.
def niah_single_1(rng: np.random.Generator, **size) -> Sample:
    """One needle in noise: a word key, a seven-digit value."""
    return _niah("niah_single_1", rng, **size)


def niah_single_words(rng: np.random.Generator, **size) -> Sample:
    """One needle in noise: a word key, a word value."""
    return _niah("niah_single_words", rng, value="word", **size)


def niah_single_uuid(rng: np.random.Generator, **size) -> Sample:
    """One needle in noise: a word key, a UUID value."""
    return _niah("niah_single_uuid", rng, value="uuid", **size)


def niah_multikey(
    rng: np.random.Generator, *, distractors: int | None = None, **size
) -> Sample:
    """One needle and 4 to 16 distractors (or `distractors`) in noise."""
    drawn = int(rng.integers(4, 17))
    distractors = drawn if distractors is None else distractors
    return _niah("niah_multikey", rng, distractors=distractors, **size)


def niah_multikey_needles(rng: np.random.Generator, **size) -> Sample:
    """Draw a haystack of nothing but needles: word keys, seven-digit values."""
    return _niah("niah_multikey_needles", rng, needles_only=True, **size)


def niah_multikey_uuid(rng: np.random.Generator, **size) -> Sample:
    """Draw a haystack of nothing but needles: UUID keys, UUID values."""
    task = "niah_multikey_uuid"
    return _niah(task, rng, key="uuid", value="uuid", needles_only=True, **size)


def niah_multivalue(rng: np.random.Generator, *, values: int = 4, **size) -> Sample:
    """One key with `values` values; the answer gives them in the text's order."""
    return _niah("niah_multivalue", rng, values=values, **size)


def niah_multiquery(rng: np.random.Generator, *, asked: int = 4, **size) -> Sample:
    """`asked` keys in one question; the answer follows the question's order."""
    return _niah("niah_multiquery", rng, asked=asked, **size)


def vt(
    rng: np.random.Generator,
    *,
    length: int,
    count_tokens: CountTokens,
    split: Split,
    questions: int = 1,
    hops: int | None = None,
    distractors: int | None = None,
) -> Sample:
    """Variable tracking: name all variables that hold a value, in chain order.

    Args:
      rng: Source of randomness.
      length: Bound on the tokens of the sample.
      count_tokens: Number of tokens of a text.
      split: Split of the variable names.
      questions: Number of chains asked for, one question each.
      hops: Assignments from variable to variable in a chain; by default 4, as in
        RULER, and 1 to 4 in training, where one hop is learnt before four.
      distractors: Chains nobody asks for; by default 1 to 4.
    """
    if hops is None:
        hops = 4 if split == "eval" else int(rng.integers(1, 5))
    drawn = int(rng.integers(1, 5))
    chains = questions + (drawn if distractors is None else distractors)
    size = hops + 1
    names = lexicon.variables(rng, chains * size, split)
    values = lexicon.numbers(rng, chains, digits=5)
    form = _wording(rng, VT_QUESTIONS, split)
    asks = []
    for index, value in enumerate(values):
        chain = names[index * size : (index + 1) * size]
        lines = [f"VAR {chain[0]} = {value}"]
        lines += [f"VAR {new} = VAR {old}" for old, new in itertools.pairwise(chain)]
        asks.append(
            haystack.Ask(
                exchange=Exchange(
                    question="\n" + form.format(value=value),
                    answer=" " + ", ".join(chain),
                    outputs=tuple(chain),
                ),
                needles=tuple(lines),
            )
        )
    head = _wording(rng, VT_HEADS, split) + "\n"
    kept, left = haystack.fit_questions(
        "vt",
        asks[:questions],
        length=length,
        head_cost=count_tokens(head),
        in_noise=True,
        count_tokens=count_tokens,
    )
    shown = [ask.needles for ask in kept]
    for ask in asks[questions:]:
        lines, after = haystack.fill(ask.needles, left, count_tokens, in_noise=True)
        if len(lines) == size:
            shown.append(ask.needles)
            left = after
    first = int(rng.integers(len(haystack.NOISE)))
    text = haystack.hide(
        rng,
        haystack.interleave(rng, shown),
        haystack.make_noise(left, count_tokens, first),
    )
    return assemble("vt", head + text, [ask.exchange for ask in kept], count_tokens)
