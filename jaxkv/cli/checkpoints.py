"""`jaxkv train` and `jaxkv convert`: checkpoints made, and made faster to load."""

import dataclasses
import importlib.util
import os
from pathlib import Path
from typing import Annotated

import typer

from jaxkv.cli import flags
from jaxkv.language_model import limited, locate, needle_folder, read_network
from jaxkv.models import orbax_copy
from jaxkv.needle import training


def train(
    out: Annotated[Path, typer.Argument(help="Folder; a run there is gone on with.")],
    workers: Annotated[
        int | None,
        typer.Option(min=1, help="Processes that make rows; default: cores."),
    ] = None,
    save_every: Annotated[int, typer.Option(min=1, help="Steps between saves.")] = 1000,
    steps_scale: Annotated[
        float, typer.Option(help="Multiplies the recipe's steps, for quick trials.")
    ] = 1.0,
) -> None:
    """Train the needle checkpoint; made for one data-centre GPU."""
    if importlib.util.find_spec("optax") is None:
        raise ValueError("jaxkv train needs optax; pip install 'jaxkv[train]'.")
    if not 0 < steps_scale < 1000:
        raise ValueError(f"--steps-scale must be above 0, got {steps_scale}.")

    def scaled(steps: int) -> int:
        return max(1, round(steps * steps_scale))

    recipe = training.Recipe()
    recipe = dataclasses.replace(
        recipe,
        warmup=scaled(recipe.warmup),
        stages=tuple(
            dataclasses.replace(stage, steps=scaled(stage.steps))
            for stage in recipe.stages
        ),
    )
    training.train(
        recipe,
        out,
        tokenizer_folder=needle_folder(),
        workers=workers or os.cpu_count() or 1,
        save_every=save_every,
    )


def convert(
    model: flags.Model,
    out: Annotated[Path, typer.Argument(help="Folder to make.")],
    dtype: Annotated[
        str | None, typer.Option(help="Of the copy; default: the checkpoint's.")
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace an older copy.")
    ] = False,
    follow_links: flags.FollowLinks = False,
    max_positions: Annotated[
        int | None,
        typer.Option(
            help="Longest sequence of the copy; default: the checkpoint's. LongRoPE "
            "rotates short ones otherwise."
        ),
    ] = None,
) -> None:
    """Save an Orbax copy of a checkpoint, which loads faster."""
    # Not by way of `load`, which on a CPU would widen 16-bit weights.
    folder = locate(model)
    if orbax_copy.is_orbax_copy(folder):
        raise ValueError(f"{folder} is an Orbax copy already.")
    network, params = read_network(folder, dtype=dtype, follow_links=follow_links)
    config = limited(network.config, max_positions)
    orbax_copy.save_orbax(params, config, out, source=folder, overwrite=overwrite)
