"""What `jaxkv batch` does with each line, in this process or in another one."""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

from jaxkv.cli import flags, prompts
from jaxkv.cli.generate import Sampling
from jaxkv.language_model import LanguageModel
from jaxkv.options import described
from jaxkv.serving.engine import Engine
from jaxkv.serving.feeding import Outcome, answers
from jaxkv.serving.lines import Line
from jaxkv.tasks.records import read_record
from jaxkv.text.planning import row_budgets

_AHEAD = 8  # requests in hand for each row, where answers wait for earlier ones


@dataclasses.dataclass(frozen=True, kw_only=True)
class Job:
    """What is done with each line; it can be sent to another process.

    Attributes:
      model: as `jaxkv.load` takes it.
      dtype: of `jaxkv.load`.
      follow_links: of `jaxkv.load`.
      arguments: of `jaxkv.generate`.
      sampling: the flags of the sampler.
      rows: of the engine.
      max_prompt: of the engine; None is what fits, up to 4,096.
      seed: line `i`, from 0, draws with `seed + i`.
      chat: put prompts through the chat template.
      system: what the system says first.
      name: of the file, for messages.
    """

    model: str
    dtype: str | None
    follow_links: bool
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
        told = {name: getattr(self, name) for name in fields}
        told |= dataclasses.asdict(self.sampling) | described(self.arguments)
        return {f"--{name.replace('_', '-')}": value for name, value in told.items()}


class Answerer:
    """A model, and an engine that answers lines of a job."""

    def __init__(self, job: Job):
        self.job = job
        self._lm = flags.load_model(job.model, job.dtype, follow_links=job.follow_links)
        self._sampler = job.sampling.sampler_of(self._lm)
        self._arguments = {**job.arguments, "sampler": self._sampler}
        self.engine = _engine(self._lm, job, self._arguments)

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
            (asked,) = prompts.encode(
                *(self._lm, [record], self._arguments),
                chat=self.job.chat,
                system=self.job.system,
            )
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


def _engine(lm: LanguageModel, job: Job, arguments: Mapping[str, Any]) -> Engine:
    new = arguments["max_new_tokens"]
    longest = job.max_prompt
    if longest is None:
        longest = max(1, min(4096, lm.config.max_positions - new))
    own = ("sampler", "stop_ids", "compression_ratio")
    given = {name: value for name, value in arguments.items() if name not in own}
    if arguments["compression_ratio"] is not None:
        given["budget"] = longest  # each line has its own below that
    return Engine(
        lm,
        rows=job.rows,
        max_prompt=longest,
        stall=None,  # nobody looks on
        most_stop_ids=max(8, len(lm.stop_ids), len(arguments["stop_ids"] or ())),
        repetition_penalties=arguments["sampler"].repetition_penalty != 1,
        **given,
    )
