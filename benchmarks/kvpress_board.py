"""Holds exported folders to kvpress' own scorer, and to the reader of its board.

    jaxkv eval ruler needle --methods full,snapkv --budgets 12.5% --out results/ruler
    jaxkv eval export --board results/ruler results/board
    python benchmarks/kvpress_board.py results/board --evaluation kvpress/evaluation

The last command runs in an environment of kvpress: `pip install "kvpress[eval]==0.5.5"
"transformers<5.3"`. `--evaluation` is a folder of kvpress' repository, which the
package lacks; `--space`, if it is there, the board's own code, with `src/data.py`.
Scores, names of folders and, with `--space`, rows of the board's table must be ours.
"""

import argparse
import ast
import json
import sys
import tempfile
import types
from pathlib import Path

import pandas
import yaml


def check(folder: Path) -> None:
    """Compare scores and name of one folder with what kvpress would have written."""
    from benchmarks.ruler.calculate_metrics import calculate_metrics
    from evaluate import EvaluationConfig
    from evaluate_registry import PRESS_REGISTRY

    rows = pandas.read_csv(folder / "predictions.csv", keep_default_na=False)
    rows["answer"] = rows["answer"].map(ast.literal_eval)
    metrics = json.loads((folder / "metrics.json").read_text())
    assert calculate_metrics(rows) == metrics, (calculate_metrics(rows), metrics)
    config = yaml.safe_load((folder / "config.yaml").read_text())
    PRESS_REGISTRY.setdefault(config["press_name"], None)  # which may be ours alone
    with tempfile.TemporaryDirectory() as place:
        name = EvaluationConfig(**config).get_results_dir(Path(place)).name
    assert name == folder.name, (name, folder.name)


def table(space: Path, exported: Path) -> pandas.DataFrame:
    """Return the board's table of exported folders."""
    # What the reader imports draws the page.
    names = {
        "src.settings": ("METHOD_TO_PRETTY_NAME", "PRETTY_NAME_TO_ADDITIONAL_INFO"),
        "src.utils": [f"make_{x}_clickable" for x in ("dataset", "method", "model")],
    }
    for module, held in names.items():
        sys.modules[module] = types.ModuleType(module)
        vars(sys.modules[module]).update({name: {} for name in held})
    sys.path.insert(0, str(space))
    from src.data import load_evaluation_results

    return load_evaluation_results(exported)


def main() -> None:
    """Read the command line, and check."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("exported", type=Path)
    parser.add_argument("--evaluation", type=Path, required=True)
    parser.add_argument("--space", type=Path)
    asked = parser.parse_args()
    sys.path.insert(0, str(asked.evaluation))
    folders = sorted(x for x in asked.exported.iterdir() if x.is_dir())
    for folder in folders:
        check(folder)
    print(len(folders), "folders: scores and names are those of kvpress")
    if asked.space:
        found = table(asked.space, asked.exported)
        assert sorted(found["filename"]) == [x.name for x in folders]
        for row in found.to_dict("records"):
            folder = asked.exported / row["filename"]
            metrics = json.loads((folder / "metrics.json").read_text())
            scores = [task["string_match"] for task in metrics.values()]
            assert row["score"] == round(sum(scores) / len(scores), 2), row
            ratios = pandas.read_csv(folder / "predictions.csv")["compression_ratio"]
            assert row["compression_ratio"] == round(ratios.mean(), 2), row
        print(found.drop(columns=["filename", "press_init_command"]).to_string())


if __name__ == "__main__":
    main()
