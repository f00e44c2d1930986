"""A folder is a layer: what each may import, read from the sources.

The flat modules of `jaxkv/` are one layer more. Those that `generation` needs are the
core: they know neither the networks nor the doors. Imports inside functions count as
others do.
"""

import ast
import functools
import graphlib
import re
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parents[2]
FLAT = "flat"  # the modules of `jaxkv/` that lie in no folder

LIBRARY = {
    *("kernels", "policies", "speculation", "models", "runtime", "contexts", "laws"),
    FLAT,
}
DOORS = {*LIBRARY, "text", "tasks"}
MAY_IMPORT = {  # other layers; circles and the core have tests of their own
    "kernels": set(),
    "models": {"kernels"},
    "tasks": set(),
    "runtime": set(),
    "policies": {"kernels", "runtime", FLAT},
    "speculation": {"kernels", "policies", "runtime", FLAT},
    "contexts": {"policies", "speculation", "models", "runtime", FLAT},
    "laws": {"policies", "speculation", "models", "runtime", FLAT},
    FLAT: LIBRARY,
    "text": LIBRARY,
    "serving": DOORS,
    "server": {*DOORS, "serving"},
    "plot": {FLAT},
    "needle": DOORS,
    "evaluation": {*DOORS, "plot"},
    "bench": DOORS,
    "cli": {*DOORS, "serving", "server", "needle", "plot", "evaluation", "bench"},
}
THIRD_PARTY = {  # others: whatever pyproject.toml declares
    "kernels": {"jax", "numpy", "jax_triton", "triton", "jaxtyping", "beartype"},
    "runtime": {"jax", "numpy"},
    "policies": {"annotated_types", "jax", "numpy"},
    "speculation": {"annotated_types", "jax", "numpy"},
    "tasks": {"numpy"},
}
READERS = {"gguf", "hf"}  # rooms of `models/`, one for each kind of checkpoint
CORE_THIRD_PARTY = {"annotated_types", "jax", "numpy"}
# Any layer may import these two; they import nothing of ours.
BASE = {"jaxkv._clone", "jaxkv._version"}


class Import(NamedTuple):
    """One imported module, by its absolute name."""

    name: str
    line: int
    in_function: bool


