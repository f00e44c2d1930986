"""The public names of `jaxkv`, and what `import jaxkv` costs."""

import ast
import dataclasses
import importlib.metadata
import importlib.util
import inspect
import json
import subprocess
import sys
from pathlib import Path

import pytest

import jaxkv
from jaxkv._version import __version__

HEAVY = (
    "flax",
    "gguf",
    "jax",
    "jax_triton",
    "matplotlib",
    "optax",
    "torch",
    "transformers",
    "typer",
    "tyro",
)
HEAVY_TO_COMMANDS = (
    *("gguf", "matplotlib", "optax", "orbax", "rich.markdown", "scipy", "torch"),
    "transformers",
)

PUBLIC = [name for name in jaxkv.__all__ if not name.startswith("_")]


def documented(obj, name: str) -> bool:
    """Whether a docstring was written; the ones that Python generates do not count."""
    doc = (vars(obj) if inspect.isclass(obj) else {}).get("__doc__", obj.__doc__)
    generated = inspect.isclass(obj) and (
        dataclasses.is_dataclass(obj) or issubclass(obj, tuple)
    )
    return bool(doc) and not (generated and doc.startswith(f"{name}("))


def test_names_are_unique():  # ruff sorts them, acronyms first
    assert len(jaxkv.__all__) == len(set(jaxkv.__all__))


@pytest.mark.parametrize("name", jaxkv.__all__)
def test_name_resolves(name):
    assert getattr(jaxkv, name) is not None


@pytest.mark.parametrize("name", PUBLIC)
def test_functions_and_classes_are_documented(name):
    obj = getattr(jaxkv, name)
    if inspect.isclass(obj) or inspect.isroutine(obj):
        assert documented(obj, obj.__name__), f"jaxkv.{name} has no docstring"
    if inspect.isclass(obj):
        for attribute, value in vars(obj).items():
            method = inspect.isroutine(value) or isinstance(value, property)
            if method and not attribute.startswith("_"):
                assert value.__doc__, f"jaxkv.{name}.{attribute} has no docstring"


def test_the_stub_says_what_there_is():
    """Type checkers read the stub's `__all__`; the rest is made of its imports."""
    stub = Path(jaxkv.__file__).with_suffix(".pyi").read_text(encoding="utf-8")
    *_, last = ast.parse(stub).body
    assert isinstance(last, ast.Assign)
    assert sorted(ast.literal_eval(last.value)) == sorted(jaxkv.__all__)
    assert set(jaxkv.__all__) <= set(dir(jaxkv))


def test_modules_are_attributes_and_hide_no_name():
    assert jaxkv.sampling.Greedy is jaxkv.Greedy
    with pytest.raises(AttributeError, match="module 'jaxkv' has no attribute 'noth"):
        _ = jaxkv.nothing
    with pytest.raises(AttributeError, match="module 'jaxkv' has no attribute '_no"):
        _ = jaxkv._nothing
    for name in PUBLIC:
        assert importlib.util.find_spec(f"jaxkv.{name}") is None


def test_version_matches_metadata():
    assert __version__ == importlib.metadata.version("jaxkv")


@pytest.fixture(scope="module")
def fresh_import(tmp_path_factory):
    """What a new interpreter, outside of the repository, holds after `import jaxkv`."""
    program = """
import json, sys
import jaxkv
modules = sorted(sys.modules)
jaxkv.generate
from jax._src import xla_bridge
started = xla_bridge.backends_are_initialized()
import jaxkv.cli.main
command = sorted(sys.modules)
found = {"modules": modules, "devices_started": started, "command": command}
print(json.dumps(found))
"""
    run = subprocess.run(
        [sys.executable, "-c", program],
        cwd=tmp_path_factory.mktemp("elsewhere"),
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout)


@pytest.mark.parametrize("package", HEAVY)
def test_import_is_light(fresh_import, package):
    assert package not in fresh_import["modules"]


@pytest.mark.parametrize("package", HEAVY_TO_COMMANDS)
def test_the_command_line_is_light(fresh_import, package):
    assert package not in fresh_import["command"]


def test_import_starts_no_device(fresh_import):
    """`jax.distributed.initialize` must come before the first device is asked for."""
    assert not fresh_import["devices_started"]
