"""Does a query depend on where a token stands more than on what it is?

The observation study of DapQ (arXiv:2603.11564, sections 3 and A) on any checkpoint,
with the controls that the paper lacks. The truth are the queries of the tokens that the
model itself writes after a prompt. They are compared with queries of other tokens at
other positions, put behind the same prompt: token by token, in each layer and head.

What the paper leaves open is decided so: a token sees all that precede it, whatever
positions they are given; means are over tokens, query heads and layers; attention is
over the prompt's keys only; no pooling.
"""

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxkv.evaluation import query_probe, tables
from jaxkv.evaluation.methods import Budget
from jaxkv.evaluation.query_probe import Cosines, Recording
from jaxkv.evaluation.questions import Question
from jaxkv.evaluation.statistics import half_width
from jaxkv.language_model import LanguageModel
from jaxkv.text.inference import generate
from jaxkv.text.planning import bucket

NONSENSE = "Sorry, I don't know."  # the paper's sentence, repeated
SIZES = (1, 2, 4, 8, 16, 32, 64, 128)
BEYOND = (32, 64, 128, 256, 512)  # offsets behind the right position
N_SINK = 4

CONTENTS = ("same", "prompt", "suffix", "nonsense", "random")
PLACES = ("same", "start", "anywhere")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Study:
    """What is measured.

    Attributes:
      tokens: how many true queries there are; the paper takes 32.
      sizes: window sizes, ascending; the largest decides how long prompts must be.
      budgets: for the recall.
      window: the size at which recents are forced into SnapKV's choice.
      steps: starts of the offset curve between 0 and the prompt's end.
      seed: of random tokens and places.
    """

    tokens: int = 32
    sizes: Sequence[int] = SIZES
    budgets: Sequence[Budget] = (
        Budget(name="3%", value=3),
        Budget(name="6%", value=6),
        Budget(name="12.5%", value=12.5),
    )
    window: int = 32
    steps: int = 10
    seed: int = 0


def measure(
    lm: LanguageModel,
    questions: Sequence[Question],
    study: Study,
    *,
    batch_size: int = 8,
    advance: Callable[[], Any] = lambda: None,
) -> dict[str, Any]:
    """Measure everything on all questions; see `summarize` for the result.

    Args:
      lm: a model with a tokenizer.
      questions: prompts; all are of one length, up to a sentence.
      study: what is measured.
      batch_size: prompts that the true answers are generated for together.
      advance: called after each question.

    Raises:
      ValueError: a prompt is too short for the windows or budgets, or too long for the
        model's positions.
    """
    _check(lm, questions, study)
    answers: list[np.ndarray] = []
    for first in range(0, len(questions), batch_size):
        out = generate(
            lm,
            [question.ids for question in questions[first : first + batch_size]],
            max_new_tokens=study.tokens,
            stop_ids=[],  # the queries are wanted, not the answer
        )
        answers += [np.array(row, np.int32) for row in out.tokens]
    padded = bucket(max(len(q.ids) for q in questions) + _reach(study))
    found: list[dict[tuple, Any]] = []
    for number, (question, answer) in enumerate(zip(questions, answers, strict=True)):
        rng = np.random.default_rng([study.seed, number])
        one = _One(lm, question.ids, answer, study, padded, rng)
        found.append(
            dict(one.table()) | dict(one.offsets()) | dict(one.windows(question))
        )
        advance()
    return summarize(found)


def _reach(study: Study) -> int:
    return max(study.tokens, *study.sizes)


def _check(lm: LanguageModel, questions: Sequence[Question], study: Study) -> None:
    if lm.tokenizer is None:
        raise ValueError(f"{lm.name} has no tokenizer, and the study is made of text.")
    shortest = min(len(question.ids) for question in questions)
    longest = max(len(question.ids) for question in questions)
    need = max(_reach(study), *(b.tokens(longest) for b in study.budgets))
    if shortest <= need:
        raise ValueError(
            f"the study needs prompts of more than {need} tokens, because of its "
            f"windows and budgets, got one of {shortest}; ask for a longer --length."
        )
    last = longest + BEYOND[-1] + _reach(study)
    if last > lm.config.max_positions:
        raise ValueError(
            f"the study goes up to position {last}, but {lm.name} was made for "
            f"{lm.config.max_positions}; ask for a shorter --length."
        )


