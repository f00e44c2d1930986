"""No module and no function outgrows what a reader holds in the head."""

import ast
import io
import tokenize
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
MODULE, FUNCTION = 400, 60  # lines of a file; lines of code of a function
FOLDERS = ("jaxkv", "kernels", "models", "tests", "benchmarks")
MODULES = sorted(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))
SILENT = {
    tokenize.COMMENT,
    tokenize.DEDENT,
    tokenize.ENDMARKER,
    tokenize.INDENT,
    tokenize.NEWLINE,
    tokenize.NL,
}


def name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def code_lines(source: str) -> set[int]:
    """Return the numbers of the lines with code; a docstring is none."""
    lines = set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in SILENT:
            lines.update(range(token.start[0], token.end[0] + 1))
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            lines.difference_update(range(node.lineno, node.end_lineno + 1))
    return lines


def long_functions(source: str, most: int) -> list[tuple[str, int]]:
    """Return the functions with more lines of code than `most`, and how many.

    The signature is not counted: that of a command is a table of flags.
    """
    code = code_lines(source)
    functions = [
        (
            node.name,
            len(code.intersection(range(node.body[0].lineno, node.end_lineno + 1))),
        )
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    ]
    return [(function, lines) for function, lines in functions if lines > most]


@pytest.mark.parametrize("path", MODULES, ids=name)
def test_modules_and_functions_are_short(path):
    source = path.read_text(encoding="utf-8")
    assert source.count("\n") <= MODULE
    if not path.stem.endswith("_body"):  # the body of a kernel is one program
        assert long_functions(source, FUNCTION) == []


def test_lines_are_counted_as_said():
    source = (
        'def f(\n  x,\n):\n  """A\n\n  B"""\n  # why\n\n  y = """\n"""\n  return y\n'
    )
    assert long_functions(source, 2) == [("f", 3)]
    assert long_functions(source, 3) == []
