"""`jaxkv serve`: an engine behind OpenAI's API."""

import dataclasses
import importlib.util
from pathlib import Path
from typing import Annotated, Any

import typer

from jaxkv.cli import flags
from jaxkv.cli.generate import Speculation
from jaxkv.cli.groups import grouped
from jaxkv.cli.terminal import say
from jaxkv.serving.engine import Engine

_NEEDS = ("prometheus_client", "pydantic", "starlette", "uvicorn")
ApiKeyFile = Annotated[
    Path | None,
    typer.Option(help="A file whose only line is the key that requests must bring."),
]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rows:
    """The rows of an engine, and what a request may want of one."""

    rows: Annotated[
        int, typer.Option(min=1, help="Requests that are answered together.")
    ] = 8
    max_prompt: Annotated[
        int, typer.Option(min=1, help="Longest prompt, in tokens.")
    ] = 1024
    max_new_tokens: Annotated[
        int, typer.Option(min=1, help="Longest answer, in tokens.")
    ] = 256
    block: Annotated[
        int, typer.Option(min=1, help="Decode steps between two pieces of a stream.")
    ] = 16
    stall: Annotated[
        int,
        typer.Option(min=1, help="Prompt tokens that are read between two blocks."),
    ] = 2048
    top_logprobs: Annotated[
        int | None,
        typer.Option(min=0, max=20, help="Alternatives to a token that may be asked."),
    ] = None
    repetition_penalties: Annotated[
        bool,
        typer.Option("--repetition-penalties", help="Requests may have a penalty."),
    ] = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class Doors:
    """Where a server listens, to whom, and for how long."""

    host: Annotated[
        str, typer.Option(help="Address to listen at; default: this machine only.")
    ] = "127.0.0.1"
    port: Annotated[int, typer.Option(min=0, max=65535, help="0: any.")] = 8000
    name: Annotated[
        str | None, typer.Option(help="Of the model, for clients; default: its own.")
    ] = None
    api_key_file: ApiKeyFile = None
    queue: Annotated[
        int, typer.Option(min=0, help="Requests that may wait; more get 429.")
    ] = 64
    max_body: Annotated[
        int, typer.Option(min=1, help="Bytes of a request; more get 413.")
    ] = 2**20
    timeout: Annotated[
        float, typer.Option(min=0.1, help="Seconds of a request; then 408.")
    ] = 600.0
    body_timeout: Annotated[
        float, typer.Option(min=0.1, help="Seconds until a request has arrived.")
    ] = 10.0
    grace: Annotated[
        float,
        typer.Option(min=0, help="Seconds to end what runs, at SIGTERM."),
    ] = 60.0


@grouped
def serve(
    model: flags.Model,
    *,
    rows: Rows,
    budget: flags.Budget = None,
    prefill: flags.Prefill = "full",
    decode: flags.Decode = "full",
    speculation: Speculation,
    kernels: flags.Kernels,
    doors: Doors,
    warm_up: Annotated[
        bool, typer.Option(help="Compile for prompts of all lengths before listening.")
    ] = True,
    dtype: flags.Dtype = None,
    follow_links: flags.FollowLinks = False,
    mesh: flags.Mesh = None,
) -> None:
    """Answer requests of OpenAI's API, many at a time, on rows of fixed size."""
    missing = [name for name in _NEEDS if importlib.util.find_spec(name) is None]
    if missing:
        raise ValueError(
            f"jaxkv serve needs {', '.join(missing)}; pip install 'jaxkv[serve]'."
        )
    from jaxkv.server import app, gate
    from jaxkv.server.server import Server, listen

    eviction = flags.Eviction(budget=budget, prefill=prefill, decode=decode)
    arguments: dict[str, Any] = {**eviction.arguments, **speculation.arguments}
    arguments |= dataclasses.asdict(rows) | kernels.arguments
    del arguments["compression_ratio"]
    key = read_key(doors.api_key_file)
    lm = flags.load_model(model, dtype, follow_links=follow_links, mesh=mesh)
    if lm.tokenizer is None:
        raise ValueError(f"{model} has no tokenizer, and answers are texts.")
    name = doors.name or Path(model).name
    engine = Engine(dataclasses.replace(lm, name=name), **arguments)
    loopback = gate.is_loopback(doors.host)
    terms = app.Terms(
        name=name,
        max_prompt=rows.max_prompt,
        max_new_tokens=rows.max_new_tokens,
        top_logprobs=rows.top_logprobs,
        repetition_penalties=rows.repetition_penalties,
        evicts=budget is not None,
        queue=doors.queue,
        max_body=doors.max_body,
        body_seconds=doors.body_timeout,
        seconds=doors.timeout,
        key=key,
        hosts=gate.own_names(doors.host) if loopback else None,
    )
    with listen(doors.host, doors.port) as listener:
        service = app.Service(engine, terms)
        if warm_up:
            say("compiling for prompts of all lengths")
            service.warm_up()
        server = Server(service, seconds=doors.body_timeout, grace=doors.grace)
        if not loopback and key is None:
            say(
                f"{doors.host} may be reached by others, and there is no --api-key-file"
            )
        address, port = listener.getsockname()[:2]
        shown = f"[{address}]" if ":" in address else address
        say(f"serving {name} at http://{shown}:{port}/v1; Ctrl-C ends it")
        server.run(sockets=[listener])


def read_key(file: Path | None) -> str | None:
    """Return the key in a file, None without one.

    Raises:
      ValueError: it has no key, more than a line, or is no text.
    """
    if file is None:
        return None
    try:
        lines = file.read_text(encoding="utf-8").split("\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"--api-key-file: {file} is no UTF-8 text.") from error
    key = lines[0].strip()
    if not key or any(line.strip() for line in lines[1:]):
        raise ValueError("--api-key-file: the file must have one line, the key.")
    return key
