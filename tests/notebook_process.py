"""Run a notebook from top to bottom in a process of its own, as Jupyter does.

    python tests/notebook_process.py NOTEBOOK.ipynb CODE

CODE runs behind the second cell of code, which sets the notebook's sizes: it makes them
smaller, so that the rest takes seconds. The value of a cell's last line is shown if it
is a picture. The last line printed says how many were.
"""

import ast
import json
import sys
from pathlib import Path


def shown(source: str, name: str, names: dict) -> bool:
    """Run a cell; return whether its last value is a picture that can be drawn."""
    tree = ast.parse(source)
    last = tree.body.pop() if isinstance(tree.body[-1], ast.Expr) else None
    exec(compile(tree, name, "exec"), names)
    if last is None:
        return False
    value = eval(compile(ast.Expression(last.value), name, "eval"), names)
    return hasattr(value, "_repr_png_") and value._repr_png_().startswith(b"\x89PNG")


def main(path: str, smaller: str) -> None:
    """Run the notebook at `path`, made smaller by some code."""
    cells = json.loads(Path(path).read_text(encoding="utf-8"))["cells"]
    sources = ["".join(c["source"]) for c in cells if c["cell_type"] == "code"]
    names: dict = {"__name__": "__main__"}
    pictures = 0
    for number, source in enumerate(sources):
        pictures += shown(source, f"cell {number}", names)
        if number == 1:
            exec(smaller, names)
    print(f"pictures: {pictures}")


if __name__ == "__main__":
    main(*sys.argv[1:])
