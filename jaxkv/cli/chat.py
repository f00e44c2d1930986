"""`jaxkv chat`: a conversation on the terminal, with a model here or a server's."""

import dataclasses
import inspect
import sys
from collections.abc import Callable, Iterator
from typing import Annotated, Any, Protocol

import typer

from jaxkv import registry
from jaxkv.cli import flags
from jaxkv.cli.generate import Sampling
from jaxkv.cli.groups import grouped
from jaxkv.cli.remote import RemoteChat
from jaxkv.cli.serve import ApiKeyFile
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
    server: Annotated[
        str | None,
        typer.Option(help="URL of a server of OpenAI's API, as jaxkv serve names it."),
    ] = None,
    api_key_file: ApiKeyFile = None,
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
    mesh: flags.Mesh = None,
) -> None:
    """Talk with a model; the cache stays between turns, within the budget."""
    if server is not None:
        local = {
            "context": context,
            "document": document,
            "prefill": prefill,
            "decode": decode,
            "dtype": dtype,
            "follow_links": follow_links,
            "use_generation_config": sampling.use_generation_config,
        }
        settings = _settings(sampling, max_new_tokens, seed, local)
        remote = RemoteChat(
            server,
            model=model,
            key_file=api_key_file,
            system=system,
            budget=budget,
            settings=settings,
            write=_write,
        )
        return _converse(remote)
    if api_key_file is not None:
        raise ValueError("--api-key-file does nothing without --server.")
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
        model, dtype, context, document, follow_links=follow_links, mesh=mesh
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

    _converse(_LocalChat(begin, budget, max_new_tokens))


def _settings(
    sampling: Sampling, max_new_tokens: int, seed: int, local: dict[str, Any]
) -> dict[str, Any]:
    """Return the fields of requests, or raise ValueError for flags without meaning."""
    for name, value in local.items():
        if value not in (None, False, 0):
            flag = "--" + name.replace("_", "-")
            raise ValueError(f"{flag} is the server's, and does not go with --server.")
    sampling.sampler  # noqa: B018 -- it checks the flags
    drawn = {n: x for n, x in dataclasses.asdict(sampling).items() if x is not None}
    del drawn["use_generation_config"]
    settings = {"temperature": 0.0, "max_tokens": max_new_tokens, "seed": seed}
    return settings | drawn


class _Conversation(Protocol):
    """What is talked with, here or at a server."""

    name: str

    def reset(self) -> None: ...

    def set_budget(self, budget: int | None) -> None: ...

    def stats(self) -> str: ...

    def turn(self, text: str) -> None: ...


class _LocalChat:
    """A conversation with a model of this process."""

    def __init__(
        self,
        begin: Callable[[int | None], Chat],
        budget: int | None,
        max_new_tokens: int,
    ):
        self._begin, self._most = begin, max_new_tokens
        self._talk = begin(budget)
        self.name = self._talk.lm.name

    def reset(self) -> None:
        self._talk = self._begin(self._talk.options.budget)

    def set_budget(self, budget: int | None) -> None:
        self._talk = self._talk.with_budget(budget)
        say("the next turn reads the conversation anew")

    def stats(self) -> str:
        return _stats(self._talk)

    def turn(self, text: str) -> None:
        self._talk = _turn(self._talk, text, self._most)


def _converse(talk: _Conversation) -> None:
    """Take lines until they end."""
    if sys.stdin.isatty():
        say(f"{talk.name}; {_HELP}")
    for line in _lines():
        command, _, argument = line.strip().partition(" ")
        if not command:
            continue
        if command in ("/exit", "/quit"):
            return
        try:
            if command == "/reset":
                talk.reset()
            elif command == "/budget":
                talk.set_budget(_budget(argument))
            elif command == "/stats":
                say(talk.stats())
            elif command.startswith("/"):
                say(_HELP)
            else:
                talk.turn(line)
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
