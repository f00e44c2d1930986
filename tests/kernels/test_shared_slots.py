"""Slots that rows share, against a copy for each row."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from packed import packed
from shared_slots_cases import ABOUT, TOLERANCE, make_inputs, make_tree

from jaxkv.kernels import dispatch, shared_slots

HEADS = {"MHA": (2, 2), "GQA": (4, 2), "MQA": (3, 1)}


def run(inputs, implementation, **options):
    about = np.asarray(inputs["shared"].owner)
    operation = (
        shared_slots.attend_from_token
        if inputs["query"].ndim == 3
        else shared_slots.attend_from_tree
    )
    how = dict(scale=0.3, most=int(np.bincount(about).max())) | options
    return jax.jit(functools.partial(operation, **how, implementation=implementation))(
        **packed(inputs)
    )


CASES = [("three", "GQA", "float32"), ("one document", "MQA", "bfloat16")]
SLOW = [("three", "MHA", "bfloat16"), ("one document", "GQA", "float32")]


@pytest.mark.parametrize("make", [make_inputs, make_tree])
@pytest.mark.parametrize(
    ("about", "heads", "dtype"),
    [*CASES, *(pytest.param(*case, marks=pytest.mark.slow) for case in SLOW)],
)
def test_backend_equals_reference(make, about, heads, dtype):
    inputs = make(*HEADS[heads], ABOUT[about], dtype=dtype)
    want, got = run(inputs, "reference"), run(inputs, None)
    rows = np.asarray(inputs["position"]) >= 0
    if make is make_inputs:
        (want, wanted), (got, slots) = want, got
        for one, two in zip(wanted[:4], slots[:4], strict=True):
            np.testing.assert_array_equal(one.astype("float32"), two.astype("float32"))
    assert got.dtype == inputs["query"].dtype
    np.testing.assert_allclose(
        got[rows].astype("float32"),
        want[rows].astype("float32"),
        atol=TOLERANCE[dtype],
        rtol=TOLERANCE[dtype],
    )
    assert np.isfinite(got.astype("float32")).all()


@pytest.mark.parametrize("make", [make_inputs, make_tree])
def test_sinks_and_caps_are_those_of_one_softmax(make):
    inputs = make(4, 2, ABOUT["three"])
    options = dict(sink=jnp.asarray([0.5, -1, 3, 0]), cap=0.7)
    own = {name: x for name, x in options.items() if name != "cap"}
    want, got = (run(inputs | own, how, cap=0.7) for how in ("reference", "xla"))
    want, got = jax.tree.leaves(want)[0], jax.tree.leaves(got)[0]
    np.testing.assert_allclose(got, want, atol=2e-6, rtol=2e-6)
    plain = jax.tree.leaves(run(inputs, "reference"))[0]
    assert np.abs(np.asarray(want - plain)).max() > 1e-2


def test_the_reference_is_attention_over_both():
    """One row by NumPy: document 2 has one slot, the row two and the new token."""
    inputs = make_inputs(2, 2, ABOUT["three"])
    out, _ = run(inputs, "reference")
    own = {name: np.asarray(inputs[name][0, 0]) for name in ("keys", "values")}
    token = {"keys": inputs["key"][0, 0], "values": inputs["value"][0, 0]}
    theirs = {name: getattr(inputs["shared"], name)[2, 0, :1] for name in own}
    keys, values = (
        np.concatenate([theirs[name], own[name][:2], token[name][None]])
        for name in ("keys", "values")
    )
    weights = np.exp(0.3 * keys @ np.asarray(inputs["query"][0, 0]))
    np.testing.assert_allclose(
        out[0, 0], weights @ values / weights.sum(), atol=2e-6, rtol=2e-6
    )


@pytest.mark.parametrize("broken", ["owner", "values", "positions"])
def test_a_wrong_input_is_noticed(broken):
    inputs = make_inputs(4, 2, ABOUT["three"])
    wrong = getattr(inputs["shared"], broken)
    wrong = {
        "owner": lambda: (wrong + 1) % 3,
        "values": lambda: jnp.roll(wrong, 1, axis=1),
        "positions": lambda: wrong.at[:, :, 0].set(-1),
    }[broken]()
    shared = inputs["shared"]._replace(**{broken: wrong})
    (got, _), (want, _) = run(inputs | dict(shared=shared), "xla"), run(inputs, "xla")
    assert not np.allclose(got, want, atol=1e-3)


def test_what_none_stands_for(monkeypatch):
    monkeypatch.setattr(dispatch, "triton_unavailable", lambda: "needs a GPU.")
    for make in make_inputs, make_tree:
        with pytest.raises(NotImplementedError, match=r"attend_from_.* needs a GPU"):
            run(make(4, 2, ABOUT["three"]), "triton")
    assert [shared_slots.choose(x) for x in ("cpu", "gpu", "tpu")] == ["xla"] * 3
    monkeypatch.setattr(dispatch, "triton_unavailable", lambda: "")
    assert shared_slots.choose("gpu") == "triton"
    wide = jax.ShapeDtypeStruct((1, 2, 9, 288), "bfloat16")
    assert shared_slots.choose("gpu", wide, wide) == "xla"


def test_bad_arguments():
    for make in make_inputs, make_tree:
        inputs = make(4, 2, ABOUT["three"])
        with pytest.raises(ValueError, match="unknown implementation='magic'"):
            run(inputs, "magic")
        shared = inputs["shared"]._replace(owner=jnp.zeros(3, jnp.int32))
        with pytest.raises(ValueError, match=r"shared\.owner must be Int32"):
            run(inputs | dict(shared=shared), None)
        with pytest.raises(ValueError, match="multiple of"):
            run(inputs | dict(query=inputs["query"][..., :3, :]), None)
