"""`jaxkv calibrate`: what a network's queries are like, for `triattention`."""

from pathlib import Path
from typing import Annotated

import typer

from jaxkv import calibration
from jaxkv.cli import flags
from jaxkv.cli.terminal import say
from jaxkv.tasks.records import decode_text


def calibrate(
    model: flags.Model,
    text: Annotated[list[Path], typer.Option(help="A file of text; may be repeated.")],
    out: Annotated[Path, typer.Option(help="File to write.")] = Path(
        "triattention.npz"
    ),
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace an older file.")
    ] = False,
    length: Annotated[int, typer.Option(min=1, help="Tokens of a window.")] = 1024,
    batch_size: flags.BatchSize = 4,
    dtype: flags.Dtype = None,
    follow_links: flags.FollowLinks = False,
    mesh: flags.Mesh = None,
) -> None:
    """Count a network's queries over text, for --decode triattention:stats=FILE."""
    if out.is_dir() or not out.resolve().parent.is_dir():
        raise ValueError(f"--out {out} must be a file in a folder that is there.")
    if out.exists() and not overwrite:
        raise ValueError(
            f"--out {out} is there already; pass --overwrite to replace it."
        )
    texts = [decode_text(path.read_bytes(), str(path)) for path in text]
    for path, content in zip(text, texts, strict=True):
        if not content.strip():
            raise ValueError(f"--text {path} holds no text; name another file.")
    lm = flags.load_model(model, dtype, follow_links=follow_links, mesh=mesh)
    longest = min(length, lm.config.max_positions)
    found = calibration.calibrate(lm, texts, length=longest, batch_size=batch_size)
    calibration.save(found, out, model=lm.name, dtype=lm.dtype.name)
    layers, heads, size = found.mean.shape
    say(f"{out}: queries of {layers} layers, {heads} heads of size {size}")