def sources() -> dict[str, Path]:
    """Return the shipped modules by import name."""
    found = {}
    for folder in ("jaxkv", "kernels", "models"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            parts = parts if folder == "jaxkv" else ("jaxkv", *parts)
            found[".".join(parts).removesuffix(".__init__")] = path
    return found


MODULES = sources()


def layer(module: str) -> str:
    """Return the folder of one of our modules; `__main__` is of the command line."""
    if module == "jaxkv.__main__":
        return "cli"
    parts = module.split(".")[1:]
    return parts[0] if parts and parts[0] in MAY_IMPORT else FLAT


def imports(source: str) -> list[Import]:
    """List what a source imports, at module level and in functions.

    `from jaxkv import state` counts as the module `jaxkv.state`, `from jaxkv import x`
    of anything else as the facade `jaxkv`. `import_module("x")` counts as an import.
    """
    found = []

    def visit(node: ast.AST, in_function: bool) -> None:
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            if node.level:
                names = ["." * node.level + (node.module or "")]
            else:
                for alias in node.names:
                    full = f"{node.module}.{alias.name}"
                    names.append(full if full in MODULES else node.module)
        elif isinstance(node, ast.Call) and node.args:
            called = ast.unparse(node.func).rpartition(".")[2]
            first = node.args[0]
            if called in ("import_module", "__import__") and isinstance(
                first, ast.Constant
            ):
                names = [first.value]
        found.extend(Import(name, node.lineno, in_function) for name in names)
        inside = in_function or isinstance(
            node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda
        )
        for child in ast.iter_child_nodes(node):
            visit(child, inside)

    visit(ast.parse(source), False)
    return found


@functools.cache
def imports_of(module: str) -> list[Import]:
    return imports(MODULES[module].read_text(encoding="utf-8"))


def ours(module: str) -> set[str]:
    """Return which of our modules one imports, in functions or not."""
    return {found.name for found in imports_of(module)} & set(MODULES)


def at_module_level(module: str) -> set[str]:
    """Return what a module imports at once: our modules in full, others by package."""
    names = {found.name for found in imports_of(module) if not found.in_function}
    return {name if top(name) == "jaxkv" else top(name) for name in names}


def top(name: str) -> str:
    return name.partition(".")[0]


def is_third_party(name: str) -> bool:
    return top(name) != "jaxkv" and top(name) not in sys.stdlib_module_names


def reachable(*modules: str) -> set[str]:
    """Return these modules and all of ours that they need."""
    found, left = set(), list(modules)
    while left:
        module = left.pop()
        if module not in found:
            found.add(module)
            left.extend(ours(module))
    return found


CORE = reachable("jaxkv.generation")


def first_cells(rows: str) -> list[str]:
    return re.findall(r"^\|[^|]*", rows, re.M)


def test_the_readme_says_which_modules_are_the_core():
    text = (ROOT / "jaxkv" / "README.md").read_text(encoding="utf-8")
    tables = re.findall(r"^\| ([\w ]+) \|.*\n\|---.*\n((?:\|.*\n)+)", text, re.M)
    said = {
        title: set(re.findall(r"`(\w+)(?:\.py|/)`", "".join(first_cells(rows))))
        for title, rows in tables
    }
    flat = {module for module in MODULES if layer(module) == FLAT}
    core, others = (
        {module.removeprefix("jaxkv.") for module in some}
        for some in (flat & CORE, flat - CORE - {"jaxkv", "jaxkv._version"})
    )
    assert (said["core"], said["beside the core"]) == (core, others)
    assert said["room"] == {*MAY_IMPORT} - {FLAT, "kernels", "models"}


@pytest.mark.parametrize("module", MODULES)
def test_no_arrow_goes_up(module):
    own = layer(module)
    for found in imports_of(module):
        if top(found.name) != "jaxkv" or found.name in BASE:
            continue
        other = layer(found.name)
        assert other == own or other in MAY_IMPORT[own], (
            f"{module}:{found.line} ({own}) imports {found.name} ({other}); it may "
            f"import {sorted(MAY_IMPORT[own])}"
        )


@pytest.mark.parametrize("module", sorted(CORE))
def test_the_core_knows_no_network_and_no_door(module):
    assert layer(module) in {"kernels", "runtime", "policies", "speculation", FLAT}
    assert module != "jaxkv", "a module of the core needs the facade"


def test_no_circles():
    graph = {module: ours(module) - {module} for module in MODULES}
    graphlib.TopologicalSorter(graph).prepare()  # raises CycleError and names the cycle


@pytest.mark.parametrize("module", MODULES)
def test_third_party_imports(module):
    allowed = THIRD_PARTY.get(layer(module))
    if allowed is None and module in CORE:
        allowed = CORE_THIRD_PARTY
    for found in imports_of(module):
        where = f"{module}:{found.line} imports {found.name}"
        if allowed is not None and is_third_party(found.name):
            assert top(found.name) in allowed, f"{where}; allowed: {sorted(allowed)}"
        assert top(found.name) != "torch", f"{where}: only tests and benchmarks may"
        assert top(found.name) not in ("tests", "benchmarks"), where


@pytest.mark.parametrize("module", MODULES)
def test_imports_are_absolute_and_name_installed_packages(module):
    for found in imports_of(module):
        assert top(found.name) not in ("", "kernels", "models"), (
            f"{module}:{found.line} imports {found.name}; write it as jaxkv...."
        )


@pytest.mark.parametrize("module", MODULES)
def test_triton_is_imported_at_the_call(module):
    """`import jax_triton` fails where JAX has no GPU build, and triton may be missing.

    A kernel's body may import triton itself at the top, because `@triton.jit` needs it
    there; in return only another such body may import that file at module level.
    """
    bodies = {
        name
        for name in MODULES
        if layer(name) == "kernels" and "triton" in at_module_level(name)
    }
    now = at_module_level(module)
    assert "jax_triton" not in now
    if module not in bodies:
        assert not now & {"triton", *bodies}


def test_every_folder_is_a_layer_of_one_level():
    folders = {path.parent.relative_to(ROOT).parts for path in MODULES.values()}
    one_level = {("jaxkv",), ("kernels",), ("models",)}
    one_level |= {("models", name) for name in READERS}
    one_level |= {("jaxkv", name) for name in MAY_IMPORT}
    assert folders <= one_level
    assert {layer(module) for module in MODULES} == set(MAY_IMPORT)


@pytest.mark.parametrize(
    ("source", "name", "in_function"),
    [
        ("import torch.nn", "torch.nn", False),
        ("from torch import nn", "torch", False),
        ("def f():\n  import jax_triton", "jax_triton", True),
        ("try:\n  import jax_triton\nexcept ImportError: pass", "jax_triton", False),
        ("from jaxkv import kernels", "jaxkv.kernels", False),
        ("from jaxkv import KVState", "jaxkv", False),
        ("from .state import KVState", ".state", False),
        ("import importlib\nimportlib.import_module('torch')", "torch", False),
    ],
)
def test_the_reader_of_imports(source, name, in_function):
    last = imports(source)[-1]
    assert (last.name, last.in_function) == (name, in_function)
