"""Run by test_sharding.py, where JAX finds four devices: operations over a mesh.

Prints "equal" where a mesh changes no result, devices with the same part of one hold
the same bits, nothing is sent but what a sum or a shared victim needs, and each device
is handed its own part. Takes one argument, fast or slow.
"""

import dataclasses
import functools
import re
import sys

import jax
import jax.numpy as jnp
import numpy as np
import tiny

from jaxkv import sharding
from jaxkv.kernels import (
    decode,
    dispatch,
    longflow,
    longflow_tpu,
    pointwise,
    project,
    shared_slots,
    victims,
)
from jaxkv.kernels import window_scores as windows
from jaxkv.kernels.cache import SharedSlots, Slots, Token
from jaxkv.kernels.per_shard import partition_spec
from jaxkv.kernels.scores import value_norms, write_norm
from jaxkv.models import layout

B, N, K, S, H = 4, 8, 4, 12, 32
RNG = np.random.default_rng(0)
SHAPES = []  # of what the stand-ins were handed


def stand_in(function):
    def run(*arguments, **options):
        SHAPES.append(arguments[0].shape)
        return function(*arguments, **options)

    return run


def stand_in_for_devices():
    """No TPU and no GPU here: interpret one kernel, and look at what another gets."""
    dispatch.tpu_unavailable = dispatch.triton_unavailable = lambda: ""
    longflow_tpu.longflow_attention_tpu = functools.partial(
        longflow_tpu.longflow_attention_tpu, interpret=True
    )
    longflow.longflow_attention_triton = stand_in(
        functools.partial(longflow._xla, axis=None)
    )
    longflow.tell_triton = stand_in(tell)
    longflow.choose_told_triton = choose_told
    windows._RUNS["triton"] = stand_in(windows._xla)


def tell(query, token, slots, oldest, newest, *, scale, score):
    """Do all of LongFlow's kernels but the choice."""
    norms = write_norm(token, slots, score)
    out, slots = decode._xla(query, token, slots, scale=scale)
    weights = decode.decode_weights(query, slots.keys, slots.positions, scale=scale)
    held = slots.positions
    importance = jnp.where(held >= 0, weights.mean(axis=2) * norms, 0)
    told = victims.told(
        importance.mean(axis=1, keepdims=True),
        *victims.classes(held, oldest, newest, shared=True),
    )
    return out, told, jnp.zeros(len(query), jnp.int32), slots._replace(norms=norms)


def choose_told(told, arrivals, token, slots):
    """Do the choice from what all devices have told."""
    told = jnp.moveaxis(told[:, :, 0], 0, 1)
    importance, free, evictable = victims.heard(told)
    rank = jnp.where(free, 0, jnp.where(evictable, 1, 2))
    target = jnp.lexsort((importance, rank), axis=-1)[..., 0].astype(jnp.int32)
    target = jnp.where(token.position[:, None] < 0, slots.target, target)
    return slots._replace(target=target)


def compare(mesh, function, letters, arrays, name, collectives):
    """Raise where the mesh changes a result, or sends more than `collectives`."""
    alone = jax.jit(function)(*arrays)
    with jax.set_mesh(mesh):
        spread = jax.tree.map(
            lambda axes, x: jax.device_put(
                x, jax.NamedSharding(mesh, partition_spec(axes))
            ),
            letters,
            arrays,
        )
        program = jax.jit(function).lower(*spread).compile()
        got = program(*spread)
    sent = r"= \S+ (all-\w+|collective-\w+|reduce-scatter)"
    found = re.findall(sent, program.as_text())
    assert found == collectives, (name, found)
    for one, two in zip(jax.tree.leaves(alone), jax.tree.leaves(got), strict=True):
        np.testing.assert_allclose(one, two, atol=2e-6, err_msg=name)
        if one.dtype == jnp.int32:
            np.testing.assert_array_equal(one, two, err_msg=name)
        parts = {}
        for shard in two.addressable_shards:
            same = parts.setdefault(str(shard.index), np.asarray(shard.data))
            np.testing.assert_array_equal(same, shard.data, err_msg=name)


def normal(*shape):
    return jnp.asarray(RNG.standard_normal(shape), jnp.float32)


def whole(*numbers):
    return jnp.asarray(numbers, jnp.int32)


def compare_longflow(mesh, everything):
    positions = RNG.permuted(np.broadcast_to(np.arange(S), (B, K, S)), axis=-1)
    positions[0, :, [1, 5]] = -1
    positions[1, 1:3, 0] = -1  # free in some heads only
    target = RNG.integers(0, S, (B, K))
    values = normal(B, K, S, H)
    slots = Slots(
        keys=normal(B, K, S, H),
        values=values,
        positions=whole(*positions),
        target=whole(*target),
        norms=value_norms(values, "l2"),
    )
    query = normal(B, N, H)
    token = Token(normal(B, K, H), normal(B, K, H), whole(S, S + 1, -1, S))
    oldest, newest = whole(0, 2, 0, S + 9), whole(S, S - 1, S, S + 9)
    letters = [
        "B N H",
        Token("B K H", "B K H", "B"),
        Slots("B K S H", "B K S H", "B K S", "B K", "B K S"),
        *("B", "B"),
    ]
    arrays = [query, token, slots, oldest, newest]
    for shared in (True, False) if everything else (True,):
        for how in ("xla", "triton") + ("pallas_tpu", "reference") * everything:
            function = functools.partial(
                longflow.longflow_attention,
                scale=0.3,
                score="l2",
                shared=shared,
                implementation=how,
            )
            name = f"longflow {how} {shared}"
            compare(mesh, function, letters, arrays, name, ["all-gather"] * shared)


