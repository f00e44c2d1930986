"""`jaxkv compress`: documents read once, and kept in a folder to be asked."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from jaxkv import registry
from jaxkv.cli import flags, prompts
from jaxkv.cli.generate import Speculation
from jaxkv.cli.groups import grouped
from jaxkv.cli.terminal import say
from jaxkv.contexts.files import check_folder, save_context
from jaxkv.policies.full import Full
from jaxkv.text.documents import compress as compress_documents


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cut:
    """What is kept of each document."""

    budget: Annotated[
        str | None,
        typer.Option(
            help="Tokens that each layer and head may keep of a document, such as 512, "
            "or a share of them, such as 10%; default: all."
        ),
    ] = None
    prefill: Annotated[
        str | None,
        typer.Option(
            help=f"Eviction of the document: {', '.join(registry.PREFILL)}; options "
            "follow, as in streaming-llm:n_sink=2. One of your own is "
            "my_module:MyPolicy. Default: kvzip, or dapq with --question; full without "
            "--budget."
        ),
    ] = None
    question: Annotated[
        str | None,
        typer.Option(
            help="What the choice of tokens should serve; nothing of it is kept."
        ),
    ] = None

    @property
    def arguments(self) -> dict[str, Any]:
        """Arguments of `jaxkv.compress`.

        Raises:
          ValueError: unknown names or options, or nothing says how much to evict.
        """
        return self._kept | {"question": self.question}

    @property
    def _kept(self) -> dict[str, Any]:
        usual = "kvzip" if self.question is None else "dapq"
        name = self.prefill or ("full" if self.budget is None else usual)
        policy = registry.parse(name, registry.PREFILL, flag="--prefill")
        if self.budget is None:
            if policy != Full():
                raise ValueError(f"--prefill {self.prefill} evicts and needs --budget.")
            return {"prefill": policy}
        text = self.budget.strip()
        try:
            if text.endswith("%"):
                share = float(text[:-1]) / 100
                if not 0 < share <= 1:
                    raise ValueError
                return {"prefill": policy, "compression_ratio": 1 - share}
            if int(text) < 1:
                raise ValueError
            return {"prefill": policy, "budget": int(text)}
        except ValueError:
            raise ValueError(
                "--budget takes a number of tokens, or a share above 0% and up to "
                f"100%, got {self.budget!r}."
            ) from None


@grouped
def compress(
    *,
    model: flags.Model,
    out: Annotated[Path, typer.Argument(help="Folder to make.")],
    prompt: Annotated[
        list[str] | None, typer.Option(help="A document; may be repeated.")
    ] = None,
    prompt_file: Annotated[
        list[Path] | None,
        typer.Option(
            help="A file that is one document, or a .jsonl file with one per line; may "
            "be repeated. Without any, standard input is read."
        ),
    ] = None,
    cut: Cut,
    chat: Annotated[
        bool,
        typer.Option(
            "--chat", help="Let documents begin a user's message of the chat template."
        ),
    ] = False,
    system: Annotated[
        str | None, typer.Option(help="What the system says first, with --chat.")
    ] = None,
    speculation: Annotated[
        str,
        typer.Option(
            "--speculate", help="Drafts of later answers, if they are aligned ones."
        ),
    ] = "none",
    dtype: flags.Dtype = None,
    follow_links: flags.FollowLinks = False,
    mesh: flags.Mesh = None,
    batch_size: flags.BatchSize = 8,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace an older context.")
    ] = False,
) -> None:
    """Read documents once and keep a budget of each, for generate --context."""
    arguments = cut.arguments
    drafter = Speculation(speculate=speculation).arguments["speculate"]
    if system is not None and not chat:
        raise ValueError("--system goes with --chat.")
    check_folder(out, overwrite=overwrite)
    records = prompts.read(prompt or [], prompt_file or [])
    lm = flags.load_model(model, dtype, follow_links=follow_links, mesh=mesh)
    documents, parts = _documents(records), []
    for first in range(0, len(documents), batch_size):
        part = compress_documents(
            lm,
            documents[first : first + batch_size],
            chat=chat,
            system=system,
            speculate=drafter,
            **arguments,
        )
        parts.append(part)
    context = parts[0].join(*parts[1:])
    save_context(context, out, overwrite=overwrite)
    say(f"{out}: {context}")


def _documents(records: Sequence[prompts.Record]) -> list[Any]:
    """Return the documents, texts or token ids."""
    for record in records:
        if record.messages:
            raise ValueError(
                f"{record.where}: a document is a text, not a conversation."
            )
    return [record.prompt for record in records]
