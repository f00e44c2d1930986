"""Run by test_sharding.py, where JAX finds eight devices: generation over meshes.

Prints "equal" where no mesh changes a token, each state lies where it should, and a
step sends no more than it must. Takes one argument, fast or slow.
"""

import collections
import dataclasses
import re
import sys

import jax
import jax.numpy as jnp
import numpy as np
import tiny
from small_policies import DAPQ

from jaxkv import (
    LAQ,
    AdaKV,
    Aligned,
    Categorical,
    Exact,
    LongFlow,
    Options,
    SnapKV,
    StreamingLLM,
    generation,
    sharding,
)
from jaxkv.kernels import per_shard
from jaxkv.models.config import Experts
from jaxkv.models.decoder import Decoder
from jaxkv.runtime import programs
from jaxkv.runtime.meshes import mesh_of

CONFIG = dataclasses.replace(
    tiny.CONFIG,
    vocab_size=64,
    num_heads=8,
    num_kv_heads=4,
    tied=False,
    qkv_bias=True,
    output_bias=True,
)
NETWORK = Decoder(CONFIG)
MESHES = [(2, 4), (1, 8), (8, 1), (4, 2), (3, 2)]  # data, model; (1, 8) makes copies
DRAFTS = Aligned(num_draft_tokens=5, depth=3, break_even=0)
METHODS = {
    "full": Options(),
    "dapq": Options(budget=8, prefill=DAPQ, sampler=Categorical(top_k=9)),
    "laq": Options(
        budget=8, prefill=LAQ(window_size=3, draft_window_size=2, kernel_size=3)
    ),
    "longflow": Options(budget=8, prefill=SnapKV(window_size=2), decode=LongFlow()),
    "adakv": Options(
        budget=8,
        prefill=AdaKV(policy=SnapKV(window_size=2), most=1.5),
        sampler=Categorical(top_p=0.9, repetition_penalty=1.1),
    ),
    "drafts": Options(speculate=DRAFTS, accept=Exact()),
    "longflow, drafts": Options(
        budget=8,
        prefill=StreamingLLM(n_sink=1),
        decode=LongFlow(),
        speculate=DRAFTS,
        accept=Exact(),
    ),
    "longflow, in bulk": Options(
        budget=8,
        decode=LongFlow(interval=2, protect_prompt=True),
        sampler=Categorical(),
    ),
    "reference": Options(
        budget=8,
        prefill=StreamingLLM(n_sink=1),
        decode=StreamingLLM(n_sink=1),
        prefill_implementation="reference",
        decode_implementation="reference",
        scores_implementation="reference",
    ),
}
FAST = [("longflow", (2, 4)), ("dapq", (1, 8))]
# OLMo 2's and OLMoE's norms, over all heads at once.
OVER_HEADS = dict(qk_norm=True, qk_norm_per_head=False)
OF_ALL_HEADS = {
    "OLMo 2": dict(OVER_HEADS, pre_norm=False, post_norm=True),
    "OLMoE": dict(OVER_HEADS, experts=Experts(count=8, per_token=2, size=16)),
}


def check_norms_of_all_heads():
    """Raise where a mesh changes a token of a network that norms all heads at once."""
    for name, changes in OF_ALL_HEADS.items():
        config = dataclasses.replace(CONFIG, **changes)
        network, params = Decoder(config), uneven(tiny.parameters(config))
        alone = run(network, params, METHODS["longflow"])
        for data, model in [(2, 4), (1, 8)]:
            mesh = sharding.make_mesh(data=data, model=model)
            spread = sharding.spread(network, params, mesh)
            case = f"{name} over {data} x {model}"
            check(mesh_of(spread[1]), *spread, METHODS["longflow"], alone, case)


def uneven(params):
    """Return parameters whose norms weigh each column otherwise."""

    def draw(path, leaf):
        if not path[-1].key.endswith("norm"):
            return leaf
        return leaf * jnp.linspace(0.5, 2, leaf.size, dtype=leaf.dtype)

    return jax.tree_util.tree_map_with_path(draw, params)


