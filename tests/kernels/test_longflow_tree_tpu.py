"""Trees under LongFlow on TPUs, without a TPU: interpreted, against the reference.

Interpreting costs seconds per compiled program and nothing per call, so each case is
drawn several times.
"""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu
from longflow_tree_cases import (
    FAST,
    MUTATIONS,
    SLOW,
    Case,
    faults,
    make_case,
    options_of,
)
from small_policies import DECODE
from tiny import CONFIG, prompts

from jaxkv.kernels import attend_tpu, dispatch, longflow_tpu, longflow_tree_tpu
from jaxkv.kernels import longflow_tree as tree
from jaxkv.kernels.longflow_tree_tpu import _plan, unsupported
from jaxkv.laws import lawbook, programs

# Beside the cases of all kernels, with the slots of a block; None chooses.
ODD = [
    (Case(1, 3, 3, 5, 32, sink=True), None),
    (Case(5, 6, 2, 300, 32), 128),
    (Case(2, 5, 1, 777, 64, "bfloat16", "l2", n_recent=9), None),
    (Case(11, 32, 4, 385, 32, "bfloat16", shared=False, cap=3.0), 256),
    (Case(17, 16, 16, 129, 32, "bfloat16", "attention"), 128),
    (Case(64, 9, 3, 70, 64, n_recent=3), None),
]


@pytest.fixture
def interpreted(monkeypatch):
    """Return the operation for a case, with the kernel for TPUs, which runs here."""
    monkeypatch.setattr(dispatch, "tpu_unavailable", lambda: "")
    kernel = longflow_tree_tpu.longflow_tree_tpu

    def run_of(case, **options):
        how = functools.partial(kernel, **dict(interpret=True) | options)
        monkeypatch.setattr(longflow_tree_tpu, "longflow_tree_tpu", how)
        how = dict(options_of(case), implementation="pallas_tpu")
        return jax.jit(functools.partial(tree.longflow_tree, **how))

    return run_of


def check(run, case, seeds):
    """Raise where any of some draws of a case is wrong, or two runs are not equal."""
    for seed in range(seeds):
        arrays = make_case(case, seed)
        got = run(**arrays)
        assert not faults(case, arrays, got)
    jax.tree.map(np.testing.assert_array_equal, got, run(**arrays))
    return arrays


@pytest.mark.parametrize("case", FAST)
def test_it_agrees_with_the_reference(case, interpreted):
    run = interpreted(case)
    arrays = check(run, case, 40)
    finished = jax.tree.map(lambda x: np.asarray(x[2]), run(**arrays))
    assert not finished.out.any() and not finished.targets.any()
    # Of slots that are worth the same, the lowest that may go.
    for seed in range(8):
        same = worthless(make_case(case, seed))
        assert not faults(case, same, run(**same))


def worthless(arrays):
    """Return the arguments with all values 0, so that the importances are, too."""
    nodes, slots = arrays["nodes"], arrays["slots"]
    zero = {name: 0 * getattr(slots, name) for name in ("values", "norms")}
    nodes = nodes._replace(value=0 * nodes.value)
    return arrays | dict(nodes=nodes, slots=slots._replace(**zero))


@pytest.mark.slow
@pytest.mark.parametrize(("case", "block"), [*((x, None) for x in SLOW), *ODD])
def test_it_agrees_with_the_reference_or_refuses(case, block, interpreted):
    arrays = make_case(case, 0)
    run = interpreted(case, block=block)
    if case.dtype == "float16" or case.head_dim % 32:
        with pytest.raises(NotImplementedError, match=r"bfloat16 or float32|of 32"):
            run(**arrays)
        return
    check(run, case, 4)


def test_heads_that_differ_share_a_victim_and_a_change_is_noticed(interpreted):
    case = Case(4, 4, 2, 37, 32, n_recent=1)
    run = interpreted(case)
    for seed in range(20):
        arrays = differing(make_case(case, seed))
        assert not faults(case, arrays, run(**arrays))
    arrays = check(run, case, 1)
    for name, mutate in MUTATIONS.items():
        assert faults(case, arrays, run(**mutate(arrays))), name


def differing(arrays):
    """Return the arguments with other positions, and more free slots, in one head."""
    slots = arrays["slots"]
    held = np.array(slots.positions)
    last = held[:, 1]
    last[last >= 0] = last.max() - last[last >= 0]
    last[:, ::5] = -1
    return arrays | dict(slots=slots._replace(positions=jnp.asarray(held)))


@pytest.mark.slow
@pytest.mark.parametrize("shared", [True, False])
def test_the_simulation_sees_no_race(shared, interpreted, capfd):
    """A simulation of the TPU's memories; it wants slots that fill the blocks."""
    simulated = pltpu.InterpretParams(uninitialized_memory="nan", detect_races=True)
    case = Case(5, 6, 2, 256, 128, shared=shared)
    check(interpreted(case, interpret=simulated, block=128), case, 1)
    assert "RACE" not in capfd.readouterr().out.upper()


