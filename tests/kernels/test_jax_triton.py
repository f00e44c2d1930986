"""All Triton kernels, handed to the real jax-triton, without a GPU.

jax-triton compiles a kernel when JAX lowers its call, which needs no device. What the
GPU is to be given is then in the text of the program: as many launches as there should
be, and each part of the cache in place.
"""

import functools
import re

import jax
import pytest

from jaxkv.kernels import dispatch
from jaxkv.kernels.cache import Nodes, SharedSlots, Slots, Token
from jaxkv.kernels.decode_triton import decode_attention_triton
from jaxkv.kernels.experts import Gate, Weights
from jaxkv.kernels.experts_triton import experts_triton
from jaxkv.kernels.longflow_tree_triton import longflow_tree_triton
from jaxkv.kernels.longflow_triton import choose_tiles, longflow_attention_triton
from jaxkv.kernels.pointwise_triton import add_rms_norm_triton, split_and_rotate_triton
from jaxkv.kernels.project_triton import project_gated_triton, project_triton
from jaxkv.kernels.shared_triton import (
    attend_from_token_triton,
    attend_from_tree_triton,
)
from jaxkv.kernels.tree_triton import tree_attention_triton, write_path_triton
from jaxkv.kernels.window_scores_triton import window_scores_triton
from jaxkv.models.config import Config
from jaxkv.models.decoder import Decoder, parameter_shapes

ROWS, MANY, KV_HEADS, SLOTS, SIZE, NODES, STEPS = 2, 150, 2, 1000, 64, 5, 3


def of(*shape, dtype="bfloat16"):
    return jax.ShapeDtypeStruct(shape, dtype)


integers = functools.partial(of, dtype="int32")


def step(rows):
    """Return query, token and slots."""
    new, cache = of(rows, KV_HEADS, SIZE), of(rows, KV_HEADS, SLOTS, SIZE)
    norms = of(rows, KV_HEADS, SLOTS, dtype="float32")
    held, target = integers(rows, KV_HEADS, SLOTS), integers(rows, KV_HEADS)
    token = Token(new, new, integers(rows))
    return of(rows, 4, SIZE), token, Slots(cache, cache, held, target, norms)


