"""The flags that commands share, and what the library is handed for them."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import jax
import typer

from jaxkv import registry
from jaxkv.arguments import static_options
from jaxkv.kernels import decode as decode_kernels
from jaxkv.kernels import prefill as prefill_kernels
from jaxkv.language_model import LanguageModel, load
from jaxkv.options import Options
from jaxkv.policies.full import Full
from jaxkv.sampling import Categorical, Greedy, Sampler
from jaxkv.speculation.rules import Exact

Model = Annotated[
    str,
    typer.Argument(help="The shipped checkpoint (needle), a folder, or a Hub id."),
]
Dtype = Annotated[
    str | None,
    typer.Option(help="float32, bfloat16 or float16; default: what suits the device."),
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
        "as in streaming-llm:n_sink=2.",
    ),
]
Decode = Annotated[
    str,
    typer.Option(
        help=f"Eviction of the output: {', '.join(registry.DECODE)}; options likewise."
    ),
]
Speculate = Annotated[
    str,
    typer.Option(
        help=f"Drafts: none, {', '.join(registry.SPECULATE)}; options likewise."
    ),
]
Accept = Annotated[
    str,
    typer.Option(
        help=f"Which drafts pass: {', '.join(registry.ACCEPT)}; "
        "all but exact are lossy."
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
BatchSize = Annotated[
    int, typer.Option(min=1, help="Prompts that are generated from together.")
]
Seed = Annotated[int, typer.Option(min=0, max=2**32 - 1, help="Of all random draws.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON and nothing else.")]

# Of `jaxkv generate` alone.
Prompt = Annotated[list[str] | None, typer.Option(help="A prompt; may be repeated.")]
PromptFile = Annotated[
    list[Path] | None,
    typer.Option(
        help="A file that is one prompt, or a .jsonl file with one per line; may be "
        "repeated. Without any prompt, standard input is read."
    ),
]
Chat = Annotated[bool, typer.Option("--chat", help="Wrap prompts in a chat template.")]
MaxNewTokens = Annotated[int, typer.Option(min=1, help="Longest output, in tokens.")]
Temperature = Annotated[float, typer.Option(help="0 takes the likeliest token.")]
TopK = Annotated[int | None, typer.Option(help="Draw from this many; 0: all.")]
TopP = Annotated[float | None, typer.Option(help="Draw from this probability mass.")]
MinP = Annotated[
    float | None,
    typer.Option(help="Least probability, relative to the likeliest token's."),
]
RepetitionPenalty = Annotated[
    float, typer.Option(help="Makes tokens seen before less likely; 1 is off.")
]
StopId = Annotated[
    list[int] | None,
    typer.Option(
        min=0,
        max=2**31 - 1,
        help="Token id that ends an output; may be repeated; default: the model's.",
    ),
]
Stream = Annotated[
    bool | None,
    typer.Option(help="Show text as it comes; default: one prompt, on a terminal."),
]


def load_model(model: str, dtype: str | None) -> LanguageModel:
    """Load a model, after a look at whether JAX has a device to put it on.

    Raises:
      ValueError: it has none.
    """
    try:
        jax.devices()
    except RuntimeError as error:  # e.g. JAX_PLATFORMS names what is not there
        raise ValueError(f"JAX finds no device: {error}") from error
    return load(model, dtype=dtype)


def eviction(
    *,
    budget: int | None,
    compression_ratio: float | None,
    prefill: str,
    decode: str,
) -> dict[str, Any]:
    """Return the arguments of `jaxkv.generate` that say what the cache keeps.

    Raises:
      ValueError: unknown names or options, or nothing says how much to evict.
    """
    policies = {
        "prefill": registry.parse(prefill, registry.PREFILL, flag="--prefill"),
        "decode": registry.parse(decode, registry.DECODE, flag="--decode"),
    }
    bounded = budget is not None or compression_ratio is not None
    if not bounded and any(policy != Full() for policy in policies.values()):
        # What evicts the output needs one budget for all rows.
        ratio = "" if policies["decode"].evicts else " or --compression-ratio"
        raise ValueError(
            f"--prefill {prefill} --decode {decode} evicts and needs --budget{ratio}."
        )
    return {"budget": budget, "compression_ratio": compression_ratio, **policies}


def speculation(*, speculate: str, accept: str) -> dict[str, Any]:
    """Return the arguments of `jaxkv.generate` that say how tokens are drafted.

    Raises:
      ValueError: unknown names or options, or a rule that has nothing to accept.
    """
    if speculate == "none":
        drafter = None
    elif speculate.partition(":")[0] in registry.SPECULATE:
        drafter = registry.parse(speculate, registry.SPECULATE, flag="--speculate")
    else:
        raise ValueError(
            f"--speculate: unknown {speculate!r}; choose one of none, "
            f"{', '.join(registry.SPECULATE)}."
        )
    rule = registry.parse(accept, registry.ACCEPT, flag="--accept")
    if drafter is None and rule != Exact():
        raise ValueError(
            f"--accept {accept} does nothing without drafts; add --speculate "
            f"{' or '.join(registry.SPECULATE)}."
        )
    return {"speculate": drafter, "accept": rule}


def check(arguments: Mapping[str, Any]) -> None:
    """Check arguments of `jaxkv.generate`, as it does, before a checkpoint is loaded.

    Raises:
      ValueError: what needs neither a model nor its prompts is wrong.
    """
    names = {field.name for field in dataclasses.fields(Options)}
    options = static_options(**{n: x for n, x in arguments.items() if n in names})
    # A ratio makes a budget of each prompt, which `generate` checks.
    options.check(None if arguments["compression_ratio"] is None else ())


def sampler(
    *,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    min_p: float | None,
    repetition_penalty: float,
) -> Sampler:
    """Return the sampler of the flags; a temperature of 0 is greedy.

    Raises:
      ValueError: a value would have no effect.
    """
    cuts = {"top_k": top_k, "top_p": top_p, "min_p": min_p}
    cuts = {name: value for name, value in cuts.items() if value is not None}
    if temperature != 0:
        return Categorical(
            temperature=temperature, repetition_penalty=repetition_penalty, **cuts
        )
    if cuts:
        flag = "--" + next(iter(cuts)).replace("_", "-")
        raise ValueError(
            f"{flag} does nothing at temperature 0, which is greedy; add --temperature."
        )
    return Greedy(repetition_penalty=repetition_penalty)
