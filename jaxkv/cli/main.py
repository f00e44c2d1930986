"""The command `jaxkv`: flags in, one call into the library; errors in one place.

Results go to stdout, everything else to stderr. Bad input gives one line and exit code
2; what is no user's fault keeps its traceback.
"""

import dataclasses
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import Annotated, Any

import jax
import typer

from jaxkv._version import __version__
from jaxkv.cli import (
    batch,
    calibrate,
    chat,
    checkpoints,
    compress,
    demo,
    evaluate,
    generate,
    harness,
    plan,
    serve,
    study,
    wording,
)
from jaxkv.cli.interrupts import noted_interrupts
from jaxkv.cli.streams import complain, escaped_output, flushed_output
from jaxkv.cli.terminal import say
from jaxkv.models.checkpoint import CheckpointError
from jaxkv.runtime.compilation_cache import enable_compilation_cache
from jaxkv.runtime.devices import check_devices

app = typer.Typer(
    add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None
)
app.add_typer(evaluate.app, name="eval")
app.add_typer(study.app, name="study")


@dataclasses.dataclass
class _Settings:
    """What the error handler has to know of the flags."""

    debug: bool = False


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code.

    Args:
      argv: the arguments; those of the process if None.
    """
    if sys.stderr is None:  # print would take stdout instead
        sys.stderr = open(os.devnull, "w")  # for the rest of the process
    if sys.stdout is None:
        complain("standard output is closed; send it to a file, or to /dev/null.")
        return 2
    with flushed_output(), escaped_output() as escaped:
        with noted_interrupts() as interrupted:
            code = _run(sys.argv[1:] if argv is None else list(argv), interrupted)
        if escaped():
            say(
                f"standard output is in {sys.stdout.encoding}, which lacks some "
                r"characters; they are written as \xe9. Set PYTHONIOENCODING to utf-8."
            )
        return code


def _run(argv: Sequence[str], interrupted: Callable[[], bool]) -> int:
    settings = _Settings()
    try:
        if any(argument == "" or argument.endswith("=") for argument in argv):
            wording.check_empty(every_command(), argv)
        code = app(argv, prog_name="jaxkv", standalone_mode=False, obj=settings)
        sys.stdout.flush()
        return code or 0
    except (BrokenPipeError, SystemExit):  # typer's way to say the same
        return 1  # the reader has gone, and has what it wanted
    except (KeyboardInterrupt, typer.Abort):
        return 130
    except ImportError:
        # Modules in C make this of an interrupt while they are imported.
        if interrupted():
            return 130
        raise
    except typer.TyperException as error:
        message = error.format_message()
        if message:  # none where the help has been shown instead
            complain(message)
        return 2
    except Exception as error:
        said = _message(error)
        if said is None or settings.debug:
            raise
        # What is wrong in a checkpoint is named as its files name it.
        if isinstance(error, ValueError) and not isinstance(error, CheckpointError):
            known = wording.parameters(every_command(), argv)
            said = wording.in_flags(said, known)
        complain(said)
        return 2


def _message(error: Exception) -> str | None:
    """Return what to tell the user, or None for a fault of ours."""
    match error:
        case OSError() if error.strerror:
            where = f"{error.filename}: " if error.filename else ""
            return f"{where}{error.strerror}"
        case ValueError() if _is_of_jax(error):
            return None  # a setting such as JAX_NUMPY_DTYPE_PROMOTION meets our code
        case ValueError() | NotImplementedError() | OverflowError() | OSError():
            return str(error) or type(error).__name__
        case MemoryError():
            pass
        case jax.errors.JaxRuntimeError() if "RESOURCE_EXHAUSTED" in str(error):
            pass
        case _:
            return _missing_device()
    return (
        "out of memory; lower --batch-size, --max-new-tokens or --budget, shorten the "
        f"prompts, or take --dtype bfloat16 ({str(error)[:200]})"
    )


def _is_of_jax(error: Exception) -> bool:
    """Return whether JAX has raised this, and not we, for what it was given."""
    *_, (frame, _) = traceback.walk_tb(error.__traceback__)
    return frame.f_globals.get("__name__", "").partition(".")[0] in ("jax", "jaxlib")


def _missing_device() -> str | None:
    """Return what to tell where JAX has nothing to run on, else None."""
    try:
        check_devices()
    except ValueError as error:
        return str(error)
    return None


def _version(wanted: bool) -> None:
    if wanted:
        print(f"jaxkv {__version__}")
        raise typer.Exit


@app.callback(invoke_without_command=True)
def _start(
    context: typer.Context,
    debug: Annotated[
        bool, typer.Option("--debug", help="Show the traceback of an error.")
    ] = False,
    compilation_cache: Annotated[
        bool, typer.Option(help="Keep compiled programs for later runs.")
    ] = True,
    version: Annotated[
        bool,
        typer.Option("--version", callback=_version, is_eager=True, help="Print it."),
    ] = False,
) -> None:
    """Long-context inference in JAX with a key/value cache of fixed size."""
    context.obj.debug = debug
    if context.invoked_subcommand is None:
        print(context.get_help())
    elif context.invoked_subcommand == "bench":
        pass  # it times compilation, and has a flag of its own for the cache
    elif compilation_cache:
        enable_compilation_cache()


app.command()(demo.demo)
app.command()(generate.generate)
app.command()(batch.batch)
app.command()(compress.compress)
app.command()(chat.chat)
app.command()(serve.serve)
app.command()(plan.plan)
app.command()(checkpoints.train)
app.command()(checkpoints.convert)
app.command()(calibrate.calibrate)
app.command("lm-eval")(harness.lm_eval)


@app.command(
    add_help_option=False,
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
)
def bench(context: typer.Context) -> Any:
    """Measure decoding and compiling on this device."""
    parent = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    parent.add_typer(bench_commands(), name="bench")
    return parent(["bench", *context.args], prog_name="jaxkv", standalone_mode=False)


def every_command() -> Any:
    """Return the group of all commands, with those of `jaxkv bench`."""
    root: Any = typer.main.get_command(app)
    root.commands["bench"] = typer.main.get_command(bench_commands())
    return root


def bench_commands() -> typer.Typer:
    """Return all commands of `jaxkv bench`."""
    # They measure, and are needed by nobody else.
    from jaxkv.cli import bench, bench_attention, bench_speculate, bench_throughput

    commands = typer.Typer(
        no_args_is_help=True, help="Measure decoding and compiling on this device."
    )
    commands.command("decode")(bench.decode)
    commands.command("compile")(bench.compile_)
    commands.command("decode-attention")(bench_attention.decode_attention)
    commands.command("speculate")(bench_speculate.speculate)
    commands.command("throughput")(bench_throughput.throughput)
    return commands