row, slots = integers(ROWS), step(ROWS)[2]
nodes = Nodes(*[of(ROWS, NODES, KV_HEADS, SIZE)] * 2, row)
upcoming = integers(ROWS, KV_HEADS, STEPS + 1)
angles = of(ROWS, 1, SIZE // 2, dtype="float32")

documents = [of(1, KV_HEADS, SLOTS, SIZE)] * 2
shared = SharedSlots(*documents, integers(1, KV_HEADS, SLOTS), row)

# function, arguments, launches, buffers that the launches update in place
CASES = {
    "decode": (
        functools.partial(decode_attention_triton, scale=0.1),
        step(ROWS),
        *(2, 3),
    ),
    "decode with sink and cap": (
        functools.partial(decode_attention_triton, scale=0.1, cap=50.0),
        (*step(ROWS), of(4)),
        *(2, 3),
    ),
    "longflow in rows with sink and cap": (
        functools.partial(longflow_attention_triton, scale=0.1, cap=50.0),
        (*step(MANY), integers(MANY), integers(MANY), of(4)),
        *(2, 6),
    ),
    "longflow in splits": (
        functools.partial(longflow_attention_triton, scale=0.1),
        (*step(ROWS), row, row),
        *(2, 6),
    ),
    "longflow in rows": (
        functools.partial(longflow_attention_triton, scale=0.1),
        (*step(MANY), integers(MANY), integers(MANY)),
        *(2, 6),
    ),
    "tree": (
        functools.partial(tree_attention_triton, scale=0.1),
        (
            *(of(ROWS, NODES, 4, SIZE), nodes, slots, upcoming),
            integers(ROWS, NODES),
            of(ROWS, NODES, NODES, dtype="bool"),
        ),
        *(2, 0),
    ),
    "beside shared slots": (
        functools.partial(attend_from_token_triton, scale=0.1),
        (*step(ROWS), shared, integers(1, ROWS)),
        *(3, 3),
    ),
    "a tree beside shared slots": (
        functools.partial(attend_from_tree_triton, scale=0.1),
        (
            *(of(ROWS, NODES, 4, SIZE), nodes, slots, shared, upcoming),
            integers(ROWS, NODES),
            of(ROWS, NODES, NODES, dtype="bool"),
            integers(1, ROWS),
        ),
        *(3, 0),
    ),
    "tree where LongFlow evicts": (
        functools.partial(longflow_tree_triton, n_recent=0, depth=STEPS, scale=0.1),
        (
            *(of(ROWS, NODES, 4, SIZE), nodes, slots, row),
            *(integers(ROWS, NODES), integers(ROWS, NODES)),
        ),
        *(3, 0),
    ),
    "path": (
        write_path_triton,
        (nodes, slots, integers(ROWS, STEPS), upcoming, row),
        *(1, 4),
    ),
    "window scores": (
        functools.partial(window_scores_triton, scale=0.1, length=300),
        (of(ROWS, 8, 4, SIZE), of(ROWS, 300, KV_HEADS, SIZE), integers(ROWS)),
        *(2, 0),
    ),
    "window scores with sink and cap": (
        functools.partial(window_scores_triton, scale=0.1, length=300, cap=50.0),
        (of(ROWS, 8, 4, SIZE), of(ROWS, 300, KV_HEADS, SIZE), integers(ROWS), of(4)),
        *(2, 0),
    ),
    "norm": (
        functools.partial(add_rms_norm_triton, eps=1e-6),
        (of(ROWS, 1, 32), of(3, ROWS, 1, 32, dtype="float32"), of(32)),
        *(1, 0),
    ),
    "rotation": (
        functools.partial(
            split_and_rotate_triton,
            num_heads=4,
            num_kv_heads=KV_HEADS,
            eps=1e-6,
            dtype="bfloat16",
        ),
        (of(1, ROWS, 1, 8 * SIZE), of(SIZE), of(SIZE), angles, angles),
        *(1, 0),
    ),
    "product": (project_triton, (of(ROWS, 1, 256), of(256, 64)), *(1, 0)),
    "gated product": (project_gated_triton, (of(ROWS, 1, 128), of(128, 256)), *(1, 0)),
    "experts": (
        functools.partial(experts_triton, gate=Gate(limit=7.0)),
        (
            *(of(ROWS, 64), integers(ROWS, 2), of(ROWS, 2, dtype="float32")),
            Weights(of(4, 64, 80), of(4, 40, 64), of(4, 80), of(4, 64)),
        ),
        *(3, 0),
    ),
}


@pytest.fixture
def hopper(monkeypatch):
    """jax-triton, told what to compile for where it would ask the device."""
    pytest.importorskip("jax_cuda13_plugin", reason="see CONTRIBUTING.md")
    jax_triton = pytest.importorskip("jax_triton", reason="see CONTRIBUTING.md")
    original = jax_triton.triton_call

    @functools.wraps(original)
    def triton_call(*args, **options):
        return original(*args, compute_capability=90, **options)

    monkeypatch.setattr(jax_triton, "triton_call", triton_call)


@pytest.mark.parametrize("case", CASES)
def test_a_kernel_is_lowered_in_place(case, hopper):
    function, arguments, launches, in_place = CASES[case]
    traced = jax.jit(function).trace(*arguments)
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert len(re.findall(r"custom_call @triton_kernel_call", text)) == launches
    assert len(re.findall(r"#stablehlo\.output_operand_alias<", text)) == in_place


@pytest.mark.parametrize(("how", "launches"), [("triton", 7), ("fused", 4)])
def test_a_layer_has_so_many_launches_beside_attention(
    how, launches, hopper, monkeypatch
):
    monkeypatch.setattr(dispatch, "triton_unavailable", lambda: "")
    config = Config(
        vocab_size=64,
        hidden_size=128,
        intermediate_size=128,
        num_layers=1,
        num_heads=2,
        num_kv_heads=2,
        head_dim=SIZE,
        qk_norm=True,
    )
    params = jax.tree.map(lambda x: of(*x.shape), parameter_shapes(config))

    def run(params, tokens):
        network = Decoder(config, implementation=how)
        where = tokens, tokens, (None,), lambda q, k, v, state, _: (q, state)
        return network.apply({"params": params}, *where)[0]

    traced = jax.jit(run).trace(params, integers(ROWS, 1))
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    # And the last norm.
    calls = len(re.findall(r"custom_call @triton_kernel_call", text))
    assert calls == launches + 1


def test_rows_and_splits_are_both_among_the_cases():
    programs = [
        choose_tiles(rows, 4, KV_HEADS, SLOTS, SIZE, "bfloat16").programs
        for rows in (ROWS, MANY)
    ]
    assert programs[0] == 0 < programs[1]
