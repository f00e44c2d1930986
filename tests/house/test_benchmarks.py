"""Scripts of `benchmarks/` load, and take what `benchmarks/jobs/` gives them.

CI runs none of them on a GPU; that the names they use exist, `.ci/types` sees.
"""

import functools
import importlib
import os
import re
import shlex
import sys
from pathlib import Path

import pytest
import typer

from jaxkv import registry
from jaxkv.cli import main
from jaxkv.evaluation.methods import parse_prefill_methods

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = sorted((ROOT / "benchmarks").glob("*.py"))
OPTIONAL = {"kvpress", "pandas", "torch", "transformers", "triton"}
# Of scripts whose names are their own: an option, what parts it, and who knows them.
NAMED = {
    "compiled_torch": ("peers", ",", lambda module: module.PEERS),
    "drafts_auto": ("variants", ",", lambda module: module.VARIANTS),
    "exact_prompts": ("only", ",", lambda module: module.variants(8)),
    "first_token": ("methods", ";", lambda module: Methods(registry.PREFILL)),
    "kvpress_scores": ("methods", ",", lambda module: module.METHODS),
    "long_answers": ("methods", ";", lambda module: Methods(registry.DECODE)),
    "speculation_prompts": ("only", ";", lambda module: module.variants(16)),
}


class Methods:
    """The methods of a table, with any options that they have."""

    def __init__(self, table):
        self.table = table

    def __contains__(self, name):
        return bool(registry.parse(name, self.table, flag="--methods"))


@pytest.fixture(scope="module", autouse=True)
def beside_each_other():
    """Let scripts find each other, and leave nothing behind."""
    before, names = dict(os.environ), {path.stem for path in SCRIPTS}
    sys.path.insert(0, str(ROOT / "benchmarks"))
    yield
    sys.path.remove(str(ROOT / "benchmarks"))
    for name in names & {*sys.modules}:
        del sys.modules[name]
    os.environ.clear()
    os.environ.update(before)


def script(name):
    """Import a script; what it wants and CI need not have, skips the test."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in OPTIONAL:
            raise
        pytest.skip(f"{name}.py wants {error.name}")


every_command = functools.cache(main.every_command)


@functools.cache
def command_of(module):
    """Return what reads a script's command line, as the script itself does it."""
    app = getattr(module, "app", None)
    if app is None and "typer.run(main)" in Path(module.__file__).read_text("utf-8"):
        app = typer.Typer()
        app.command()(module.main)
    return typer.main.get_command(app) if app else None


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.stem)
def test_scripts_load_and_have_help(path, capsys):
    module = script(path.stem)
    if command := command_of(module):
        command.main(["--help"], prog_name=path.name, standalone_mode=False)
        assert "--help" in capsys.readouterr().out


def jobs():
    """Yield the words of each command of `benchmarks/jobs/`, and its file and line."""
    for path in sorted((ROOT / "benchmarks" / "jobs").glob("*.jobs")):
        for number, line in enumerate(path.read_text("utf-8").splitlines(), start=1):
            if line.startswith("#"):
                continue
            line = re.sub(r"\$\(\([^)]*\)\)|\$\w+|\$\{[^}]*\}", "8", line)
            words = shlex.shlex(line, posix=True, punctuation_chars=";")
            words.whitespace_split, words.commenters = True, ""
            starts = {"jaxkv", *(f"benchmarks/{path.name}" for path in SCRIPTS)}
            command: list[str] = []
            for word in (*words, ";"):
                if word == ";":
                    if command:
                        yield command, f"{path.name}:{number}"
                    command = []
                elif command or word in starts:
                    command.append(word)


JOBS = list(jobs())


def given(first, words):
    """Return the options of a job by name, and its script."""
    if first == "jaxkv":
        command, module = every_command(), None
        while hasattr(command, "commands"):
            command = command.commands[words.pop(0)]
    else:
        module = script(Path(first).stem)
        command = command_of(module)
        if command is None:
            return vars(module.parser().parse_args(words)), module
        while hasattr(command, "commands"):
            command = command.commands[words.pop(0)]
    with command.make_context(first, words) as context:
        return context.params, module


def check(first, *words):
    """Raise where a job's options are not taken, or its methods are not known."""
    options, module = given(first, [*words])
    if words[:2] == ("eval", "ruler"):
        parse_prefill_methods(options["methods"], decode=options["decode"])
    elif module and module.__name__ in NAMED:
        option, comma, known = NAMED[module.__name__]
        names = known(module)
        for name in filter(None, options[option].split(comma)):
            assert name in names, name


def test_every_job_is_read():
    lines = [
        line
        for path in (ROOT / "benchmarks" / "jobs").glob("*.jobs")
        for line in path.read_text("utf-8").splitlines()
        if line and not line.startswith("#")
    ]
    assert len({where for _, where in JOBS}) == len(lines) > 0


@pytest.mark.parametrize("file", sorted({where.split(":")[0] for _, where in JOBS}))
def test_jobs_are_taken(file):
    for words, where in JOBS:
        if where.startswith(f"{file}:"):
            try:
                check(*words)
            except Exception as error:
                raise AssertionError(f"{where}: {error}") from error


@pytest.mark.parametrize(
    "job, said",
    [
        (["jaxkv", "eval", "ruler", "needle", "--method", "8"], "No such option"),
        (["jaxkv", "eval", "ruler", "needle", "--methods", "snap"], "snap"),
        (["benchmarks/farm.py", "a", "b"], "does not exist"),
        (["benchmarks/first_token.py", "o", "--methods", "tova;snap"], "snap"),
        (["benchmarks/exact_prompts.py", "q", "--out", "o", "--only", "twig"], "twig"),
        (["benchmarks/mesh.py", "speed", "--models", "8", "--out", "8"], "No such"),
    ],
)
def test_jobs_that_are_not_taken(job, said):
    with pytest.raises(Exception, match=said):
        check(*job)
