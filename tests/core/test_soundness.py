"""Logits that are no numbers end a generation with one clear line."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

import jaxkv
from jaxkv.soundness import LogitsError

CONFIG = dataclasses.replace(tiny.CONFIG, tied=False, qk_norm=False, num_layers=1)
PARAMS = tiny.parameters(CONFIG)
# The tokens of an output follow each other in the prompts, so that they are drafted.
PROMPTS = [[5, 6, 7, 8] * 5, [9, 10, 11]]
DRAFTERS = {"plain": None, "tree": jaxkv.Tree(break_even=0.0, include_output=True)}
drafters = pytest.mark.parametrize("drafter", DRAFTERS.values(), ids=DRAFTERS)


def model(**changes):
    """Return the tiny network with functions of some of its parameters in their place.

    Args:
      **changes: by the parameter's own name.
    """

    def changed(path, leaf):
        change = changes.get(path[-1].key)
        return leaf if change is None else change(leaf)

    return tiny.language_model(
        config=CONFIG, weights=jax.tree_util.tree_map_with_path(changed, PARAMS)
    )


def generate(lm, prompts, **options):
    return jaxkv.generate(lm, prompts, max_new_tokens=12, **options)


def cast(lm, dtype):
    params = jax.tree.map(lambda x: x.astype(dtype), lm.params)
    return dataclasses.replace(lm, params=params)


CAUSES = {
    "one NaN": (
        "float32",
        dict(final_norm=lambda x: x.at[3].set(jnp.nan)),
        "1 of 32 values of the weight final_norm are NaN or infinite: .* is damaged",
    ),
    "infinity": (
        "bfloat16",
        dict(down=lambda x: x.at[3, 5].set(jnp.inf)),
        "of the weight layer_0/down are NaN",
    ),
    "an activation beyond float16": (
        "float16",
        dict(down=lambda x: 6e4 * x),
        "beyond 65,504; load the model with dtype bfloat16 or float32",
    ),
    "a weight beyond float16": (
        "float16",
        dict(final_norm=lambda x: x.at[3].set(1e5)),
        "beyond 65,504; load the model with dtype bfloat16",
    ),
    "NaN in float16": (
        "float16",
        dict(head=lambda x: x.at[3, 5].set(jnp.nan)),
        "of the weight head are NaN",
    ),
    "an activation beyond float32": (
        "float32",
        dict(head=lambda x: 3e38 * x),
        "exceeds float32; compare the checkpoint",
    ),
}


@pytest.mark.parametrize(("dtype", "changes", "message"), CAUSES.values(), ids=CAUSES)
def test_the_cause_is_said(dtype, changes, message):
    broken = cast(model(**changes), dtype)
    with pytest.raises(LogitsError, match=f"behind prompt 0, prompt 1 are.*{message}"):
        generate(broken, PROMPTS)


def test_a_good_network_passes_in_half_precision():
    assert len(generate(cast(model(), "float16"), PROMPTS).tokens[0]) == 12


@drafters
@pytest.mark.parametrize("sampler", [jaxkv.Greedy(), jaxkv.Categorical(top_p=0.9)])
def test_a_row_that_breaks_in_the_middle_is_named(drafter, sampler):
    options = dict(sampler=sampler, speculate=drafter)
    fine = generate(model(), PROMPTS, **options).tokens
    # The second row meets a token that the first does not.
    alone = next(t for t in fine[1] if t not in (*fine[0], *PROMPTS[0], *PROMPTS[1]))
    after = fine[1].index(alone) + 1
    broken = model(embedding=lambda x: x.at[alone].set(jnp.nan))
    blocks = [[], []]

    def collect(new):
        for row, tokens in zip(blocks, new, strict=True):
            row.extend(tokens)

    match = f"behind prompt 1 and {after} tokens of its output .* weight embedding are"
    with pytest.raises(LogitsError, match=match) as error:
        generate(broken, PROMPTS, **options, on_tokens=collect, block=64)
    assert error.value.tokens == {1: after}
    # What came before the fault is what the good network gives.
    assert blocks == [list(fine[0]), list(fine[1][:after])]


@pytest.mark.parametrize(
    ("options", "held"),
    [({}, 1), (dict(decode=jaxkv.StreamingLLM(), prefill=jaxkv.KNorm(), budget=8), 2)],
)
def test_no_score_behind_what_is_no_number(options, held):
    broken = model(embedding=lambda x: x.at[60].set(jnp.nan))
    rows = [[9, 8, 7, 6], [9, 60, 7, 6]]
    with pytest.raises(LogitsError, match=r"behind prompt 1 .* embedding are") as error:
        jaxkv.score(broken, [[5, 6, 8]], rows, **options)
    assert error.value.tokens == {1: held}


def test_the_pure_function_says_which_rows():
    lm = model(embedding=lambda x: x.at[10].set(jnp.nan))
    tokens = np.zeros((2, 20), np.int32)
    for row, prompt in zip(tokens, PROMPTS, strict=True):
        row[: len(prompt)] = prompt
    out = jaxkv.generate_tokens(
        *(lm.network, lm.params, jnp.asarray(tokens), jnp.asarray([20, 3], jnp.int32)),
        *(jax.random.split(jax.random.key(0), 2), jnp.asarray([-1]), jnp.int32(4)),
        options=jaxkv.Options(),
        slots=32,
        max_out=4,
    )
    assert out.finite.tolist() == [True, False]
    assert out.lengths.tolist() == [4, 0] and out.stopped.tolist() == [False, False]


PICKED = r"Mine\.pick: what it returns must be .*int32 \[B\]=\[2\], got "


@pytest.mark.parametrize(
    ("pick", "message"),
    [
        (lambda logits: logits.argmax(-1)[0], PICKED + r"int32 \[\]"),
        (lambda logits: logits.max(-1), PICKED + r"float32 \[2\]"),
        (lambda logits: None, PICKED + "NoneType"),
        (lambda logits: jnp.full(2, 999), "or Mine.pick returns tokens that are not"),
        (lambda logits: jnp.full(2, -1), "or Mine.pick returns tokens that are not"),
    ],
)
def test_mistakes_of_a_sampler(pick, message):
    with pytest.raises(ValueError, match=message):
        generate(model(), PROMPTS, sampler=picking(pick))


def picking(pick):
    named = dict(repetition_penalty=1.0, check=lambda self: None)
    named["pick"] = lambda self, logits, keys: pick(logits)
    return type("Mine", (), named)()


def test_a_sampler_of_one_s_own_works():
    best = picking(lambda logits: logits.argmax(-1).astype(jnp.int16))
    wanted = generate(model(), PROMPTS).tokens
    assert generate(model(), PROMPTS, sampler=best).tokens == wanted


def test_many_rows_are_few_words():
    error = LogitsError({row: 0 for row in range(9)}, "why.").of_prompts(range(8, 17))
    assert "behind prompt 8, prompt 9, prompt 10 and 6 more are NaN" in str(error)
    assert str(error).endswith("; why.")
