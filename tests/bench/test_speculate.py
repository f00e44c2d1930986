"""`jaxkv bench speculate`: forced trees, and what the JSON holds."""

import json

import jax.numpy as jnp
import numpy as np
import pytest
from tiny import BY_HAND

from jaxkv.bench.tree_step import FullTree
from jaxkv.cli import main as cli
from jaxkv.models import public_shapes
from jaxkv.speculation.matching import Context

QUICK = ["speculate", "--shape", "qwen3-8b", "--context", "12", "--prompt", "16"]
QUICK += ["--steps", "4", "--repeats", "1", "--nodes", "4"]


@pytest.fixture
def run(capsys, monkeypatch):
    """Run `jaxkv bench` in this process, on a network that runs in no time."""
    monkeypatch.setitem(public_shapes.SHAPES, "qwen3-8b", BY_HAND)

    def run(*arguments):
        code = cli.main(["bench", *arguments])
        return code, *capsys.readouterr()

    return run


def test_full_trees_are_full():
    context = Context(
        text=jnp.asarray([[5, 6, 7, 8]]),
        position=jnp.asarray([2]),
        prompt=jnp.asarray([2]),
        pool=jnp.asarray([[0, 2]]),
        likeliest=None,
    )
    tree = FullTree(num_draft_tokens=7, depth=3).draft(context)
    assert tree.valid.all()
    assert tree.tokens[0, 0] == 7
    assert tree.depths[0].tolist() == [0, 1, 2, 3, 1, 2, 3, 1]
    assert tree.parents[0].tolist() == [0, 0, 1, 2, 0, 4, 5, 0]
    np.testing.assert_array_equal(
        tree.depths[0, 1:], tree.depths[0][tree.parents[0]][1:] + 1
    )


@pytest.mark.slow
def test_json(run):
    code, out, err = run(*QUICK, "--json")
    assert code == 0, err
    content = json.loads(out)
    (row,) = content["rows"]
    (tree,) = row["trees"]
    assert tree["nodes"] == 4
    assert tree["ratio"] == pytest.approx(tree["step_ms"] / row["plain_step_ms"])
    assert tree["break_even"] == pytest.approx(tree["ratio"] - 1)
    idle = row["no_draft"]
    assert idle["ratio"] == pytest.approx(idle["step_ms"] / row["plain_step_ms"])
    assert row["matchers"].keys() == {"PromptLookup", "Tree", "Aligned"}
    prefill = content["prefill"]
    assert prefill["ratio"] == pytest.approx(
        prefill["likeliest_ms"] / prefill["plain_ms"]
    )
    assert {"command", "device", "versions"} <= content.keys()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--nodes", "4,x"], "--nodes takes numbers"),
        (["--nodes", "1"], "a tree has 2 to 1024 nodes, got '1'"),
        (["--nodes", "4,1025"], "a tree has 2 to 1024 nodes"),
        (["--context", "4"], "must exceed --steps"),
        (["--decode", "streaming-llm", "--budget", "8", "--nodes", "16"], "8 slots"),
        (["--decode", "h2o", "--budget", "8"], "cannot verify drafts"),
    ],
)
def test_bad_input_gets_one_line(run, arguments, message):
    code, out, err = run(*QUICK, *arguments)
    assert (code, out) == (2, "")
    assert message in err
    assert err.strip().count("\n") == 0
