"""`jaxkv eval export`: results in the form that others take."""

from pathlib import Path
from typing import Annotated

import typer

from jaxkv.evaluation.board import export as export_board


def export(
    folder: Annotated[Path, typer.Argument(help="Folder of results.")],
    out: Annotated[Path, typer.Argument(help="Where the new folders go.")],
    board: Annotated[
        bool,
        typer.Option("--board", help="As kvpress writes them, for its public board."),
    ] = False,
    length: Annotated[
        int | None,
        typer.Option(min=1, help="What the board calls the samples' length: 4096."),
    ] = None,
    model_name: Annotated[
        str | None, typer.Option(help="What the board calls the model.")
    ] = None,
) -> None:
    """Write a folder for each method and budget, as a board takes it."""
    if not board:
        raise ValueError("jaxkv eval export knows one form; add --board.")
    for place in export_board(folder, out, length=length, model=model_name):
        print(place)
