"""pyproject.toml, the tree, the installed package, the README and CI must agree."""

import ast
import importlib
import importlib.metadata
import re
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
PROJECT = PYPROJECT["project"]
FOLDERS = {
    "jaxkv": "jaxkv",
    "jaxkv.bench": "jaxkv/bench",
    "jaxkv.cli": "jaxkv/cli",
    "jaxkv.contexts": "jaxkv/contexts",
    "jaxkv.evaluation": "jaxkv/evaluation",
    "jaxkv.kernels": "kernels",
    "jaxkv.models": "models",
    "jaxkv.models.gguf": "models/gguf",
    "jaxkv.models.hf": "models/hf",
    "jaxkv.laws": "jaxkv/laws",
    "jaxkv.needle": "jaxkv/needle",
    "jaxkv.plot": "jaxkv/plot",
    "jaxkv.policies": "jaxkv/policies",
    "jaxkv.runtime": "jaxkv/runtime",
    "jaxkv.server": "jaxkv/server",
    "jaxkv.serving": "jaxkv/serving",
    "jaxkv.speculation": "jaxkv/speculation",
    "jaxkv.tasks": "jaxkv/tasks",
    "jaxkv.text": "jaxkv/text",
}
EXTRAS = {
    *("cuda12", "cuda13", "gguf", "lm-eval", "parity", "plot", "ray", "serve", "test"),
    "tpu",
    "train",
}
NEEDLE = ROOT / "models" / "needle"

# Import names that differ from the name on the package index.
DISTRIBUTIONS = {
    "PIL": "matplotlib",  # comes with it
    "jax_triton": "jax-triton",
    "orbax": "orbax-checkpoint",
    "pydantic_core": "pydantic",  # comes with it
    "tokenizers": "transformers",  # comes with it
    "triton": "jax-triton",  # comes with it
    "yaml": "pyyaml",
}


def installed_folder(package: str) -> Path:
    return Path(importlib.import_module(package).__file__).parent


def distribution(requirement: str) -> str:
    """Return the normalised name in a requirement such as `jax[cuda12]>=0.10`."""
    return re.match(r"[A-Za-z0-9._-]+", requirement)[0].replace("_", "-").lower()


def test_packages_are_listed():
    setuptools = PYPROJECT["tool"]["setuptools"]
    assert setuptools["packages"] == list(FOLDERS)
    mapped = {
        p: f for p, f in FOLDERS.items() if p in ("jaxkv.kernels", "jaxkv.models")
    }
    assert setuptools["package-dir"] == mapped


def test_every_folder_with_modules_is_listed():
    """One that is not would work in an editable install and miss the wheel."""
    tops = ("jaxkv", "kernels", "models")
    modules = [path for top in tops for path in (ROOT / top).rglob("*.py")]
    folders = {path.parent.relative_to(ROOT).as_posix() for path in modules}
    assert folders == set(FOLDERS.values())


@pytest.mark.parametrize("folder", ["kernels", "models"])
def test_init_is_a_docstring_only(folder):
    """Other libraries may import our `kernels` folder by accident; it must be inert."""
    tree = ast.parse((ROOT / folder / "__init__.py").read_text(encoding="utf-8"))
    assert len(tree.body) == 1
    assert ast.get_docstring(tree)


@pytest.mark.parametrize("package", FOLDERS)
def test_installed_modules_are_those_of_the_tree(package):
    """Catches a stale `build/` (deleted modules ship) and a stale install."""
    tree = {path.name: path for path in (ROOT / FOLDERS[package]).glob("*.py")}
    installed = {path.name: path for path in installed_folder(package).glob("*.py")}
    assert sorted(installed) == sorted(tree)
    changed = [n for n in tree if installed[n].read_bytes() != tree[n].read_bytes()]
    assert not changed, "the installed jaxkv is older than the tree: install it again"


def test_typed_marker_is_installed():
    assert (installed_folder("jaxkv") / "py.typed").is_file()