@pytest.mark.slow
def test_exact_speculation_equals_plain(monkeypatch):
    """With the kernels that a TPU would run, interpreted, and drafts under LongFlow."""
    monkeypatch.setattr(dispatch, "tpu_unavailable", lambda: "")
    ran = []

    def interpreting(kernel):
        def run(*arrays, **options):
            ran.append(kernel)
            return kernel(*arrays, **options, interpret=True)

        return run

    kernels = {"longflow_attention_tpu": longflow_tpu}
    kernels |= {"longflow_tree_tpu": longflow_tree_tpu}
    for name, module in kernels.items():
        monkeypatch.setattr(module, name, interpreting(getattr(module, name)))
    heads = dict(head_dim=32, sinks=True, attention_cap=4.0)
    network = dataclasses.replace(CONFIG, **heads)
    monkeypatch.setattr(programs, "current", programs.compiled(network))
    options = programs.with_budget(DECODE["longflow"], 9)
    options = dataclasses.replace(options, decode_implementation="pallas_tpu")
    prompted = prompts(6, programs.LENGTHS, programs.PROMPT)
    lawbook.exact_speculation_equals_plain(options, *prompted, 6)
    assert {kernel.__name__ for kernel in ran} == set(kernels)


def of(*shape, dtype="bfloat16"):
    return jax.ShapeDtypeStruct(shape, dtype)


def test_what_it_cannot_take_is_refused_by_name_and_never_chosen(monkeypatch):
    plain = of(2, 16, 32, 128), of(2, 8, 3200, 128)
    many = of(2, 64, 128, 128), of(2, 128, 3200, 128)
    mixed = of(2, 1, 4, 64, dtype="float32"), of(2, 2, 9, 64)
    assert tree.choose("tpu", *plain, shared=True) == "pallas_tpu"
    for reason, arrays in (
        ("bfloat16 or float32, got float16", [of(2, 1, 4, 64, dtype="float16")] * 2),
        ("multiple of 32, got H=72", (of(2, 16, 32, 72), of(2, 8, 3200, 72))),
        ("of one dtype, got float32 and bfloat16", mixed),
        ("64 nodes of 128 heads over 3200 slots need", many),
    ):
        assert tree.choose("tpu", *arrays, shared=True) == "xla"
        assert reason in unsupported(*arrays, shared=True)
    # One head at a time needs less.
    assert tree.choose("tpu", *many, shared=False) == "pallas_tpu"
    monkeypatch.setattr(tree, "devices_per_row", lambda: 2)
    assert tree.choose("tpu", *plain, shared=True) == "xla"
    assert tree.choose("tpu", *plain, shared=False) == "pallas_tpu"
    case = FAST[0]
    named = functools.partial(
        tree.longflow_tree, **make_case(case, 0), **options_of(case)
    )
    with pytest.raises(NotImplementedError, match=r"longflow_tree: .* needs a TPU"):
        named(implementation="pallas_tpu")
    monkeypatch.setattr(dispatch, "tpu_unavailable", lambda: "")
    with pytest.raises(NotImplementedError, match=r"longflow_tree: .* they lie on 2;"):
        named(implementation="pallas_tpu")
    half = case._replace(dtype="float16")
    with pytest.raises(NotImplementedError, match=r"tree_tpu: takes .*got float16"):
        longflow_tree_tpu.longflow_tree_tpu(**make_case(half, 0), **options_of(half))


def test_blocks_and_chunks_are_possible_everywhere():
    """And small enough: of what one chip of 64 MiB has, the bound leaves a quarter."""
    reserved = {}
    for (heads, kv_heads), nodes, slots, head_dim, dtype, shared in itertools.product(
        *([(1, 1), (9, 3), (32, 8), (48, 3), (32, 32)], [1, 16, 64]),
        *([1, 127, 3200, 3201, 3712], [32, 128, 256]),
        *(["bfloat16", "float32"], [True, False]),
    ):
        arrays = (
            of(2, nodes, heads, head_dim, dtype=dtype),
            of(2, kv_heads, slots, head_dim, dtype=dtype),
        )
        plan = _plan(*arrays, shared=shared)
        assert plan.chunk % 128 == 0 and plan.block % plan.chunk == 0
        assert plan.padded >= slots and (plan.steps - 1) * plan.block < slots
        # Little is masked, and neither tile is large.
        assert plan.padded <= 1.25 * slots + 128
        assert plan.block * max(head_dim, 128) * plan.dtype.itemsize <= 1 << 20
        small = plan.nodes * plan.group * plan.block * 4 <= 2 << 20
        assert small or plan.block == 128
        fits = plan.vmem_bytes() <= attend_tpu.MAX_VMEM_BYTES
        assert fits or (nodes == 64 and heads > 9 and shared), plan
        if (heads, slots, head_dim, dtype) == (32, 3200, 128, "bfloat16"):
            reserved[kv_heads, nodes, shared] = plan.vmem_bytes() / 2**20
    assert round(reserved[8, 16, True]) == 19 and round(reserved[8, 64, True]) == 32
