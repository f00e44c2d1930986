"""The one dispatcher: what runs, what is refused, and in which words."""

import typing

import pytest

from jaxkv.kernels import (
    decode,
    dispatch,
    experts,
    longflow,
    longflow_tree,
    pointwise,
    prefill,
    project,
    tree_attention,
    tree_write,
    window_scores,
)

TABLES = [
    (decode._RUNS, decode.Implementation),
    (experts._RUNS, experts.Implementation),
    (longflow._RUNS, longflow.Implementation),
    (longflow_tree._RUNS, longflow_tree.Implementation),
    (pointwise._NORMS, pointwise.Implementation),
    (pointwise._ROTATIONS, pointwise.Implementation),
    (prefill._RUNS, prefill.Implementation),
    (project._PRODUCTS, pointwise.Implementation),
    (project._GATED, pointwise.Implementation),
    (tree_attention._RUNS, tree_attention.Implementation),
    (tree_write._RUNS, tree_attention.Implementation),
    (window_scores._RUNS, window_scores.Implementation),
]
TABLE = {"xla": max, "triton": min, "pallas_tpu": sum}


@pytest.fixture(autouse=True)
def everything_runs(monkeypatch):
    monkeypatch.setattr(dispatch, "triton_unavailable", lambda: "")
    monkeypatch.setattr(dispatch, "tpu_unavailable", lambda: "")


@pytest.mark.parametrize(("table", "names"), TABLES)
def test_every_name_has_its_implementation(table, names):
    assert tuple(table) == typing.get_args(names)
    assert len(set(table.values())) == len(table)


@pytest.mark.parametrize("name", TABLE)
def test_a_named_implementation_is_the_one_that_runs(name):
    assert dispatch.resolve("op", name, TABLE) is TABLE[name]
    assert dispatch.resolve("op", name, TABLE, unable={name: ""}) is TABLE[name]


def test_an_unknown_name_is_told_the_known_ones():
    with pytest.raises(
        ValueError,
        match=r"^op: unknown implementation='magic'; choose one of xla, triton, "
        r"pallas_tpu or None\.$",
    ):
        dispatch.resolve("op", "magic", TABLE)


@pytest.mark.parametrize(
    ("name", "check"),
    [("triton", "triton_unavailable"), ("pallas_tpu", "tpu_unavailable")],
)
def test_what_cannot_run_here_says_why(name, check, monkeypatch):
    monkeypatch.setattr(dispatch, check, lambda: "needs a moon.")
    with pytest.raises(
        NotImplementedError, match=rf'^op: implementation="{name}" needs a moon\.$'
    ):
        dispatch.resolve("op", name, TABLE, unable={name: "takes no cheese."})
    assert dispatch.resolve("op", "xla", TABLE) is max


def test_what_cannot_take_the_arrays_says_why():
    unable = {"triton": "takes no cheese."}
    with pytest.raises(
        NotImplementedError, match=r'^op: implementation="triton" takes no cheese\.$'
    ):
        dispatch.resolve("op", "triton", TABLE, unable=unable)
    assert dispatch.resolve("op", "xla", TABLE, unable=unable) is max
