"""The experts' kernels for few tokens: interpreted, compiled, and on a GPU.

Run as a script, this file is its own worker; `triton_on_cpu` says why.
"""

import functools
import itertools
import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import triton_on_cpu

from jaxkv.kernels import dispatch, experts, experts_triton, triton_call
from jaxkv.kernels.experts import Gate, Weights
from jaxkv.kernels.experts_triton import Tiles, choose_tiles, constants, unsupported
from jaxkv.models.public_shapes import SHAPES

CLAMPED = Gate(alpha=1.702, limit=0.6, shift=1.0)  # so low that it acts
# tokens, experts, experts of a token, hidden, inner columns, biases, activation, dtype
FAST = [
    (1, 8, 2, 128, 64, False, Gate(), "bfloat16"),
    (4, 16, 2, 72, 40, True, CLAMPED, "float16"),
    (33, 2, 2, 136, 24, True, CLAMPED, "bfloat16"),
]
SLOW = [
    (tokens, *case)
    for tokens, case in itertools.product(
        [1, 7, 8, 33, 64],
        [
            (16, 1, 64, 72, False, Gate(), "bfloat16"),
            (8, 8, 136, 64, True, CLAMPED, "float16"),
            (16, 3, 200, 72, True, Gate(), "bfloat16"),
        ],
    )
]
SMALL = (
    Tiles(block=32, depth=64, warps=4, stages=2),
    Tiles(block=64, depth=32, warps=4, stages=2),
)
# Tokens of which one is to have the bits that it has alone.
TOGETHER = [1, 2, 7, 8, 33, 64]
# Of a number; Triton's interpreter truncates to bfloat16, twice here.
TOLERANCE = {"bfloat16": 2**-6, "float16": 2**-10}