def compare_products(mesh):
    """Up to 256 KB of another device are read as parts; more of them are summed."""
    weight = normal(8, 256)
    for tokens, sent in (1, "all-gather"), (128, "all-gather"), (129, "all-reduce"):
        x = normal(B, tokens, 8)

        def product(x, weight):
            parts = project.project(x, weight, cut="rows", implementation="xla")
            return pointwise.join(parts, x.dtype)

        name = f"product of {tokens} tokens"
        compare(mesh, product, ["B T F", "F D"], [x, weight], name, [sent])


def compare_windows(mesh, everything):
    arrays = [normal(B, 3, N, H), normal(B, S, K, H), whole(0, 9, 4, 2)]
    arrays.append(whole(3, 1, 0, 3))
    letters = ["B W N H", "B T K H", "B", "B"]
    for how in ("xla", "triton") + ("reference",) * everything:
        for reduction in ("sum", "max") if everything else ("sum",):

            def score(query, key, start, count, how=how, reduction=reduction):
                return windows.window_scores(
                    *(query, key, start),
                    count=count,
                    scale=0.3,
                    length=10,
                    reduction=reduction,
                    implementation=how,
                )

            compare(mesh, score, letters, arrays, f"window {how} {reduction}", [])


def compare_norms(mesh):
    """Raise where norms over all heads are not those of one device."""
    config = dataclasses.replace(tiny.CONFIG, num_heads=N, num_kv_heads=K)
    order = layout.order(config, "qkv", (2, 2))
    heads = dict(num_heads=N, num_kv_heads=K)
    size = config.head_dim
    qkv = normal(B, 3, (N + 2 * K) * size)
    arrays = qkv, normal(N * size), normal(K * size)
    function = functools.partial(
        pointwise.norm_of_all_heads, eps=1e-6, implementation="xla", **heads
    )
    alone = jax.jit(function)(*arrays)
    with jax.set_mesh(mesh):
        cut = jax.NamedSharding(mesh, partition_spec("B T Q"))
        spread = jax.device_put(qkv[..., order], cut), *arrays[1:]
        program = jax.jit(function).lower(*spread).compile()
        got = np.asarray(program(*spread))[..., np.argsort(order)]
    np.testing.assert_allclose(got, alone, atol=2e-6)
    sent = re.findall(r"= (\S+) (all-\w+|collective-\w+)", program.as_text())
    assert sent == [(f"f32[2,{B // 2},3]{{2,1,0}}", "all-reduce")], sent


def compare_shared(mesh, everything):
    """Rows of one device are about documents of which every device has its heads."""
    positions = np.tile(np.arange(S), (B, K, 1))
    positions[:, :, 7:] = -1
    slots = Slots(
        keys=normal(B, K, S, H),
        values=normal(B, K, S, H),
        positions=whole(*positions),
        target=whole(*np.full((B, K), 7)),
    )
    both = normal(3, K, 2 * S, H), normal(3, K, 2 * S, H)
    held = whole(*np.tile(np.arange(2 * S), (3, K, 1)))
    shared = SharedSlots(*both, held, whole(2, 0, 2, 2))
    token = Token(normal(B, K, H), normal(B, K, H), whole(7, 7, -1, 7))
    letters = [
        "B N H",
        Token("B K H", "B K H", "B"),
        Slots("B K S H", "B K S H", "B K S", "B K", None),
        SharedSlots("D K P H", "D K P H", "D K P", "B"),
    ]
    arrays = [normal(B, N, H), token, slots, shared]
    for how in ("xla",) + ("reference",) * everything:
        function = functools.partial(
            shared_slots.attend_from_token, scale=0.3, most=3, implementation=how
        )
        compare(mesh, function, letters, arrays, f"shared {how}", [])


if __name__ == "__main__":
    stand_in_for_devices()
    mesh = sharding.make_mesh(data=2, model=2)
    compare_longflow(mesh, sys.argv[1] == "slow")
    compare_windows(mesh, sys.argv[1] == "slow")
    compare_norms(mesh)
    compare_products(mesh)
    compare_shared(mesh, sys.argv[1] == "slow")
    assert SHAPES, "no stand-in was called"
    for alone, spread in zip(SHAPES[::2], SHAPES[1::2], strict=True):
        assert (spread[0], spread[-2]) == (alone[0] / 2, alone[-2] / 2)
    print("equal")