class _One:
    """All measurements on one prompt, as (key, value) pairs."""

    def __init__(
        self,
        lm: LanguageModel,
        ids: np.ndarray,
        answer: np.ndarray,
        study: Study,
        padded: int,
        rng: np.random.Generator,
    ):
        self._lm, self._ids, self._study, self._rng = lm, ids, study, rng
        self._padded, self._length = padded, len(ids)
        reach = _reach(study)
        nonsense = lm.tokenizer(NONSENSE, add_special_tokens=False)["input_ids"]
        self._contents = {
            "same": answer,
            "nonsense": np.resize(nonsense, reach),
            "random": rng.integers(0, lm.config.vocab_size, reach),
        }
        self._truth = self._record(answer, self._length)
        self._places = jnp.arange(
            self._length, self._length + study.tokens, dtype=jnp.int32
        )

    def content(self, kind: str, size: int) -> np.ndarray:
        """Return `size` tokens: of 32, `prompt` is F4_L28 and `suffix` is F0_L32."""
        if kind in ("prompt", "suffix"):
            first = size // 8 if kind == "prompt" else 0
            return np.concatenate([self._ids[:first], self._ids[first - size :]])
        return self._contents[kind][:size]

    def _record(self, content: np.ndarray, start: int) -> Recording:
        """Put tokens behind the prompt and say that they stand at `start` and on."""
        tokens = np.zeros(self._padded, np.int32)
        tokens[: self._length] = self._ids
        tokens[self._length : self._length + len(content)] = content
        positions = np.arange(self._padded, dtype=np.int32)
        positions[self._length :] += start - self._length
        reach = _reach(self._study)
        places = self._length - reach + np.arange(2 * reach)
        return query_probe.record(
            self._lm.network,
            self._lm.params,
            jnp.asarray(tokens),
            jnp.asarray(positions),
            jnp.asarray(places),
            jnp.int32(self._length),
        )

    def _behind(self, recording: Recording, count: int) -> jax.Array:
        reach = _reach(self._study)
        return recording.queries[:, reach : reach + count]

    def _compare(self, content: np.ndarray, start: int) -> Cosines:
        count = self._study.tokens
        recording = self._record(content, start)
        return query_probe.compare(
            self._lm.network,
            self._behind(recording, count),
            jnp.arange(start, start + count, dtype=jnp.int32),
            self._behind(self._truth, count),
            self._places,
            self._truth.means,
        )

    def table(self) -> Iterator[tuple[tuple, Cosines]]:
        """Content and position, each right or wrong: the paper's table 1 and more."""
        count = self._study.tokens
        starts = {
            "same": self._length,
            "start": 0,
            "anywhere": int(self._rng.integers(0, self._length - count + 1)),
        }
        for content in CONTENTS:
            for place in PLACES:
                yield (
                    ("table", content, place),
                    self._compare(self.content(content, count), starts[place]),
                )

    def offsets(self) -> Iterator[tuple[tuple, Cosines]]:
        """Yield the right content at positions that are more and more wrong."""
        steps, right = self._study.steps, self.content("same", self._study.tokens)
        for step in range(steps + 1):
            start = round(self._length * step / steps)
            where = f"{round(100 * step / steps)}%"
            yield ("offsets", where), self._compare(right, start)
        for beyond in BEYOND:
            where = f"+{beyond}"
            yield ("offsets", where), self._compare(right, self._length + beyond)

    def windows(self, question: Question) -> Iterator[tuple[tuple, Any]]:
        """How well windows of queries know what the true ones will look at."""
        study, sizes = self._study, self._study.sizes
        truth = self._scores(
            self._behind(self._truth, study.tokens), np.ones((1, study.tokens))
        )
        budgets = {b.name: b.tokens(question.cell.length) for b in study.budgets}
        length = jnp.int32(self._length)

        def measured(name: str, scores: jax.Array, own: Sequence[int | None]):
            similar = query_probe.cosine(scores, truth).mean((0, 2))
            for number, size in enumerate(own):
                if size is not None:
                    yield ("similarity", name, size), similar[number]
            for budget, tokens in budgets.items():
                share = query_probe.recall(scores, truth, length, budget=tokens)
                for number, size in enumerate(own):
                    yield ("recall", name, size, budget), share.mean((0, 2))[number]

        for name, scores in self._window_scores():
            yield from measured(name, scores, sizes)
            if name == "snapkv" and study.window in sizes:
                number = sizes.index(study.window)
                order = jnp.arange(self._padded, dtype=jnp.int32)
                recent = order >= self._length - study.window
                forced = jnp.where(recent, jnp.inf, scores[:, number : number + 1])
                for key, value in measured("snapkv, recents", forced, [study.window]):
                    if key[0] == "recall":  # there are no weights to compare
                        yield key, value
        order = jnp.arange(self._padded, dtype=jnp.float32)
        recent = jnp.where(order < N_SINK, jnp.inf, order)
        drawn = jnp.asarray(self._rng.random(truth.shape), jnp.float32)
        yield from measured(
            "sinks + recent", jnp.broadcast_to(recent, truth.shape), [None]
        )
        yield from measured("random tokens", drawn, [None])

    def _window_scores(self) -> Iterator[tuple[str, jax.Array]]:
        """Yield the scores `[L, S, N, T]` of each kind of window, for all sizes."""
        sizes, reach = self._study.sizes, _reach(self._study)
        order = np.arange(reach)
        first = np.stack([order < size for size in sizes])
        for kind in ("random", "nonsense"):
            recording = self._record(self._contents[kind], self._length)
            yield f"dapq, {kind}", self._scores(self._behind(recording, reach), first)
        for kind in ("prompt", "suffix"):
            parts = []
            for size in sizes:
                recording = self._record(self.content(kind, size), self._length)
                member = (order < size)[None]
                parts.append(self._scores(self._behind(recording, reach), member))
            yield f"dapq, {kind}", jnp.concatenate(parts, axis=1)
        # The last `size` of the recorded prompt queries; they see up to themselves.
        last = np.stack([order >= reach - size for size in sizes])
        queries = self._truth.queries[:, :reach]
        places = self._length - reach + jnp.arange(reach, dtype=jnp.int32)
        yield "snapkv", self._scores(queries, last, visible=places + 1)
        plain = query_probe.turn(queries, -places, self._lm.network)
        parts = []
        for number, size in enumerate(sizes):
            # The last `size` prompt tokens move to the first `size` future positions.
            moved = query_probe.turn(plain, places + size, self._lm.network)
            parts.append(self._scores(moved, last[number : number + 1]))
        yield "snapkv, moved", jnp.concatenate(parts, axis=1)

    def _scores(
        self, queries: jax.Array, members: np.ndarray, visible: jax.Array | None = None
    ) -> jax.Array:
        if visible is None:
            visible = jnp.full(queries.shape[1], self._length, jnp.int32)
        return query_probe.window_scores(
            queries, self._truth.keys, visible, jnp.asarray(members, jnp.float32)
        )


