"""LongFlow along the paths of a tree: one walk on the logits, against step by step."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from packed import packed

from jaxkv.kernels import dispatch
from jaxkv.kernels import longflow_tree as tree
from jaxkv.kernels.longflow_tree import longflow_tree
from jaxkv.kernels.scores import value_norms

# Two paths of three and a short one, so that evictions differ from branch to branch.
PARENTS, DEPTHS = [0, 0, 1, 0, 2, 3], [0, 1, 2, 1, 3, 2]
NODES, DEPTH, BATCH, HEADS, KV_HEADS, HEAD_DIM = 6, 3, 2, 4, 2, 8

op = jax.jit(
    longflow_tree,
    static_argnames=(
        *("n_recent", "depth", "scale", "score", "shared", "implementation"),
    ),
    # Compiling is most of the time here, and nothing is gained by compiling well.
)


def make_inputs(*, slots, free=0, seed=0):
    rng = np.random.default_rng(seed)

    def draw(*shape):
        return jnp.asarray(rng.standard_normal((BATCH, *shape)), jnp.float32)

    held = np.stack([rng.permutation(slots) for _ in range(BATCH * KV_HEADS)])
    held = held.reshape(BATCH, KV_HEADS, slots)
    held[:, :, slots - free :] = -1
    nan = jnp.where(jnp.asarray(held) < 0, jnp.nan, 0)[..., None]
    target = np.zeros((BATCH, KV_HEADS)) if not free else np.full((2, 2), slots - free)
    values = draw(KV_HEADS, slots, HEAD_DIM) + nan
    return dict(
        query=draw(NODES, HEADS, HEAD_DIM),
        key=draw(NODES, KV_HEADS, HEAD_DIM),
        value=draw(NODES, KV_HEADS, HEAD_DIM),
        keys=draw(KV_HEADS, slots, HEAD_DIM) + nan,
        values=values,
        positions=jnp.asarray(held, jnp.int32),
        target=jnp.asarray(target, jnp.int32),
        position=jnp.full(BATCH, slots, jnp.int32),
        oldest=jnp.asarray([0, 2], jnp.int32),
        parents=jnp.asarray([PARENTS] * BATCH, jnp.int32),
        depths=jnp.asarray([DEPTHS] * BATCH, jnp.int32),
    )


@pytest.mark.parametrize(
    ("options", "sizes"),
    [
        pytest.param(
            *(dict(score="l1", shared=True, n_recent=0), dict(slots=7)),
            marks=pytest.mark.slow,
        ),
        (dict(score="l1", shared=True, n_recent=0), dict(slots=3)),
        (dict(score="l2", shared=False, n_recent=1), dict(slots=7, free=2)),
        pytest.param(
            *(dict(score="attention", shared=False, n_recent=0), dict(slots=4, free=1)),
            marks=pytest.mark.slow,
        ),
    ],
)
def test_backend_equals_reference(options, sizes):
    run = functools.partial(op, depth=DEPTH, scale=0.4, **options)
    for seed in range(5):
        inputs = make_inputs(seed=seed, **sizes)
        inputs["norms"] = value_norms(inputs["values"], options["score"])
        want = run(**packed(inputs), implementation="reference")
        got = run(**packed(inputs), implementation="xla")
        np.testing.assert_array_equal(got.slots, want.slots)
        np.testing.assert_array_equal(got.targets, want.targets)
        np.testing.assert_allclose(got.out, want.out, atol=3e-6, rtol=3e-6)


@pytest.mark.parametrize("broken", ["norms", "parents", "oldest", "target"])
def test_a_wrong_input_is_noticed(broken):
    inputs = make_inputs(slots=7)
    inputs["norms"] = value_norms(inputs["values"], "l1")
    wrong = {
        "norms": jnp.roll(inputs["norms"], 1, axis=2),
        "parents": jnp.asarray([[0, 0, 3, 0, 2, 1]] * BATCH, jnp.int32),
        "oldest": inputs["oldest"] + 4,
        "target": inputs["target"] + 1,
    }[broken]
    run = functools.partial(
        op, depth=DEPTH, scale=0.4, score="l1", shared=True, n_recent=0
    )
    want = run(**packed(inputs), implementation="reference")
    got = run(**packed(inputs | {broken: wrong}), implementation="xla")
    assert (got.targets != want.targets).any()


def test_bad_arguments():
    inputs = make_inputs(slots=4)
    inputs["norms"] = value_norms(inputs["values"], "l1")
    options = dict(n_recent=0, depth=DEPTH, scale=1.0)
    with pytest.raises(NotImplementedError, match='"deletion" cannot be verified'):
        longflow_tree(**packed(inputs), **options, score="deletion")
    with pytest.raises(ValueError, match="unknown implementation='magic'"):
        longflow_tree(**packed(inputs), **options, implementation="magic")
    with pytest.raises(ValueError, match=r"depths must be Int32\[B T\] with B=2, T=6"):
        longflow_tree(**packed(inputs, depths=inputs["depths"][:, 1:]), **options)
    with pytest.raises(ValueError, match=r"longflow_tree: slots\.norms must be"):
        longflow_tree(**packed(inputs, norms=None), **options)


def test_what_triton_cannot_take_is_refused_by_name_and_never_chosen(monkeypatch):
    inputs = make_inputs(slots=4)
    inputs["norms"] = value_norms(inputs["values"], "l1")
    run = functools.partial(
        longflow_tree,
        **packed(inputs),
        **dict(n_recent=0, depth=DEPTH, scale=1.0, implementation="triton"),
    )
    with pytest.raises(NotImplementedError, match=r"longflow_tree: .* needs a"):
        run()
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(dispatch, "triton_unavailable", lambda: "")
    arrays = inputs["query"], inputs["keys"]
    assert tree.choose("gpu", *arrays, shared=True) == "triton"
    assert tree.choose("cpu", *arrays, shared=True) == "xla"
    monkeypatch.setattr(tree, "devices_per_row", lambda: 2)
    assert tree.choose("gpu", *arrays, shared=True) == "xla"
    assert tree.choose("gpu", *arrays, shared=False) == "triton"
    with pytest.raises(NotImplementedError, match=r"all on one device, .* lie on 2;"):
        run()
