"""Attention of a tree of drafts: masks against writing every path out."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from packed import packed
from tiny import BY_HAND

from jaxkv import Options, generation, trees
from jaxkv.kernels import dispatch, longflow_tree, tree_write
from jaxkv.kernels import tree_attention as tree
from jaxkv.kernels.cache import Nodes, Slots
from jaxkv.kernels.tree_attention import tree_attention
from jaxkv.kernels.tree_write import write_path
from jaxkv.models.decoder import Decoder, random_parameters
from jaxkv.speculation.drafters import PromptLookup
from jaxkv.trees import DraftTree

DEPTH, NODES = 2, 5


def random_tree(rng, batch):
    """Nodes hang anywhere below `DEPTH`."""
    parents = np.zeros((batch, NODES), np.int32)
    depths = np.zeros((batch, NODES), np.int32)
    for row in range(batch):
        for node in range(1, NODES):
            shallow = np.flatnonzero(depths[row, :node] < DEPTH)
            parents[row, node] = rng.choice(shallow)
            depths[row, node] = depths[row, parents[row, node]] + 1
    zeros = jnp.zeros((batch, NODES), jnp.int32)
    return DraftTree(
        zeros, jnp.asarray(parents), jnp.asarray(depths), zeros == 0, zeros
    )


def make_inputs(heads, kv_heads, *, slots=9, head_dim=8, dtype="float32", seed=0):
    rng = np.random.default_rng(seed)
    batch = 2

    def draw(*shape):
        return jnp.asarray(rng.standard_normal((batch, *shape)), dtype)

    drafts = random_tree(rng, batch)
    free = rng.random((batch, kv_heads, slots)) < 0.3
    free[:, :, 0] = False
    positions = np.where(free, -1, np.arange(slots)).astype(np.int32)
    nan = jnp.asarray(np.where(free, np.nan, 0)[..., None], dtype)
    upcoming = rng.integers(0, slots, (batch, kv_heads, DEPTH + 1)).astype(np.int32)
    upcoming[0, :, 2] = upcoming[0, :, 0]  # a path that comes back to its own slot
    return dict(
        query=draw(NODES, heads, head_dim),
        key=draw(NODES, kv_heads, head_dim),
        value=draw(NODES, kv_heads, head_dim),
        keys=draw(kv_heads, slots, head_dim) + nan,
        values=draw(kv_heads, slots, head_dim) + nan,
        positions=jnp.asarray(positions),
        target=jnp.asarray(upcoming[:, :, 0]),
        position=jnp.full(batch, slots, jnp.int32),
        upcoming=jnp.asarray(upcoming),
        depths=drafts.depths,
        ancestors=trees.ancestors(drafts, depth=DEPTH),
    )


attention = jax.jit(
    tree_attention,
    static_argnames=("scale", "implementation"),
    # Compiling is most of the time here, and nothing is gained by compiling well.
)
reference = functools.partial(attention, scale=0.3, implementation="reference")
xla = functools.partial(attention, scale=0.3, implementation="xla")
others = pytest.mark.parametrize(
    "implementation", ["xla", pytest.param("triton", marks=pytest.mark.gpu)]
)


@others
@pytest.mark.parametrize(
    ("heads", "kv_heads", "dtype", "tolerance"),
    [
        (4, 2, "float32", 2e-6),
        (4, 2, "bfloat16", 2e-2),
        (3, 1, "float32", 2e-6),
        (2, 2, "float32", 2e-6),
    ],
)
def test_backend_equals_reference(heads, kv_heads, dtype, tolerance, implementation):
    inputs = make_inputs(heads, kv_heads, dtype=dtype)
    run = functools.partial(attention, scale=0.3, implementation=implementation)
    want, got = reference(**packed(inputs)), run(**packed(inputs))
    assert got.dtype == inputs["query"].dtype
    np.testing.assert_allclose(
        got.astype("float32"), want.astype("float32"), atol=tolerance, rtol=tolerance
    )
    np.testing.assert_array_equal(got, run(**packed(inputs)))


@pytest.mark.parametrize("broken", ["values", "upcoming", "ancestors", "depths"])
def test_a_wrong_input_is_noticed(broken):
    inputs = make_inputs(4, 2)
    wrong = dict(inputs)
    wrong[broken] = {
        "values": lambda x: jnp.roll(x, 1, axis=2),
        "upcoming": lambda x: (x + 1) % 9,
        "ancestors": lambda x: x | jnp.roll(x, 1, axis=2),
        "depths": lambda x: jnp.maximum(x - 1, 0),
    }[broken](inputs[broken])
    got, want = xla(**packed(wrong)), reference(**packed(inputs))
    assert not np.allclose(got, want, atol=1e-3)


def test_a_root_alone_is_plain_decoding():
    from jaxkv.kernels.decode import decode_attention

    inputs = make_inputs(4, 2)
    root = {"query", "key", "value"}
    one = {name: x[:, :1] if name in root else x for name, x in inputs.items()}
    one |= {"depths": one["depths"][:, :1], "ancestors": one["ancestors"][:, :1, :1]}
    names = ("position", "keys", "values", "positions", "target")
    token = {name: inputs[name][:, 0] for name in root}
    plain, _ = decode_attention(
        **packed(token | {name: inputs[name] for name in names}), scale=0.3
    )
    np.testing.assert_allclose(xla(**packed(one))[:, 0], plain, atol=2e-6, rtol=2e-6)


def test_bad_arguments():
    inputs = make_inputs(4, 2)
    with pytest.raises(ValueError, match="unknown implementation='magic'"):
        tree_attention(**packed(inputs), scale=1.0, implementation="magic")
    with pytest.raises(ValueError, match=r"depths must be Int32\[B T\] with B=2, T=5"):
        tree_attention(**packed(inputs, depths=inputs["depths"][:, 1:]), scale=1.0)
    with pytest.raises(ValueError, match="multiple of"):
        tree_attention(**packed(inputs, query=inputs["query"][:, :, :3]), scale=1.0)


def test_what_none_stands_for(monkeypatch):
    monkeypatch.setattr(dispatch, "triton_unavailable", lambda: "needs a GPU.")
    assert tree.choose("cpu") == tree.choose("gpu") == "xla"
    monkeypatch.setattr(dispatch, "triton_unavailable", lambda: "")
    assert (tree.choose("cpu"), tree.choose("gpu")) == ("xla", "triton")

    def chosen(head_dim, *dtypes):
        shape = (1, 1, 1, head_dim)
        return tree.choose("gpu", *(jax.ShapeDtypeStruct(shape, t) for t in dtypes))

    assert chosen(256, "float16", "float16") == "triton"
    assert chosen(288, "float16", "float16") == "xla"
    assert chosen(64, "float32", "bfloat16") == "xla"
    assert chosen(64, "float8_e4m3fn", "float8_e4m3fn") == "xla"


def test_triton_that_cannot_run_says_why(monkeypatch):
    inputs = make_inputs(4, 2)
    triton = dict(implementation="triton")
    monkeypatch.setattr(dispatch, "triton_unavailable", lambda: "needs a GPU.")
    with pytest.raises(NotImplementedError, match=r"tree_attention: .* needs a GPU"):
        tree_attention(**packed(inputs), scale=1.0, **triton)
    with pytest.raises(NotImplementedError, match=r"write_path: .* needs a GPU"):
        write_path(**packed(make_writes()), **triton)
    monkeypatch.setattr(dispatch, "triton_unavailable", lambda: "")
    inputs["keys"] = inputs["keys"].astype("bfloat16")
    with pytest.raises(NotImplementedError, match="got float32 and bfloat16; use 'xla"):
        tree_attention(**packed(inputs), scale=1.0, **triton)
    inputs = make_inputs(2, 1, head_dim=288)
    with pytest.raises(NotImplementedError, match="heads of at most 256, got 288"):
        tree_attention(**packed(inputs), scale=1.0, **triton)


def test_what_goes_with_a_kernel_of_plain_decoding():
    decodes = ("reference", "xla", "triton", "pallas_tpu", None)
    found = [dispatch.counterpart(name, tree.Implementation) for name in decodes]
    assert found == ["reference", "xla", "triton", None, None]
    found = [
        dispatch.counterpart(name, longflow_tree.Implementation) for name in decodes
    ]
    assert found == ["reference", "xla", "triton", "pallas_tpu", None]


@pytest.mark.parametrize("implementation", [None, "xla", "reference"])
def test_speculation_runs_what_goes_with_plain_decoding(implementation, monkeypatch):
    named = []

    def spy(module, function):
        original = getattr(module, function)

        def spied(*args, implementation, **kwargs):
            named.append((function, implementation))
            return original(*args, implementation="xla", **kwargs)

        monkeypatch.setattr(module, function, spied)

    spy(tree, "tree_attention")
    spy(tree_write, "write_path")
    network = Decoder(BY_HAND)
    drafter = PromptLookup(num_draft_tokens=2)
    options = Options(speculate=drafter, decode_implementation=implementation)

    def run(key):
        params = random_parameters(network.config, key)
        tokens = jnp.ones((1, 8), jnp.int32)
        return generation.generate_tokens(
            *(network, params, tokens, jnp.full(1, 8), key[None]),
            *(jnp.full(1, -1), jnp.int32(4)),
            options=options,
            slots=12,
            max_out=4,
        ).tokens

    assert jax.eval_shape(run, jax.random.key(0)).shape == (1, 4)
    assert set(named) == {(f, implementation) for f in ("tree_attention", "write_path")}


def make_writes(seed=0):
    """Three rows: one writes nothing, one comes back to a slot, one goes too far."""
    rng = np.random.default_rng(seed)
    batch, nodes, kv_heads, slots, head_dim, steps = 3, 6, 2, 5, 4, 4

    def draw(*shape):
        return jnp.asarray(rng.standard_normal((batch, *shape, head_dim)), "float32")

    positions = rng.integers(-1, 9, (batch, kv_heads, slots)).astype(np.int32)
    upcoming = jnp.int32([[1, 2, 3, 4, 0], [1, 2, 1, 3, 2], [3, 4, 5, 6, 7]])
    return dict(
        key=draw(nodes, kv_heads),
        value=draw(nodes, kv_heads),
        keys=draw(kv_heads, slots),
        values=draw(kv_heads, slots),
        positions=jnp.asarray(positions),
        target=jnp.zeros((batch, kv_heads), jnp.int32),
        upcoming=jnp.repeat(upcoming[:, None], kv_heads, axis=1),
        path=jnp.int32([[0, 1, 2, 3], [0, 2, 3, 5], [0, 1, 4, 5]]),
        count=jnp.int32([0, 3, steps]),
        position=jnp.int32([-1, 20, 30]),
    )


@others
def test_a_path_is_written_as_token_after_token(implementation):
    inputs = make_writes()

    def run(implementation):
        run = functools.partial(write_path, implementation=implementation)
        return jax.jit(run)(**packed(inputs))

    want, got = run("reference"), run(implementation)
    jax.tree.map(np.testing.assert_array_equal, got, want)
    for field in ("keys", "values", "positions", "target"):
        np.testing.assert_array_equal(getattr(got, field)[0], inputs[field][0])
    assert got.target.tolist()[1:] == [[3, 3], [7, 7]]
    np.testing.assert_array_equal(got.positions[1, 0, 1:3], [22, 21])
    np.testing.assert_array_equal(got.keys[1, 1, 1:3], inputs["key"][1, [3, 2], 1])
    np.testing.assert_array_equal(got.positions[2, 0, 3:], [30, 31])


def test_bad_arguments_of_writing():
    inputs = make_writes()
    with pytest.raises(ValueError, match="unknown implementation='magic'"):
        write_path(**packed(inputs), implementation="magic")
    with pytest.raises(ValueError, match=r"upcoming must be Int32\[B K L\+1\].*L=4"):
        write_path(**packed(inputs, upcoming=inputs["upcoming"][..., 1:]))


def test_ancestors_and_paths_of_a_tree():
    #     0
    #   1   2
    #   3   4
    #   5
    drafts = DraftTree(
        tokens=jnp.asarray([[9, 1, 2, 3, 4, 5]]),
        parents=jnp.asarray([[0, 0, 0, 1, 2, 3]]),
        depths=jnp.asarray([[0, 1, 1, 2, 2, 3]]),
        valid=jnp.ones((1, 6), bool),
        kinds=jnp.zeros((1, 6), jnp.int32),
    )
    above = trees.ancestors(drafts, depth=3)
    want = [[0], [0, 1], [0, 2], [0, 1, 3], [0, 2, 4], [0, 1, 3, 5]]
    assert [np.flatnonzero(row).tolist() for row in above[0]] == want
    paths = [
        trees.path_to(jnp.asarray([node]), drafts, above, depth=3)[0].tolist()
        for node in range(6)
    ]
    assert [path[: len(w)] for path, w in zip(paths, want, strict=True)] == want
    assert not any(any(p[len(w) :]) for p, w in zip(paths, want, strict=True))


def test_the_reference_is_no_longer_a_program_for_more_nodes():
    """Behind a context blocks of up to 32 tokens pass, whose program must compile."""

    def length(nodes):
        def shape(*sizes, dtype="float32"):
            return jax.ShapeDtypeStruct((1, *sizes), dtype)

        heads = shape(nodes, 2, 8)
        integers = functools.partial(shape, dtype="int32")
        held = Slots(shape(2, 64, 8), shape(2, 64, 8), integers(2, 64), integers(2))
        arrays = heads, Nodes(heads, heads, integers()), held, integers(2, nodes)
        above = shape(nodes, nodes, dtype="bool")
        run = functools.partial(tree_attention, scale=0.3, implementation="reference")
        return str(jax.make_jaxpr(run)(*arrays, integers(nodes), above)).count("\n")

    assert length(32) == length(2)