def summarize(found: Sequence[Mapping[tuple, Any]]) -> dict[str, Any]:
    """Return means over prompts with 95 % intervals, ready for JSON.

    Returns:
      `table`: cosines by content and position; `offsets`: cosines of the right content
      by start (per cent of the prompt, or tokens behind its end); `windows`: by kind
      and size of window, the cosine of attention weights and the recall per budget.
    """
    keys = list(found[0])
    table, offsets = [], []
    windows: dict[tuple, dict[str, Any]] = {}
    for key in keys:
        values = [one[key] for one in found]
        if key[0] == "table":
            table.append({"content": key[1], "position": key[2]} | _cosines(values))
        elif key[0] == "offsets":
            offsets.append({"start": key[1]} | _cosines(values))
        else:
            record = windows.setdefault(
                key[1:3], {"window": key[1], "size": key[2], "recall": {}}
            )
            if key[0] == "similarity":
                record["similarity"] = _mean(values)
            else:
                record["recall"][key[3]] = _mean(values)
    return {"table": table, "offsets": offsets, "windows": list(windows.values())}


def _cosines(values: Sequence[Cosines]) -> dict[str, Any]:
    result = {}
    for name in Cosines._fields:
        layers = np.array([getattr(value, name) for value in values])
        result[name] = _mean(layers.mean(1)) | {"layers": layers.mean(0).tolist()}
    return result


def _mean(values: Any) -> dict[str, float | None]:
    """Return mean and half of the 95 % interval, None where one value says nothing."""
    values = np.array([float(value) for value in values])
    half = half_width(values) if len(values) > 1 else None
    return {"mean": float(values.mean()), "half": half}


def markdown(record: dict[str, Any]) -> str:
    """Return a study's results as Markdown tables.

    Args:
      record: what `measure` has returned, and `config`: what was asked.
    """
    config = record["config"]
    names = ("before RoPE", "after RoPE", "before, centred", "after, centred")

    def cosines(row: dict[str, Any]) -> list[str]:
        return [_number(row[name]) for name in Cosines._fields]

    by_content = tables.markdown(
        ["content", "position", *names],
        [[r["content"], r["position"], *cosines(r)] for r in record["table"]],
    )
    by_start = tables.markdown(
        ["start", *names], [[r["start"], *cosines(r)] for r in record["offsets"]]
    )
    layers = len(record["table"][0]["after"]["layers"])
    by_layer = tables.markdown(
        ["content", "position", *(f"layer {i}" for i in range(layers))],
        [
            [r["content"], r["position"], *(f"{x:.3f}" for x in r["after"]["layers"])]
            for r in record["table"]
        ],
    )
    windows = tables.markdown(
        ["window", "size", "similarity", *(f"recall {b}" for b in config["budgets"])],
        [
            [
                r["window"],
                str(r["size"] or ""),
                _number(r["similarity"]) if "similarity" in r else "",
                *(_number(r["recall"][b]) for b in config["budgets"]),
            ]
            for r in record["windows"]
        ],
    )
    return "\n\n".join(
        [
            f"Queries of {config['model']} on {config['samples']} prompts of "
            f"{config['task']}, {config['length']} tokens; the truth are the first "
            f"{config['tokens']} tokens that the model writes. Cosines, mean over "
            "tokens, heads and layers.",
            f"### Content and position\n\n{by_content}",
            f"### After RoPE, by layer\n\n{by_layer}",
            f"### The right content at other positions\n\n{by_start}",
            "### Windows: similarity of attention, recall of the truly best\n\n"
            + windows,
        ]
    )


def _number(value: dict[str, float | None]) -> str:
    half = "" if value["half"] is None else f" ± {value['half']:.4f}"
    return f"{value['mean']:.4f}{half}"
