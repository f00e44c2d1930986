"""What the documents promise is there: links, laws, policies, commands."""

import re
from pathlib import Path

import pytest

from jaxkv import registry
from jaxkv.cli import main

ROOT = Path(__file__).resolve().parents[2]
DOCUMENTS = sorted(
    path
    for path in ROOT.rglob("*.md")
    if "results" not in path.parts and not any(p.startswith(".") for p in path.parts)
)
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_readme_is_read_in_a_sitting():
    assert README.count("\n") <= 150


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda p: str(p.relative_to(ROOT)))
def test_links_lead_somewhere(path):
    for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", path.read_text("utf-8")):
        assert (path.parent / target).exists(), f"{path}: {target}"


def test_every_law_names_its_test():
    section = README.split("## Laws")[1].split("\n## ")[0]
    laws = re.findall(r"^\| (?!law|---)([^|]+?) \|.*\| `(test_\w+)` \|$", section, re.M)
    assert len(laws) == 9
    tests = "".join(p.read_text("utf-8") for p in (ROOT / "tests").rglob("test_*.py"))
    for law, name in laws:
        assert f"def {name}(" in tests, f"{law}: no test is called {name}"


def test_every_policy_is_in_the_readme():
    for policy in {*registry.PREFILL.values(), *registry.DECODE.values()}:
        assert f"`{policy.__name__}`" in README


def test_every_command_of_the_readme_exists():
    root = main.every_command()
    blocks = "".join(re.findall(r"^```bash\n(.*?)^```", README, re.M | re.S))
    for line in re.findall(r"^jaxkv (.*)$", blocks, re.M):
        command, words = root, line.split("#")[0].split()
        while hasattr(command, "commands"):
            name = words.pop(0)
            assert name in command.commands, line
            command = command.commands[name]
        flags = {flag for parameter in command.params for flag in parameter.opts}
        assert {w for w in words if w.startswith("--")} <= flags, line
