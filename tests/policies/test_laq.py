"""LAQ: what it sketches, and that a prompt is read once, however many budgets it has.

The plain twin reads it twice: once to sketch, and anew with the sketch behind it.
"""

import dataclasses
import functools

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import pytest
from small_policies import PREFILL
from tiny import CONFIG, params, prompts

from jaxkv import LAQ, AdaKV, LongFlow, Options, SnapKV, forward, generation
from jaxkv.laws.lawbook import CLOSE, assert_same_tokens_are_held
from jaxkv.laws.network import MIXED
from jaxkv.laws.programs import LENGTHS, NEW, PROMPT, SMALL
from jaxkv.models.decoder import Decoder
from jaxkv.sketching import by_rows

TOKENS, ROWS = prompts(4, LENGTHS, PROMPT)
SMALL_LAQ = PREFILL["laq"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Given(LAQ):
    """LAQ of a sketch that is there already: its prompts are read as DapQ's are."""

    sketch: tuple[tuple[int, ...], ...]
    sketches = False

    def pseudo_tokens(self, tokens, lengths, *, vocab_size, sketch):
        return jnp.asarray(self.sketch, jnp.int32)


class Again(LAQ):
    """It sketches from what another sketch has left."""

    @property
    def sketch_policy(self):
        return dataclasses.replace(SMALL_LAQ, n_recent=2)


def within(policy, laq):
    """Return the policy around another one than it is around."""
    if isinstance(policy, LAQ):
        return laq
    return dataclasses.replace(policy, policy=within(policy.policy, laq))


def innermost(policy):
    return policy if isinstance(policy, LAQ) else innermost(policy.policy)


def shapes(policy, config):
    options = Options(budget=PROMPT, prefill=policy)
    slots = options.layer_slots(PROMPT, NEW, config.windows)
    return dict(options=options, slots=slots)


def read(policy, config, held):
    """Return the logits of the token after each prompt, and the cache."""

    @jax.jit
    def run(params, tokens, lengths, keep, held):
        network = Decoder(config)
        hidden, cache = forward.read(
            *(network, params, tokens, lengths),
            **shapes(policy, config),
            keep=keep,
            held=held,
        )
        return forward.logits_at_end(network, params, hidden, lengths), cache

    return run(params(config), TOKENS, ROWS, jnp.asarray(SMALL), held)


def sketched(laq, config):
    """Return the greedy output of an eviction by SnapKV, token by token."""
    logits, cache = read(laq.sketch_policy, config, None)
    how = shapes(laq.sketch_policy, config)["options"]
    step = jax.jit(functools.partial(forward.decode_step, Decoder(config), options=how))
    out = [logits.argmax(-1)]
    for i in range(laq.window_size - 1):
        logits, cache = step(params(config), out[-1], ROWS + i, cache)
        out.append(logits.argmax(-1))
    return np.stack(out, axis=1)


@pytest.mark.parametrize(
    ("policy", "config", "held"),
    [
        pytest.param(SMALL_LAQ, CONFIG, None, id="alone", marks=pytest.mark.slow),
        pytest.param(
            PREFILL["criticalkv of adakv of laq"],
            MIXED,
            (19, 3, 8),
            id="wrapped, windows, questions",
        ),
        pytest.param(
            AdaKV(policy=dataclasses.replace(SMALL_LAQ, n_recent=2)),
            MIXED,
            None,
            id="recent, windows",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            SMALL_LAQ, MIXED, (19, 3, 8), id="questions", marks=pytest.mark.slow
        ),
        pytest.param(
            Again(window_size=4, kernel_size=3),
            CONFIG,
            None,
            id="a sketch of a sketch",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_it_equals_a_second_reading_with_the_sketch(policy, config, held):
    held = None if held is None else jnp.asarray(held)
    laq = innermost(policy)
    sketch = sketched(laq, config)
    fields = {f.name: getattr(laq, f.name) for f in dataclasses.fields(laq)}
    twin = within(policy, Given(**fields, sketch=tuple(map(tuple, sketch.tolist()))))
    (want_logits, want), (logits, got) = (
        read(one, config, held) for one in (twin, policy)
    )
    np.testing.assert_allclose(logits, want_logits, **CLOSE)
    assert_same_tokens_are_held(want, got)


def test_it_sketches_with_its_own_window():
    policy = LAQ(window_size=4, draft_window_size=3, kernel_size=5, pooling="avg")
    assert policy.sketch_policy == SnapKV(window_size=3, kernel_size=5, pooling="avg")


unbatchable = jax.extend.core.Primitive("unbatchable")
unbatchable.def_abstract_eval(lambda x: x)


class Watched:
    """A network that notes what passes, and knows no `vmap`, as kernels do."""

    def __init__(self):
        self.network, self.config, self.passed = Decoder(CONFIG), CONFIG, []

    def apply(self, variables, *args, method=None, **kwargs):
        out = self.network.apply(variables, *args, method=method, **kwargs)
        if method is None:
            self.passed.append(args[0].shape)
            return unbatchable.bind(out[0]), out[1]
        return unbatchable.bind(out) if method == "unembed" else out


def test_a_prompt_is_read_once_whatever_the_number_of_budgets():
    """What passes a second time is the sketch, of all budgets together."""
    how = dict(shapes(SMALL_LAQ, CONFIG), max_out=NEW)
    keys, stops = jax.random.split(jax.random.key(0), 6), jnp.asarray([-1])

    def trace(start, number, keep):
        network = Watched()
        jax.eval_shape(
            lambda params: start(
                *(network, params, TOKENS, ROWS, keys[:number], stops),
                keep=jnp.asarray(keep),
                **how,
            ),
            params(),
        )
        return network.passed

    one, two = (3, PROMPT), (3, SMALL_LAQ.window_size)
    assert trace(generation.start, 3, SMALL) == [one, (3, 1), two]
    passed = trace(generation.start_copies, 6, (SMALL, (7, 8, 9)))
    assert passed.count(one) == 1
    assert {(6, 1), (6, SMALL_LAQ.window_size)} < set(passed)


@pytest.mark.slow
@pytest.mark.parametrize("config", [CONFIG, MIXED], ids=["alike", "mixed"])
def test_budgets_of_a_prompt_are_cut_as_each_alone(config):
    laq = dataclasses.replace(SMALL_LAQ, clusters=2)
    keeps = jnp.asarray([SMALL, (20, 20, 20), (4, 5, 6)])
    how = dict(shapes(laq, config), held=None)
    given = Decoder(config), params(config), TOKENS, ROWS

    @jax.jit
    def cut(keep):
        return forward.read(*given, keep=keep, **how)[1]

    together = jax.jit(jax.vmap(cut))(keeps)
    for i, keep in enumerate(keeps):
        one = jax.tree.map(lambda x, i=i: x[i], together)
        assert_same_tokens_are_held(cut(keep), one)


def test_mapped_axes_become_rows():
    """Of nested maps, too; and what differs in what rows share runs in turn."""
    shapes = []

    def times(common, rows):
        shapes.append(rows[0].shape)
        x, y = rows
        return x * y * jnp.tile(common, len(x) // len(common))[:, None]

    run = by_rows(times)
    common, x = jnp.arange(1.0, 4), jnp.arange(6.0).reshape(3, 2)
    y = jnp.arange(24.0).reshape(2, 2, 3, 2)
    nested = jax.vmap(jax.vmap(lambda y: run(common, (x, y))))(y)
    np.testing.assert_array_equal(nested, np.asarray(x * common[:, None]) * np.array(y))
    assert shapes[-1] == (12, 2)
    commons = jnp.stack([common, -common])
    apart = jax.vmap(lambda common, y: run(common, (x, y)))(commons, y[0])
    np.testing.assert_array_equal(apart, [nested[0, 0], -nested[0, 1]])


class Silent(LAQ):
    """It says that it sketches, and does not."""

    def pseudo_tokens(self, tokens, lengths, *, vocab_size, sketch):
        return jnp.zeros((len(tokens), self.window_size), jnp.int32)


class Hidden(LAQ):
    """It sketches, and does not say so."""

    sketches = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class Asking(LAQ):
    """It sketches with what it is told to."""

    other: object
    steps: object = 4

    def pseudo_tokens(self, tokens, lengths, *, vocab_size, sketch):
        return sketch(self.other, self.steps)


@pytest.mark.parametrize(
    ("policy", "message"),
    [
        (
            Asking(other=SnapKV),
            r"Asking.pseudo_tokens: sketch takes a policy .*, got .*SnapKV'",
        ),
        (Asking(other=LongFlow()), "as in sketch.*, got LongFlow.* and 4"),
        (Asking(other=None), "got None and 4"),
        (Asking(other=SnapKV(), steps=0), "at least 1, .* and 0"),
        (Asking(other=SnapKV(), steps=2.5), "at least 1, .* and 2.5"),
        (Silent(), "Silent.pseudo_tokens must ask for a sketch where its"),
        (Hidden(), "Hidden.pseudo_tokens asks for a sketch, but its sketches is"),
    ],
)
def test_a_policy_says_whether_it_sketches(policy, message):
    with pytest.raises(ValueError, match=message):
        read(policy, CONFIG, None)


def test_it_reads_no_part_of_the_layers():
    with pytest.raises(ValueError, match="read_part: LAQ decodes a sketch from"):
        forward.read_part(
            *(Decoder(CONFIG), params(), TOKENS, ROWS, None),
            **shapes(LAQ(), CONFIG),
            keep=None,
            first=0,
            count=1,
        )