def arguments(network, params):
    tokens, lengths = tiny.prompts(0, [16, 3, 9, 1], 16)
    keys = jax.random.split(jax.random.key(1), 4)
    return network, params, tokens, lengths, keys, jnp.asarray([-1])


def shapes(options):
    slots = options.layer_slots(16, 12, CONFIG.windows)
    return dict(options=options, slots=slots, max_out=12)


def run(network, params, options):
    given = arguments(network, params)
    return generation.generate_jit(*given, jnp.int32(12), **shapes(options))


def check(mesh, network, params, options, alone, name):
    """Raise where the mesh changes a token, or a state is cut in another way."""
    spread = run(network, params, options)
    np.testing.assert_array_equal(alone.tokens, spread.tokens, err_msg=name)
    wanted = sharding.state_specs(spread.cache[0])
    if len(spread.tokens) % mesh.shape["data"]:
        return  # all rows are everywhere
    for state in spread.cache:
        assert len(state.keys.sharding.device_set) == mesh.size
        for field in ("keys", "values", "positions", "target"):
            spec = jax.sharding.NamedSharding(mesh, getattr(wanted, field))
            array = getattr(state, field)
            assert array.sharding.is_equivalent_to(spec, array.ndim), (name, field)


def sent(network, params, options):
    """Return how often a decode step sends what: the collectives of the loop's body."""
    state = generation.start_jit(*arguments(network, params), **shapes(options))
    text = generation.advance_jit.lower(
        *(network, params, state, jnp.int32(12), jnp.asarray([-1])), options=options
    ).compile()
    found = re.findall(
        r"= (\S+|\(.*?\)) (all-\w+|collective-\w+|reduce-scatter)(?:-start)?\(.*"
        r'op_name="[^"]*while/(\w+)/',
        text.as_text(),
    )
    return collections.Counter((what, shape) for shape, what, _ in found)


def check_sent(params):
    """Raise where a step sends more than parts of two sums a layer and what chooses."""
    network, params = sharding.spread(
        NETWORK, params, sharding.make_mesh(data=2, model=4)
    )
    # Two rows of a device: an embedding, the four devices' parts of two sums for each
    # of two layers; the tokens chosen and their logits; whether any row goes on.
    common = {
        ("all-reduce", "f32[2,1,32]{2,1,0}"): 1,
        ("all-gather", "f32[4,2,1,32]{3,2,1,0}"): 2 * 2,
        ("all-gather", "s32[2,2,4]{1,0,2}"): 1,
        ("all-reduce", "f32[2,2]{1,0}"): 1,
        ("all-reduce", "pred[]"): 1,
    }
    # And of LongFlow a number a slot, for each layer.
    found = sent(network, params, METHODS["longflow"])
    assert found == common | {("all-gather", "f32[2,4,8]{2,0,1}"): 2}, found


def check_all(cases, params, alone):
    """Raise where a mesh of the cases changes anything."""
    for name, (data, model) in cases:
        devices = jax.devices()[: data * model]
        mesh = sharding.make_mesh(data=data, model=model, devices=devices)
        network, spread = sharding.spread(NETWORK, params, mesh)
        check(
            *(mesh_of(spread), network, spread, METHODS[name], alone[name]),
            f"{name} over {data} x {model}",
        )


def check_sums(params, alone):
    """Raise where sums that devices make, as for many tokens, change a token."""
    per_shard.MOST_HEARD = -1
    programs.SHELF.clear()
    check_all([*FAST, ("drafts", (2, 4))], params, alone)


if __name__ == "__main__":
    cases = FAST
    if sys.argv[1] == "slow":
        cases = [(name, shape) for shape in MESHES for name in METHODS]
    params = tiny.parameters(CONFIG)
    alone = {name: run(NETWORK, params, METHODS[name]) for name, _ in cases}
    check_all(cases, params, alone)
    if sys.argv[1] == "fast":
        check_sent(params)
    else:
        check_norms_of_all_heads()
        check_sums(params, alone)
    print("equal")
