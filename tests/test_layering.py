"""Imports run one way: kernels <- core <- models <- doors; read from the sources.

The core is the table below; every other module of `jaxkv/` is a door. A new module is
a door until it is listed here.
"""

import ast
import graphlib
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parents[1]

CORE = {
    "acceptance",
    "attention",
    "basic_policies",
    "dapq",
    "decode_policies",
    "drafts",
    "eviction",
    "expected_attention",
    "generation",
    "likeliest",
    "matching",
    "option_types",
    "options",
    "passes",
    "policies",
    "prompt_policies",
    "rkv",
    "sampling",
    "scoring",
    "speculation",
    "state",
    "trees",
    "verification",
}
BASE = {"_installed", "_version"}  # imports nothing of ours; anybody may import it
WITHOUT_JAX = {
    "haystack",
    "lexicon",
    "passages",
    "quoting_tasks",
    "reasoning_tasks",
    "retrieval_tasks",
    "samples",
    "tasks",
}

LAYERS = ("base", "kernels", "core", "models", "doors")
MAY_IMPORT = {  # own layer included; cycles have a test of their own
    "base": {"base"},
    "kernels": {"base", "kernels"},
    "core": {"base", "kernels", "core"},
    "models": {"base", "kernels", "core", "models"},
    "doors": {"base", "kernels", "core", "models", "doors"},
}
THIRD_PARTY = {  # models and doors: whatever pyproject.toml declares
    "base": set(),
    "kernels": {"jax", "numpy", "jax_triton", "triton"},
    "core": {"jax", "numpy"},
}


class Import(NamedTuple):
    """One imported module, by its absolute name."""

    name: str
    line: int
    in_function: bool


def sources() -> dict[str, Path]:
    """Return the shipped modules by import name."""
    folders = {"jaxkv": "jaxkv", "kernels": "jaxkv.kernels", "models": "jaxkv.models"}
    found = {}
    for folder, package in folders.items():
        for path in sorted((ROOT / folder).glob("*.py")):
            stem = path.stem
            found[package if stem == "__init__" else f"{package}.{stem}"] = path
    return found


MODULES = sources()


def layer(module: str) -> str:
    """Return the layer of one of our modules; the facade `jaxkv` itself is a door."""
    for name in ("kernels", "models"):
        if module == f"jaxkv.{name}" or module.startswith(f"jaxkv.{name}."):
            return name
    stem = module.removeprefix("jaxkv").removeprefix(".")
    return "core" if stem in CORE else "base" if stem in BASE else "doors"


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


def imports_of(module: str) -> list[Import]:
    return imports(MODULES[module].read_text(encoding="utf-8"))


def at_module_level(module: str) -> set[str]:
    """Return what a module imports at once: our modules in full, others by package."""
    names = {found.name for found in imports_of(module) if not found.in_function}
    return {name if top(name) == "jaxkv" else top(name) for name in names}


def top(name: str) -> str:
    return name.partition(".")[0]


def is_third_party(name: str) -> bool:
    return top(name) != "jaxkv" and top(name) not in sys.stdlib_module_names


@pytest.mark.parametrize("module", MODULES)
def test_own_imports_run_one_way(module):
    allowed = MAY_IMPORT[layer(module)]
    for found in imports_of(module):
        if top(found.name) == "jaxkv":
            assert layer(found.name) in allowed, (
                f"{module}:{found.line} ({layer(module)}) imports {found.name} "
                f"({layer(found.name)}); it may import {sorted(allowed)}"
            )


@pytest.mark.parametrize("module", MODULES)
def test_third_party_imports(module):
    allowed = THIRD_PARTY.get(layer(module))
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


@pytest.mark.parametrize("stem", sorted(WITHOUT_JAX))
def test_modules_without_jax(stem):
    module = f"jaxkv.{stem}"
    for found in imports_of(module):
        where = f"{module}:{found.line} imports {found.name}"
        if is_third_party(found.name):
            assert top(found.name) == "numpy", where
        elif top(found.name) == "jaxkv":
            assert found.name.removeprefix("jaxkv.") in WITHOUT_JAX, where


def test_no_import_cycles():
    graph = {module: at_module_level(module) & set(MODULES) for module in MODULES}
    graphlib.TopologicalSorter(graph).prepare()  # raises CycleError and names the cycle


def test_tables_name_modules_that_exist():
    stems = {path.stem for path in (ROOT / "jaxkv").glob("*.py")}
    assert stems >= CORE | BASE | WITHOUT_JAX


def test_every_layer_is_found():
    assert {layer(module) for module in MODULES} == set(LAYERS)


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
