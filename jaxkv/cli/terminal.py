"""What commands show while they run: a progress bar, and one line at the end."""

import sys
from collections.abc import Iterable

import jax
import rich.console
import rich.progress
from rich.table import Column

from jaxkv.language_model import LanguageModel
from jaxkv.speculation.counts import together
from jaxkv.text.completion import Stats


def progress(*, hidden: bool = False) -> rich.progress.Progress:
    """Return a bar on stderr that leaves nothing behind, for terminals only."""
    console = rich.console.Console(stderr=True)
    return rich.progress.Progress(
        rich.progress.TextColumn("{task.description}"),
        rich.progress.BarColumn(),
        rich.progress.MofNCompleteColumn(),
        rich.progress.TimeElapsedColumn(),
        console=console,
        transient=True,
        disable=hidden or not console.is_terminal,
    )


def say(message: str) -> None:
    """Print one line on stderr."""
    print(f"jaxkv: {' '.join(message.split())}", file=sys.stderr)


def announce(lm: LanguageModel, stats: Iterable[Stats]) -> None:
    """Print the one line that says what ran where, on stderr."""
    stats = list(stats)
    device = jax.devices()[0]
    # Prompts of other lengths may get another implementation.
    prefill = "+".join(sorted({s.prefill_implementation for s in stats}))
    decode = "+".join(sorted({s.decode_implementation for s in stats}))
    drafts = [s.drafts for s in stats if s.drafts]
    spoken = f"; {together(drafts)}" if drafts else ""
    kind = "" if device.device_kind == device.platform else f" ({device.device_kind})"
    say(
        f"{lm.name} on {device.platform}{kind}, {lm.dtype.name}, "
        f"prefill={prefill}, decode={decode}{spoken}"
    )


def megabytes(num_bytes: float) -> str:
    """Return a size with three digits or more, in MB."""
    return (
        f"{num_bytes / 1e6:.3g} MB" if num_bytes < 1e8 else f"{num_bytes / 1e6:.0f} MB"
    )


def right_aligned(*names: str) -> list[Column]:
    """Return columns of a table whose numbers stand one below the other."""
    return [Column(name, justify="right", no_wrap=True) for name in names]
