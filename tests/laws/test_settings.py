"""The process's settings of JAX change no output, and no dtype.

Programs elsewhere in the process may need them. All methods are traced under 64 bits,
which compiles nothing; a few run under each setting.
"""

import contextlib
import dataclasses
import itertools

import jax
import jax.numpy as jnp
import pytest
from jax.extend.core import jaxprs_in_params
from small_policies import DAPQ, DECODE, PREFILL
from tiny import CONFIG, NETWORK, language_model, params, prompts

import jaxkv
from jaxkv import Categorical, Greedy, LongFlow, Options, generation, registry
from jaxkv.laws.lawbook import DRAFTER
from jaxkv.laws.programs import LENGTHS, NEW, PROMPT, with_budget

SMALL = 9
DRAWN = Categorical(
    temperature=0.9, top_k=20, top_p=0.9, min_p=0.02, repetition_penalty=1.2
)
LOSSY = [
    jaxkv.Conditional(),
    jaxkv.Conditional(form="F1"),
    jaxkv.FixedThreshold(),
    jaxkv.TopK(),
    jaxkv.Typical(),
]
REFERENCE = dict(
    prefill_implementation="reference",
    decode_implementation="reference",
    scores_implementation="reference",
)
LONGFLOW = Options(prefill=DAPQ, decode=LongFlow(), budget=SMALL)
METHODS = {
    **{
        f"prompt, {name}": Options(budget=PROMPT, prefill=policy)
        for name, policy in PREFILL.items()
    },
    **{
        f"prompt, dapq of {content}": Options(
            budget=PROMPT,
            prefill=dataclasses.replace(DAPQ, content=content, fixed_ids=(1, 2)),
        )
        for content in ("random_tokens", "random_span", "fixed", "vocabulary")
    },
    **{name: with_budget(options, SMALL) for name, options in DECODE.items()},
    **{
        f"drafts, {name}": dataclasses.replace(
            with_budget(options, SMALL), speculate=DRAFTER
        )
        for name, options in DECODE.items()
        if name in registry.DECODE and hasattr(options.decode, "attend_tree")
    },
    **{
        f"longflow by {score}": dataclasses.replace(
            LONGFLOW, decode=LongFlow(score=score)
        )
        for score in ("l2", "attention", "deletion")
    },
    "prompt lookup": Options(speculate=jaxkv.PromptLookup(match="latest")),
    "aligned": Options(speculate=jaxkv.Aligned(tail=True, num_draft_tokens=9)),
    **{str(rule): Options(speculate=DRAFTER, accept=rule) for rule in LOSSY},
    "penalised": Options(sampler=Greedy(repetition_penalty=1.2)),
    "drawn": Options(sampler=DRAWN),
    "drawn, drafts": Options(sampler=DRAWN, speculate=DRAFTER),
    "reference": dataclasses.replace(LONGFLOW, **REFERENCE),
    "reference, drafts": dataclasses.replace(LONGFLOW, **REFERENCE, speculate=DRAFTER),
}


def traced(options, dtype):
    """Return the program of a generation, and dtypes of its output."""
    weights = jax.tree.map(lambda x: x.astype(dtype), params())
    inputs = *prompts(0, LENGTHS, PROMPT), jax.random.split(jax.random.key(0), 3)

    def generate(weights, tokens, lengths, keys):
        return generation.generate_tokens(
            *(NETWORK, weights, tokens, lengths, keys),
            *(jnp.asarray([-1], jnp.int32), jnp.int32(NEW)),
            options=options,
            slots=options.layer_slots(PROMPT, NEW, CONFIG.windows),
            max_out=NEW,
        )

    program, out = jax.make_jaxpr(generate, return_shape=True)(weights, *inputs)
    return program, {leaf.dtype for leaf in jax.tree.leaves(out)}


def wide(program):
    """Return the operations whose results are floating-point numbers of 64 bits."""
    found = [
        str(equation.primitive)
        for equation in program.eqns
        for result in equation.outvars
        if getattr(result.aval, "dtype", None) == jnp.dtype("float64")
    ]
    for equation in program.eqns:
        for inner in jaxprs_in_params(equation.params):
            found += wide(inner)
    return found


