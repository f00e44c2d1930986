"""`jaxkv chat`: a conversation on the terminal, with any budget."""

import inspect
import sys
from collections.abc import Iterator
from typing import Annotated, Any

import typer

from jaxkv import registry
from jaxkv.cli import flags
from jaxkv.cli.generate import Sampling
from jaxkv.cli.groups import grouped
from jaxkv.cli.terminal import announce, megabytes, say
from jaxkv.cli.wording import in_flags
from jaxkv.policies.full import Full
from jaxkv.text.conversation import Chat
from jaxkv.text.terminal import TextStream

_BLOCK = 8  # tokens between two pieces of streamed text
_HELP = "/reset forgets all, /budget N (or all), /stats, /help, /exit (or Ctrl-D)"

Policy = Annotated[str | None, typer.Option(help="As in jaxkv generate.")]


@grouped
def chat(
    *,
    model: flags.Asked = None,
    context: flags.ContextFolder = None,
    document: flags.Document = 0,
    system: Annotated[
        str | None, typer.Option(help="What the system says first.")
    ] = None,
    budget: Annotated[
        int | None,
        typer.Option(
            min=1, help="Tokens of the conversation that each layer and head may keep."
        ),
    ] = None,
    prefill: Policy = None,
    decode: Policy = None,
    max_new_tokens: Annotated[
        int, typer.Option(min=1, help="Longest answer, in tokens.")
    ] = 512,
    sampling: Sampling,
    seed: flags.Seed = 0,
    dtype: flags.Dtype = None,
    follow_links: flags.FollowLinks = False,
) -> None:
    """Talk with a model; the cache stays between turns, within the budget."""
    for flag, policy in (("--prefill", prefill), ("--decode", decode)):
        if policy is not None and budget is None:
            raise ValueError(f"{flag} {policy} evicts and needs --budget.")
    policies: dict[str, Any] = {
        "prefill": prefill
        and registry.parse(prefill, registry.PREFILL, flag="--prefill"),
        "decode": decode and registry.parse(decode, registry.DECODE, flag="--decode"),
    }
    sampling.sampler  # noqa: B018 -- looked at before a model is loaded
    lm, read = flags.load_model_and_context(
        model, dtype, context, document, follow_links=follow_links
    )
    sampler = sampling.sampler_of(lm)

    def begin(tokens: int | None) -> Chat:
        # Where a budget comes later there may be no policies yet.
        given = policies if tokens is not None else {}
        return Chat.begin(
            lm,
            context=read,
            system=system,
            budget=tokens,
            sampler=sampler,
            seed=seed,
            **given,
        )

    talk = begin(budget)
    if sys.stdin.isatty():
        say(f"{lm.name}; {_HELP}")
    for line in _lines():
        command, _, argument = line.strip().partition(" ")
        if not command:
            continue
        if command in ("/exit", "/quit"):
            return
        try:
            if command == "/reset":
                talk = begin(talk.options.budget)
            elif command == "/budget":
                talk = talk.with_budget(_budget(argument))
                say("the next turn reads the conversation anew")
            elif command == "/stats":
                say(_stats(talk))
            elif command.startswith("/"):
                say(_HELP)
            else:
                talk = _turn(talk, line, max_new_tokens)
        except ValueError as error:  # one turn is not the whole conversation
            say(in_flags(str(error), inspect.signature(chat).parameters))


def _turn(talk: Chat, text: str, max_new_tokens: int) -> Chat:
    """Return the chat after a turn; Ctrl-C leaves it as it was."""
    stream = TextStream(talk.lm.tokenizer, _write)
    try:
        after, out = talk.say(
            text, max_new_tokens=max_new_tokens, on_tokens=stream, block=_BLOCK
        )
    except KeyboardInterrupt:
        _write("\n")
        say("interrupted; this turn is forgotten")
        return talk
    stream.finish(out.text[0])
    _write("\n")
    if not talk.tokens:
        announce(talk.lm, [out.stats])
    say(_stats(after))
    return after


def _stats(talk: Chat) -> str:
    budget = "all" if talk.options.budget is None else talk.options.budget
    policies = [talk.options.prefill, talk.options.decode]
    kept = [type(policy).__name__ for policy in policies if policy != Full()]
    by = f" by {' and '.join(kept)}" if kept else ""
    return (
        f"{len(talk.tokens)} tokens seen, {talk.kept} kept (budget {budget}{by}), "
        f"{megabytes(talk.cache_bytes)}"
    )


def _budget(argument: str) -> int | None:
    if argument.strip() in ("", "all"):
        return None
    try:
        return int(argument)
    except ValueError:
        raise ValueError(
            f"/budget takes a number of tokens, or all, got {argument.strip()!r}."
        ) from None


def _lines() -> Iterator[str]:
    """Yield what is typed, or what standard input holds, line by line."""
    if not sys.stdin.isatty():
        yield from (line.rstrip("\n") for line in sys.stdin)
        return
    while True:
        try:
            yield input("> ")
        except EOFError:
            return


def _write(text: str) -> None:
    print(text, end="", flush=True)
