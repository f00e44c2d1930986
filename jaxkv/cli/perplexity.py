"""`jaxkv eval perplexity`: the loss of real text under a budget."""

import contextlib
import json
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from jaxkv import figures
from jaxkv.cli import flags
from jaxkv.cli.groups import grouped
from jaxkv.cli.progress import shown
from jaxkv.cli.sweep import print_markdown
from jaxkv.cli.terminal import say
from jaxkv.evaluation import perplexity as measuring
from jaxkv.evaluation.folder import check_writable
from jaxkv.evaluation.lock import one_writer
from jaxkv.evaluation.methods import (
    parse_budgets,
    parse_decode_methods,
    parse_prefill_methods,
)
from jaxkv.language_model import NEEDLE


@grouped
def perplexity(
    *,
    model: flags.Model = NEEDLE,
    text: Annotated[
        list[str] | None,
        typer.Option(help="A file of text; may be repeated. Default: Python's topics."),
    ] = None,
    evict: Annotated[
        Literal["output", "prompt"],
        typer.Option(
            help="output: --methods decide what decoding forgets; prompt: what is left "
            "of the first --prompt tokens."
        ),
    ] = "output",
    methods: Annotated[
        str, typer.Option(help="Methods with commas, each with its options.")
    ] = "full,streaming-llm,longflow,h2o,tova,vatp,r-kv",
    budgets: Annotated[
        str, typer.Option(help="Tokens, or percentages of --length, with commas.")
    ] = "64,128,256,512,1024",
    length: Annotated[int, typer.Option(min=2, help="Tokens of a window.")] = 4096,
    prompt: Annotated[
        int, typer.Option(min=1, help="Tokens that are read at once and not counted.")
    ] = 32,
    prefill: flags.Prefill = "full",
    development: Annotated[
        bool,
        typer.Option("--development", help="Take the other half of the windows."),
    ] = False,
    batch_size: Annotated[
        int, typer.Option(min=1, help="Windows that are read together.")
    ] = 8,
    dtype: flags.Dtype = None,
    follow_links: flags.FollowLinks = False,
    mesh: flags.Mesh = None,
    kernels: flags.Kernels,
    out: Annotated[
        Path | None, typer.Option(help="JSON file; the same command goes on with it.")
    ] = None,
    json_: flags.Json = False,
) -> None:
    """Measure the loss of given text, fed token by token through each method."""
    if evict == "output":
        chosen = parse_decode_methods(methods, prefill=prefill)
    elif prefill != "full":
        raise ValueError("--prefill goes with --evict output; name it in --methods.")
    else:
        chosen = parse_prefill_methods(methods, decode="full")
    sizes = parse_budgets(budgets)
    if out is not None:
        if out.is_dir():
            raise ValueError(f"--out takes a file, but {out} is a folder.")
        check_writable(out.parent)
    names = text or [measuring.PYDOC]
    texts = measuring.read_texts(names)
    lm = flags.load_model(model, dtype, follow_links=follow_links, mesh=mesh)
    if lm.tokenizer is None:
        raise ValueError(f"{lm.name} has no tokenizer, which perplexity needs.")
    if length > lm.config.max_positions:
        raise ValueError(
            f"--length {length} exceeds the {lm.config.max_positions} positions that "
            f"{lm.name} was made for."
        )
    tokens = measuring.chosen_windows(lm, texts, length=length, development=development)
    alone: Any = contextlib.nullcontext()
    if out is not None:
        alone = one_writer(out.parent, name=out.name)
    with alone, shown("texts") as show:
        record = measuring.measure(
            *(lm, tokens, chosen, sizes),
            prompt=prompt,
            batch_size=batch_size,
            config={"evict": evict, "prefill": prefill, "development": development},
            file=out,
            show=show,
            **kernels.arguments,
        )
    if out is not None and figures.available():
        measuring.draw(record, out.with_suffix(""))
    if json_:
        print(json.dumps(record))
        return
    print_markdown(measuring.report(record))
    if out is not None:
        say(f"results: {out}")