@pytest.mark.parametrize("name", METHODS)
def test_nothing_becomes_64_bits_wide(name):
    dtype = "bfloat16" if "drafts" in name else "float32"
    with jax.enable_x64(True):
        program, dtypes = traced(METHODS[name], dtype)
    assert dtypes <= {jnp.dtype(x) for x in (dtype, "float32", "int32", "bool")}
    assert wide(program.jaxpr) == []


def test_numbers_of_64_bits_are_noticed():
    with jax.enable_x64(True):
        double = jax.jit(lambda x: 2 * jnp.float64(x))
        assert wide(jax.make_jaxpr(double)(jnp.float32(1)).jaxpr)


LM = language_model()
PROMPTS = [[5, 6, 7, 8] * 5, [9, 10, 11], [5, 6, 7, 8, 9]]
RUNS = {  # draws, bulk evictions; drafts, evictions in trees; drafts that are drawn
    "evicting": dict(
        budget=SMALL, prefill=PREFILL["random"], decode=DECODE["r-kv"].decode
    ),
    "drafting": dict(budget=SMALL, prefill=DAPQ, decode=LongFlow(), speculate=DRAFTER),
    "drawing": dict(
        sampler=DRAWN, speculate=jaxkv.Aligned(num_draft_tokens=9, break_even=0.0)
    ),
}


def tokens(prompts=PROMPTS, seed=(3, 2**40, -5), **options):
    out = jaxkv.generate(LM, prompts, max_new_tokens=8, seed=list(seed), **options)
    return out.tokens


@pytest.fixture(scope="module")
def wanted():
    """What comes out under JAX's own settings."""
    return {name: tokens(**options) for name, options in RUNS.items()}


@contextlib.contextmanager
def strict():
    """All settings at once that refuse what is careless, and those of dtypes."""
    with (
        jax.enable_x64(True),
        jax.numpy_dtype_promotion("strict"),
        jax.numpy_rank_promotion("raise"),
        jax.debug_nans(True),
        jax.debug_infs(True),
        jax.debug_key_reuse(True),
        jax.legacy_prng_key("error"),
        jax.checking_leaks(),
        jax.transfer_guard("disallow"),
    ):
        yield


@contextlib.contextmanager
def loose():
    """All settings at once by which arithmetic or keys may differ."""
    with (
        jax.numpy_dtype_promotion("standard"),
        jax.numpy_rank_promotion("allow"),
        jax.default_prng_impl("rbg"),
        jax.default_matmul_precision("highest"),
    ):
        yield


SETTINGS = {"strict": strict, "loose": loose}


# Each compiles everything anew.
QUICK = [("evicting", "strict"), ("drafting", "strict"), ("drawing", "loose")]


@pytest.mark.parametrize(
    ("name", "setting"),
    [
        pytest.param(*pair, marks=[] if pair in QUICK else pytest.mark.slow)
        for pair in itertools.product(RUNS, SETTINGS)
    ],
)
def test_settings_change_no_token(name, setting, wanted):
    with SETTINGS[setting]():
        assert tokens(**RUNS[name]) == wanted[name]


@pytest.mark.parametrize(
    ("implementation", "partitionable"), [("rbg", True), ("unsafe_rbg", False)]
)
def test_a_row_draws_what_it_draws_alone(implementation, partitionable):
    with (
        jax.default_prng_impl(implementation),
        jax.threefry_partitionable(partitionable),
    ):
        together = tokens(sampler=DRAWN)
        for row, (prompt, seed) in enumerate(zip(PROMPTS, (3, 2**40, -5), strict=True)):
            assert tokens([prompt], [seed], sampler=DRAWN)[0] == together[row]


@pytest.mark.slow
def test_without_jit(wanted):
    with jax.disable_jit():
        assert tokens(**RUNS["drafting"]) == wanted["drafting"]
