"""`jaxkv generate`: its flags, and what they ask for."""

import dataclasses
from pathlib import Path
from typing import Annotated, Any

import typer

from jaxkv import registry
from jaxkv.cli import answers, flags, prompts
from jaxkv.cli.groups import grouped
from jaxkv.cli.terminal import say
from jaxkv.language_model import LanguageModel
from jaxkv.models.hf import generation as hf_generation
from jaxkv.sampling import Categorical, Greedy, Sampler
from jaxkv.speculation.rules import Exact
from jaxkv.text.chat import speaks_in_chats


@dataclasses.dataclass(frozen=True, kw_only=True)
class Speculation:
    """How tokens are drafted, and which drafts pass."""

    speculate: Annotated[
        str,
        typer.Option(
            help=f"Drafts: none, {', '.join(registry.SPECULATE)}; options likewise."
        ),
    ] = "none"
    accept: Annotated[
        str,
        typer.Option(
            help=f"Which drafts pass: {', '.join(registry.ACCEPT)}; "
            "all but exact are lossy."
        ),
    ] = "exact"

    @property
    def arguments(self) -> dict[str, Any]:
        """Arguments of `jaxkv.generate`.

        Raises:
          ValueError: unknown names or options, or a rule that has nothing to accept.
        """
        if self.speculate == "none":
            drafter = None
        elif self.speculate.partition(":")[0] in registry.SPECULATE:
            drafter = registry.parse(
                self.speculate, registry.SPECULATE, flag="--speculate"
            )
        else:
            raise ValueError(
                f"--speculate: unknown {self.speculate!r}; choose one of none, "
                f"{', '.join(registry.SPECULATE)}."
            )
        rule = registry.parse(self.accept, registry.ACCEPT, flag="--accept")
        if drafter is None and rule != Exact():
            raise ValueError(
                f"--accept {self.accept} does nothing without drafts; add --speculate "
                f"{' or '.join(registry.SPECULATE)}."
            )
        return {"speculate": drafter, "accept": rule}


_CUTS = ("top_k", "top_p", "min_p")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampling:
    """How a token is chosen."""

    use_generation_config: Annotated[
        bool,
        typer.Option(
            "--use-generation-config",
            help="Draw as the checkpoint's generation_config.json says; the flags "
            "below go before it.",
        ),
    ] = False
    temperature: Annotated[
        float | None,
        typer.Option(help="0, the default, takes the likeliest token."),
    ] = None
    top_k: Annotated[int | None, typer.Option(help="Draw from this many; 0: all.")] = (
        None
    )
    top_p: Annotated[
        float | None, typer.Option(help="Draw from this probability mass.")
    ] = None
    min_p: Annotated[
        float | None,
        typer.Option(help="Least probability, relative to the likeliest token's."),
    ] = None
    repetition_penalty: Annotated[
        float | None,
        typer.Option(help="Makes tokens seen before less likely; 1, the default, not."),
    ] = None

    @property
    def sampler(self) -> Sampler:
        """The sampler of the flags alone, to be checked before a model is loaded.

        Raises:
          ValueError: a value would have no effect.
        """
        usual = 1.0 if self.use_generation_config else 0.0  # as far as is known yet
        values = {"temperature": usual} | self._given
        if values["temperature"] != 0:
            return Categorical(**values)
        cuts = [name for name in _CUTS if name in values]
        if cuts:
            raise ValueError(
                f"--{cuts[0].replace('_', '-')} does nothing at temperature 0, which "
                "is greedy; add --temperature."
            )
        return Greedy(repetition_penalty=values.get("repetition_penalty", 1.0))

    def sampler_of(self, lm: LanguageModel) -> Sampler:
        """Return the sampler, the checkpoint's own where the flags ask for it.

        Raises:
          ValueError: the checkpoint has none, or a value would have no effect.
        """
        if not self.use_generation_config:
            return self.sampler
        if not (lm.folder / hf_generation.FILE).exists():
            raise ValueError(
                f"--use-generation-config: {lm.name} has no {hf_generation.FILE}."
            )
        own = {"temperature": 0.0} | dataclasses.asdict(lm.sampler)
        if self.temperature == 0:
            own = {name: value for name, value in own.items() if name not in _CUTS}
        return Sampling(**own | self._given).sampler

    @property
    def _given(self) -> dict[str, Any]:
        values = dataclasses.asdict(self)
        del values["use_generation_config"]
        return {name: value for name, value in values.items() if value is not None}


@grouped
def generate(
    *,
    model: flags.Asked = None,
    context: flags.ContextFolder = None,
    document: flags.Document = 0,
    prompt: Annotated[
        list[str] | None, typer.Option(help="A prompt; may be repeated.")
    ] = None,
    prompt_file: Annotated[
        list[Path] | None,
        typer.Option(
            help="A file that is one prompt, or a .jsonl file with one per line, also "
            "in the formats of RULER, LongBench, Spec-Bench and chats; may be "
            "repeated. Without any prompt, standard input is read."
        ),
    ] = None,
    chat: flags.Chat = False,
    system: flags.System = None,
    max_new_tokens: flags.MaxNewTokens = 64,
    eviction: flags.Eviction,
    speculation: Speculation,
    sampling: Sampling,
    seed: flags.Seed = 0,
    stop_id: flags.StopId = None,
    dtype: flags.Dtype = None,
    follow_links: flags.FollowLinks = False,
    mesh: flags.Mesh = None,
    batch_size: flags.BatchSize = 8,
    kernels: flags.Kernels,
    json_: flags.Json = False,
    stream: Annotated[
        bool | None,
        typer.Option(help="Show text as it comes; default: one prompt, on a terminal."),
    ] = None,
) -> None:
    """Continue prompts; prompt number i draws with seed + i, whatever the batch."""
    arguments = {
        "max_new_tokens": max_new_tokens,
        "sampler": sampling.sampler,
        "stop_ids": stop_id or None,
        **kernels.arguments,
        **eviction.arguments,
        **speculation.arguments,
    }
    flags.check(arguments)
    records = prompts.read(prompt or [], prompt_file or [])
    if stream and (json_ or len(records) > 1):
        raise ValueError("--stream takes one prompt and no --json.")
    if context is not None and (chat or system is not None):
        raise ValueError(
            "--chat and --system come before the document; pass them to jaxkv compress."
        )
    lm, read = flags.load_model_and_context(
        model, dtype, context, document, follow_links=follow_links, mesh=mesh
    )
    arguments["sampler"] = sampling.sampler_of(lm)
    # All at once, so that a bad prompt is found before a good one has cost anything.
    if read is None:
        asked = prompts.encode(lm, records, arguments, chat=chat, system=system)
    else:
        asked = prompts.encode_behind(lm, read, records, arguments)
    job = answers.Job(
        arguments=arguments,
        context=read,
        batch_size=batch_size,
        seed=seed,
        as_json=json_,
        stream=stream,
    )
    answers.run(lm, asked, job)
    plain = any(isinstance(a.record.body, str) and not a.messages for a in asked)
    if plain and read is None and speaks_in_chats(lm):
        say(f"{lm.name} has a chat template, and is asked without; see --chat")
