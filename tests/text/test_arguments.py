"""What callers may hand to `generate` by mistake, and what they are told."""

import json

import jax.numpy as jnp
import numpy as np
import pytest

import jaxkv
from jaxkv.models.checkpoint import CheckpointError

BAD = {
    "max_new_tokens": (dict(max_new_tokens=2.5), "max_new_tokens must be a whole"),
    "truth": (dict(max_new_tokens=True), "must be a whole number, got True"),
    "truth of JAX": (dict(max_new_tokens=jnp.array(True)), "must be a whole number"),
    "one of a list": (dict(max_new_tokens=jnp.array([5])), "must be a whole number"),
    "one of NumPy's": (dict(max_new_tokens=np.array([5])), "must be a whole number"),
    "large": (
        dict(max_new_tokens=np.zeros((99, 99))),
        r"got array\(\[\[0\. ?, 0\. ?, .*\)\.$",
    ),
    "budgets of a set": (dict(budget={5}), r"budget must be a whole number, got \{5\}"),
    "stops of a set": (dict(stop_ids={5}), r"stop_ids must be a list .* got \{5\}"),
    "stops by name": (dict(stop_ids={"a": 5}), "stop_ids must be a list .* got"),
    "seeds of a set": (dict(seed={5}), r"seed must be a whole number, got \{5\}"),
    "no tokens": (dict(max_new_tokens=None), "max_new_tokens must be a whole number"),
    "block": (dict(block="a"), "block must be a whole number"),
    "budget": (dict(budget="40"), "budget must be a whole number, got '40'"),
    "budgets": (dict(budget=[2.5]), r"budget\[0\] must be a whole number"),
    "large budget": (dict(budget=2**31), "budget must be between"),
    "ratio": (dict(compression_ratio="0.5"), "compression_ratio must be a number"),
    "seed": (dict(seed="1"), "seed must be a whole number"),
    "large seed": (dict(seed=2**63), "seed must be between"),
    "stop ids": (dict(stop_ids=5), "stop_ids must be a list"),
    "stop id": (dict(stop_ids=[5.5]), r"stop_ids\[0\] must be a whole number"),
    "stop beyond the vocabulary": (
        dict(stop_ids=[5, 4096]),
        "stop_ids has 4096, which ends nothing: the token ids of .* are 0 to 4095",
    ),
    "stop below it": (dict(stop_ids=[-1]), "stop_ids has -1, which ends nothing"),
    "policy's name": (dict(prefill="snapkv"), "prefill= takes something like DapQ"),
    "policy's class": (dict(prefill=jaxkv.SnapKV), r"write SnapKV\(\)"),
    "prompt policy": (dict(decode=jaxkv.SnapKV()), "decode= takes something like Long"),
    "sampler": (dict(sampler=jaxkv.Exact()), r"sampler= takes something like Greedy"),
    "drafts": (dict(speculate="tree"), "speculate= takes something like Aligned"),
    "rule": (dict(accept=True), "accept= takes something like Exact"),
    "pseudo tokens": (
        dict(budget=2, prefill=jaxkv.DapQ(content="fixed", fixed_ids=(1, 99999999))),
        "has the token id 99999999",
    ),
    "negative pseudo tokens": (
        dict(budget=2, prefill=jaxkv.DapQ(content="fixed", fixed_ids=(-1,))),
        "fixed_ids must be at least 0",
    ),
    "temperature": (
        dict(sampler=jaxkv.Categorical(temperature=1e-45)),
        "temperature must be a number that float32 holds",
    ),
    "top_p": (dict(sampler=jaxkv.Categorical(top_p=1e-300)), "top_p must be a number"),
    "penalty": (
        dict(sampler=jaxkv.Greedy(repetition_penalty=float("inf"))),
        "repetition_penalty must be a number that float32 holds",
    ),
    "break even": (
        dict(speculate=jaxkv.Tree(break_even=float("nan"))),
        "Tree: break_even takes a number or auto, got nan",
    ),
}


@pytest.mark.parametrize(("given", "message"), BAD.values(), ids=BAD)
def test_bad_arguments_say_what_to_do(tiny_lm, given, message):
    with pytest.raises(ValueError, match=message):
        jaxkv.generate(tiny_lm, "some words", **given)


def test_a_name_is_no_model():
    with pytest.raises(ValueError, match=r"got 'needle'; write jaxkv.load"):
        jaxkv.generate("needle", "some words")


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        (None, {}, "load takes the name of a checkpoint"),
        ("", {}, "the name of the checkpoint is empty"),
        ("~nobody-of-this-name/x", {}, "~nobody-of-this-name/x"),
        ("needle", dict(revision="main"), "needle comes with a package"),
    ],
)
def test_bad_names_say_what_to_do(name, options, message):
    with pytest.raises(CheckpointError, match=message):
        jaxkv.load(name, **options)


def test_a_config_nested_without_end(tmp_path):
    (tmp_path / "config.json").write_text("[" * 100_000)
    with pytest.raises(CheckpointError, match="is not valid JSON"):
        jaxkv.load(tmp_path)


def test_numbers_of_other_libraries_are_numbers(tiny_lm):
    plain = jaxkv.generate(tiny_lm, [[3, 4, 5]], max_new_tokens=3, stop_ids=[1, 2])
    same = jaxkv.generate(
        tiny_lm,
        [np.array([3, 4, 5])],
        max_new_tokens=np.int64(3),
        budget=jnp.array(9),
        seed=jnp.int32(0),
        stop_ids=jnp.array([1, 2]),
    )
    assert same.tokens == plain.tokens


@pytest.mark.parametrize(("layers", "most"), [(10**9, 10_000), (2**40, 2**31 - 1)])
def test_a_config_with_layers_without_end(tmp_path, tiny, layers, most):
    config = json.loads((tiny / "config.json").read_text())
    config["num_hidden_layers"] = layers
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(
        CheckpointError, match=f"num_hidden_layers must be at most {most}"
    ):
        jaxkv.load(tmp_path)
