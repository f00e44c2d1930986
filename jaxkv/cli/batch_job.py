"""What `jaxkv batch` does with each line, in this process or in another one."""

import dataclasses
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax

from jaxkv.cli import flags, prompts
from jaxkv.cli.generate import Sampling
from jaxkv.contexts.context import Context
from jaxkv.language_model import LanguageModel, locate, read_config
from jaxkv.options import described
from jaxkv.serving.engine import Engine
from jaxkv.serving.feeding import Outcome, answers
from jaxkv.serving.lines import Line
from jaxkv.sharding import sizes_of
from jaxkv.tasks.records import read_record
from jaxkv.text.arguments import stop_ids
from jaxkv.text.planning import row_budgets

_LONGEST = 4096  # tokens of a prompt, unless told
_QUESTION = 1024  # and of a question about a document
_AHEAD = 8  # requests in hand for each row, where answers wait for earlier ones


@dataclasses.dataclass(frozen=True, kw_only=True)
class Job:
    """What is done with each line; it can be sent to another process.

    Attributes:
      model: as `jaxkv.load` takes it; None is what has read the context, or needle.
      context: folder of a context that all lines are questions about, or None.
      document: which one of it.
      dtype: of `jaxkv.load`.
      follow_links: of `jaxkv.load`.
      mesh: of `jaxkv.load`.
      arguments: of `jaxkv.generate`.
      sampling: the flags of the sampler.
      rows: of the engine.
      max_prompt: of the engine; None is what fits, up to 4,096, and up to 1,024 more
        than a context's document.
      seed: line `i`, from 0, draws with `seed + i`.
      chat: put prompts through the chat template.
      system: what the system says first.
      name: of the file, for messages.
    """

    model: str | None
    context: Path | None
    document: int
    dtype: str | None
    follow_links: bool
    mesh: str | None
    arguments: Mapping[str, Any]
    sampling: Sampling
    rows: int
    max_prompt: int | None
    seed: int
    chat: bool
    system: str | None
    name: str

    @property
    def settings(self) -> dict[str, Any]:
        """What answers depend on, by flags, ready for JSON."""
        fields = ("model", "dtype", "max_prompt", "seed", "chat", "system")
        told = {name: getattr(self, name) for name in fields} | {"mesh": self._sizes}
        told |= {"context": self.context and str(self.context)}
        told |= {"document": self.document}
        told |= dataclasses.asdict(self.sampling) | described(self.arguments)
        return {f"--{name.replace('_', '-')}": value for name, value in told.items()}

    @property
    def _sizes(self) -> dict[str, int] | None:
        """The sizes of the mesh, which may be said in several words."""
        if self.mesh is None:
            return None
        config = read_config(locate(flags.model_name(self.model, self.context)))
        return sizes_of(self.mesh, config, jax.device_count())


class Answerer:
    """A model, and an engine that answers lines of a job."""

    def __init__(self, job: Job):
        self.job = job
        self._lm, self._context = flags.load_model_and_context(
            *(job.model, job.dtype, job.context, job.document),
            follow_links=job.follow_links,
            mesh=job.mesh,
        )
        stop_ids(self._lm, job.arguments["stop_ids"])  # or each line would fail
        self._sampler = job.sampling.sampler_of(self._lm)
        self._arguments = {**job.arguments, "sampler": self._sampler}
        self.engine = _engine(self._lm, job, self._arguments, self._context)

    def answers(
        self, lines: Iterator[Line], *, ordered: bool
    ) -> Iterator[tuple[int, dict[str, Any]]]:
        """Yield each line's number and what is written of it."""
        asked = (self._asked(line) for line in lines)
        window = self.job.rows * (_AHEAD if ordered else 2)
        found = answers(self.engine, asked, window=window, ordered=ordered)
        for (number, name), outcome in found:
            known = {} if name is None else {"id": name}
            yield number, known | self._told(number, outcome)

    def _asked(self, line: Line) -> Any:
        """Return what tells a line from others, and what is asked or is wrong."""
        name = None
        try:
            if line.error is not None:
                raise ValueError(f"{self.job.name}:{line.number}: {line.error}")
            record = read_record(line.text, f"{self.job.name}:{line.number}")
            name = record.name
            if record.later_turns:
                raise ValueError(
                    f"{record.where}: a conversation of several turns; jaxkv batch "
                    "answers one, see jaxkv generate."
                )
            given: Any = (self._lm, [record], self._arguments)
            if self._context is None:
                how: Any = dict(chat=self.job.chat, system=self.job.system)
                (asked,) = prompts.encode(*given, **how)
            else:
                lm, *rest = given
                (asked,) = prompts.encode_behind(lm, self._context, *rest)
            request = self._request(line.number, asked.ids)
        except ValueError as error:
            return (line.number, name), error
        return (line.number, name), request

    def _request(self, number: int, ids: Any) -> dict[str, Any]:
        budget = None
        if (ratio := self._arguments["compression_ratio"]) is not None:
            (budget,) = row_budgets(None, ratio, [ids], evicts=False) or (None,)
        return {
            "prompt": ids,
            "sampler": self._sampler,
            "stop_ids": self._arguments["stop_ids"],
            "seed": self._seed(number),
            "budget": budget,
            "context": self._context,
        }

    def _seed(self, number: int) -> int:
        return self.job.seed + number - 1

    def _told(self, number: int, outcome: Outcome) -> dict[str, Any]:
        if isinstance(outcome, ValueError):
            said = str(outcome).removeprefix("submit: ")
            where = f"{self.job.name}:{number}: "
            return {"error": where + said.removeprefix(where)}
        told: dict[str, Any] = {
            "text": outcome.text,
            "token_ids": outcome.tokens,
            "prompt_tokens": outcome.prompt_tokens,
            "finish_reason": outcome.finish_reason,
            "seed": self._seed(number),
        }
        return told if outcome.error is None else told | {"error": outcome.error}


def _engine(
    lm: LanguageModel, job: Job, arguments: Mapping[str, Any], context: Context | None
) -> Engine:
    seen = kept = 0
    if context is not None:
        seen, kept = (int(x[0]) for x in (context.lengths, context.kept))
    longest = job.max_prompt
    if longest is None:
        most = _LONGEST if context is None else seen + _QUESTION
        room = lm.config.max_positions - arguments["max_new_tokens"]
        longest = max(1, min(most, room))
    own = ("sampler", "stop_ids", "compression_ratio")
    given = {name: value for name, value in arguments.items() if name not in own}
    if arguments["compression_ratio"] is not None:
        given["budget"] = longest  # each line has its own below that
    if context is not None and not arguments["decode"].evicts:
        given["budget"] = max(1, kept + longest - seen)
    return Engine(
        lm,
        rows=job.rows,
        max_prompt=longest,
        stall=None,  # nobody looks on
        most_stop_ids=max(8, len(lm.stop_ids), len(arguments["stop_ids"] or ())),
        repetition_penalties=arguments["sampler"].repetition_penalty != 1,
        **given,
    )