def inputs(case, seed=0):
    """Return tokens, choices, shares and weights; the first expert is liked by many.

    In the last token's place of its last choice stands an expert of another device.
    """
    tokens, count, per_token, hidden, inner, biased, _, dtype = case
    rng = np.random.default_rng(seed)

    def draw(*shape, scale=0.3):
        return jnp.asarray(scale * rng.standard_normal(shape), dtype)

    leaves = [draw(count, hidden, 2 * inner), draw(count, inner, hidden)]
    leaves += [draw(count, 2 * inner), draw(count, hidden)] if biased else []
    logits = rng.standard_normal((1, tokens, count)).astype("float32")
    logits[:, : tokens - tokens // 4, 0] += 9
    chosen, shares = experts.route(
        jnp.asarray(logits), per_token=per_token, normalize=True
    )
    chosen = chosen[0]
    if chosen.size > 1:
        chosen = chosen.at[-1, -1].set(count)
    return draw(tokens, hidden, scale=1.0), chosen, shares[0], Weights(*leaves)


def off(case, found) -> float:
    """Return the largest error, in tolerances of the largest number."""
    wanted = experts._reference(*inputs(case), gate=case[6])
    assert found.dtype == case[7] and found.shape == wanted.shape
    found, wanted = np.asarray(found, np.float32), np.asarray(wanted)
    error = np.abs(found - wanted).max() / np.abs(wanted).max()
    return float(error / TOLERANCE[case[7]])


@triton_on_cpu.fast_and_slow
def test_interpreted_kernels_agree_with_the_reference(cases):
    triton_on_cpu.assert_interpreted(__file__, cases)


def check_interpreted(case, tiles=SMALL) -> list[str]:
    """Run the kernels under the interpreter and return what is wrong with them."""
    from jaxkv.kernels import experts_triton_body as body

    multiplied = []  # tokens of each program

    def find_expert(*arguments, find=body.find_expert):
        found = find(*arguments)
        multiplied.append(int(found[1].handle.data.item()))
        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(body, "find_expert", find_expert)
        found = experts_triton.experts_triton(*inputs(case), gate=case[6], tiles=tiles)
    failures = []
    worst = off(case, found)
    if not worst < 1:
        failures.append(f"{case} {tiles}: off by {worst}")
    # Each expert that is here is read once, for all of its tokens.
    _, count, _, hidden, inner, *_ = case
    here = np.asarray(inputs(case)[1])
    here = here[here < count]
    blocks = -(-inner // tiles[0].block) + -(-hidden // tiles[1].block)
    reading = sum(number > 0 for number in multiplied)
    if (
        reading != blocks * len(np.unique(here))
        or sum(multiplied) != blocks * here.size
    ):
        failures.append(f"{case}: programs have tokens {multiplied}")
    return failures


def check_together(case, together=TOGETHER) -> list[str]:
    """Compare batches with one of their tokens alone, bit for bit."""
    x, chosen, shares, weights = inputs((max(together), *case[1:]))
    run = functools.partial(experts_triton.experts_triton, gate=case[6])
    alone = run(x[:1], chosen[:1], shares[:1], weights)
    failures = []
    for rows in together:
        # The token that was alone comes last.
        some = (jnp.roll(leaf[:rows], -1, axis=0) for leaf in (x, chosen, shares))
        if not jnp.array_equal(run(*some, weights)[-1:], alone):
            failures.append(f"{case}: other bits among {rows} tokens")
    return failures


def check_infinite(case) -> list[str]:
    """Fill other tokens, and experts that nobody chose, with what would show."""
    x, chosen, shares, weights = inputs(case)
    run = functools.partial(experts_triton.experts_triton, gate=case[6])
    once = run(x, chosen, shares, weights)
    free = jnp.asarray(~np.isin(np.arange(case[1]), np.asarray(chosen)))
    assert free.any() and len(x) > 1
    weights = Weights(
        *(
            jnp.where(free.reshape(-1, *[1] * (leaf.ndim - 1)), jnp.nan, leaf)
            for leaf in weights
        )
    )
    other = run(x.at[1].set(jnp.nan), chosen, shares, weights)
    right = jnp.isnan(other[1]).all() and jnp.array_equal(
        jnp.delete(other, 1, axis=0), jnp.delete(once, 1, axis=0)
    )
    return [] if right else [f"{case}: another token or expert shows"]


def shipped(name):
    """Return the sizes of a public network, and tiles of its two products."""
    hidden, e = SHAPES[name].hidden_size, SHAPES[name].experts
    return hidden, e.size, e.count, e.per_token


def test_tiles_of_networks_are_possible_everywhere():
    names = [name for name in SHAPES if SHAPES[name].experts]
    assert len(names) > 3
    for name, shared in itertools.product(names, [99, 163, 227]):
        hidden, inner, _, per_token = shipped(name)
        for depth, columns, gated in [(hidden, inner, True), (inner, hidden, False)]:
            tiles = choose_tiles(
                depth, columns, per_token, gated=gated, shared=1024 * shared
            )
            # What does not divide is loaded under a mask, and slower.
            assert depth % tiles.depth == 0 and columns % tiles.block == 0
            stage = 2 * tiles.depth * (tiles.block * (1 + gated) + 16)
            assert stage * tiles.stages <= 1024 * shared


def test_few_choices_have_narrower_tiles():
    """One token of Qwen3-30B-A3B gives 132 processors 96 and 256 programs."""
    gated = choose_tiles(2048, 768, 8, gated=True)
    down = choose_tiles(768, 2048, 8, gated=False)
    assert (gated.block, down.block) == (64, 64)
    assert choose_tiles(2048, 768, 5, gated=True).block == 32


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize(
    ("name", "tokens"),
    [("qwen3-30b-a3b", 1), ("olmoe-1b-7b", 64), ("gpt-oss-20b", 8)],
)
def test_shipped_tiles_compile_without_spills(name, tokens, capability):
    pytest.importorskip("triton")
    from jaxkv.kernels import experts_triton_body as body

    hidden, inner, count, per_token = shipped(name)
    e = SHAPES[name].experts
    shared = 1024 * (163 if capability == 80 else 227)
    dtypes = dict.fromkeys(("x_ptr", "weight_ptr", "bias_ptr", "out_ptr"), "bfloat16")
    for kernel, depth, columns, gate in [
        (body.experts_gated, hidden, inner, e.gate),
        (body.experts_down, inner, hidden, None),
    ]:
        tiles = choose_tiles(
            *(depth, columns, per_token), gated=gate is not None, shared=shared
        )
        sizes = constants((tokens, per_token), count, depth, columns, tiles, gate=gate)
        usage = triton_on_cpu.usage(
            kernel,
            dtypes | dict(experts_ptr="int32"),
            sizes | dict(BIASED=e.bias),
            tiles,
            capability,
        )
        print(f"sm_{capability} {name} {tokens} {tiles} {usage}")
        assert usage["stack"] == 0 and usage["local"] == 0
        assert usage["registers"] <= 168  # three programs a processor
        assert usage["shared"] <= shared


@pytest.mark.parametrize(
    ("tokens", "hidden", "inner", "dtype", "why"),
    [
        (0, 64, 64, "bfloat16", "takes 1 to 64 tokens, got 0"),
        (65, 64, 64, "bfloat16", "takes 1 to 64 tokens, got 65"),
        (1, 64, 64, "float32", "takes one 16-bit float, got float32 and float32"),
        (1, 64, 0, "bfloat16", "of multiples of 8, got 4 of 64 x 0"),
        (1, 64, 36, "bfloat16", "of multiples of 8, got 4 of 64 x 36"),
        (1, 60, 64, "float16", "of multiples of 8, got 4 of 60 x 64"),
        (64, 72, 8, "float16", ""),
    ],
)
def test_what_the_kernels_cannot_take_is_said(tokens, hidden, inner, dtype, why):
    def of(*shape):
        return jax.ShapeDtypeStruct(shape, dtype)

    weights = Weights(of(4, hidden, 2 * inner), of(4, inner, hidden))
    reason = unsupported(of(tokens, hidden), weights)
    assert why in reason and bool(why) == bool(reason)
    other = jax.ShapeDtypeStruct((1, hidden), "float32")
    assert "16-bit float, got float32" in unsupported(other, weights)


def test_named_it_runs_or_says_why(monkeypatch):
    def run(case):
        x, chosen, shares, weights = inputs(case)
        return experts.feed_forward(
            *(x[None], chosen[None], shares[None], weights),
            gate=Gate(),
            implementation="triton",
        )

    with pytest.raises(NotImplementedError, match="needs an NVIDIA GPU"):
        run(FAST[0])
    monkeypatch.setattr(dispatch, "triton_unavailable", lambda: "")
    with pytest.raises(NotImplementedError, match="takes 1 to 64 tokens, got 65"):
        run((65, *FAST[0][1:]))


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [1, 8, 64])
def test_on_a_gpu_it_agrees_with_the_reference(tokens):
    for case in [
        (tokens, 32, 4, 2048, 768, False, Gate(), "bfloat16"),
        (tokens, 16, 2, 2880, 1000, True, CLAMPED, "float16"),
    ]:
        found = [
            experts_triton.experts_triton(*inputs(case), gate=case[6]) for _ in "12"
        ]
        assert off(case, found[0]) < 1
        np.testing.assert_array_equal(*found)


@pytest.mark.gpu
def test_on_a_gpu_a_token_has_the_bits_that_it_has_alone():
    case = (64, 128, 8, 2048, 768, True, CLAMPED, "bfloat16")
    failures = check_together(case) + check_infinite((8, *case[1:]))
    assert not failures, "\n".join(failures)


if __name__ == "__main__":
    triton_on_cpu.teach_bfloat16_dot()
    triton_call.call = triton_on_cpu.call
    if sys.argv[1] == "FAST":
        failures = [f for case in FAST for f in check_interpreted(case)]
        shipped = experts_triton.tiles_here(128, 64, 2)
        failures += check_interpreted(FAST[0], shipped)
        failures += check_infinite(FAST[1])
        case = (0, 2, 1, 64, 32, True, CLAMPED, "bfloat16")
        failures += check_together(case, [1, 7, 33])
    else:
        failures = [f for case in SLOW for f in check_interpreted(case)]
        failures += check_together((0, 40, 3, 136, 72, True, Gate(), "bfloat16"))
    print(json.dumps(failures))
