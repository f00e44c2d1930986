"""Groups of flags: each field is a flag in the group's place."""

import dataclasses
import inspect
from typing import Annotated

import pytest
import typer

from jaxkv.cli.groups import grouped


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sizes:
    batch: Annotated[int, typer.Option(min=1)] = 2
    slots: Annotated[int, typer.Option("--room")] = 8


@pytest.fixture
def run(capsys):
    """Run a command that has the flag `--first`, then a group, then `--last`."""
    seen = []

    @grouped
    def command(*, first: str = "a", sizes: Sizes, last: bool = False) -> None:
        """Say what it does."""
        seen.append((first, sizes, last))

    app = typer.Typer(add_completion=False)
    app.command()(command)

    def run(*arguments):
        app(arguments, standalone_mode=False)
        return seen[-1] if seen else capsys.readouterr().out

    run.command = command
    return run


def test_the_command_gets_the_group_whole(run):
    assert run() == ("a", Sizes(), False)
    found = run("--room", "3", "--first=b", "--last", "--batch=5")
    assert found == ("b", Sizes(batch=5, slots=3), True)


def test_flags_stand_in_the_groups_place(run):
    names = list(inspect.signature(run.command).parameters)
    assert names == ["first", "batch", "slots", "last"]
    assert "Say what it does." in run("--help")


def test_bounds_of_a_field_hold(run):
    with pytest.raises(typer.TyperException, match="greater than or equal to 1"):
        run("--batch=0")