@pytest.mark.skipif(not NEEDLE.is_dir(), reason="no models/needle in this tree")
def test_needle_is_installed():
    tree = sorted(path.name for path in NEEDLE.iterdir())
    installed = installed_folder("jaxkv.models") / "needle"
    assert tree
    assert all(path.is_file() for path in NEEDLE.iterdir()), "package data is one level"
    assert sorted(path.name for path in installed.iterdir()) == tree


def test_extras():
    extras = PROJECT["optional-dependencies"]
    assert set(extras) == EXTRAS
    installed = importlib.metadata.distribution("jaxkv")
    # An editable install follows the tree, but for what was written down on its day.
    if '"editable": true' not in (installed.read_text("direct_url.json") or ""):
        assert set(installed.metadata.get_all("Provides-Extra")) == EXTRAS


def test_torch_is_pinned_and_in_one_extra_only():
    """Unpinned, pip takes the newest torch with several GB of CUDA packages."""
    groups = {"": PROJECT["dependencies"], **PROJECT["optional-dependencies"]}
    found = {
        group: requirement
        for group, requirements in groups.items()
        for requirement in requirements
        if distribution(requirement) == "torch"
    }
    assert list(found) == ["parity"]
    assert re.fullmatch(r"torch==[\d.]+", found["parity"])


def test_every_import_is_declared():
    groups = [PROJECT["dependencies"], *PROJECT["optional-dependencies"].values()]
    declared = {distribution(r) for requirements in groups for r in requirements}
    undeclared = set()
    for folder in FOLDERS.values():
        for path in (ROOT / folder).glob("*.py"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                names = []
                if isinstance(node, ast.Import):
                    names = [alias.name for alias in node.names]
                elif isinstance(node, ast.ImportFrom) and not node.level:
                    names = [node.module]
                for name in names:
                    top = name.partition(".")[0]
                    own = top == "jaxkv" or top in sys.stdlib_module_names
                    if (
                        not own
                        and distribution(DISTRIBUTIONS.get(top, top)) not in declared
                    ):
                        undeclared.add(f"{folder}/{path.name}: {name}")
    assert not undeclared


def test_the_command_is_installed():
    scripts = importlib.metadata.distribution("jaxkv").entry_points
    assert [s.value for s in scripts.select(group="console_scripts", name="jaxkv")] == [
        PROJECT["scripts"]["jaxkv"]
    ]


def test_citation_has_the_version():
    text = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    version = importlib.metadata.version("jaxkv")
    assert re.search(rf"^version: {re.escape(version)}$", text, re.MULTILINE)


def readme_commands() -> list[str]:
    """Return the lines of the README's first block of commands."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    return re.search(r"^```bash\n(.*?)^```", text, re.MULTILINE | re.DOTALL)[1].split(
        "\n"
    )[:-1]


def test_readme_begins_with_two_commands():
    assert readme_commands() == [
        "pip install . && jaxkv demo",
        'pip install ".[test,parity]" && pytest -m "not slow"',
    ]


def test_ci_runs_the_commands_of_the_readme():
    """Each part stands in `.ci/run` as a line of its own, in the same order."""
    lines = (ROOT / ".ci" / "run").read_text(encoding="utf-8").split("\n")
    parts = [part for line in readme_commands() for part in line.split(" && ")]
    places = [lines.index(part) for part in parts]
    assert places == sorted(places)


def test_ci_adds_nothing_to_the_commands():
    """What a newcomer runs and what CI runs differ in one thing: seeds are fixed."""
    text = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    assigned = set(re.findall(r"\b([A-Z][A-Z0-9_]+)=", text))
    of_pip = {name for name in assigned if name.startswith("PIP_")}
    assert assigned - of_pip == {"CI", "PATH", "PYENV_VERSION"}
    readers = [
        (path.name, line.strip())
        for path in sorted((ROOT / "tests").rglob("*.py"))
        for line in path.read_text(encoding="utf-8").split("\n")
        if re.search(r"environ.*\bCI\b", line)
    ]
    assert [name for name, _ in readers] == ["conftest.py"]
    assert "hypothesis.settings.load_profile" in readers[0][1]


def test_ci_tests_the_installed_package():
    """`python -m pytest` would put the tree before the installed package."""
    text = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    assert "-m pytest" not in text
    assert (ROOT / ".ci" / "run").stat().st_mode & 0o111
