"""Given tokens fed through a policy: equal to decoding them, and to reading them."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from tiny import NETWORK

from jaxkv import Full, LongFlow, Options, SnapKV, StreamingLLM, forward
from jaxkv import given as given_tokens

PROMPT, NEW = 8, 6
COUNTS = [NEW, 2, 4, 0]
POLICIES = {
    "full": Options(),
    "snapkv": Options(budget=5, prefill=SnapKV(window_size=2, kernel_size=3)),
    "streaming-llm": Options(budget=8, prefill=SnapKV(), decode=StreamingLLM(n_sink=1)),
    "longflow": Options(budget=8, prefill=SnapKV(), decode=LongFlow()),
}


@functools.cache
def program(options):
    slots = options.num_slots(PROMPT, NEW)

    def run(params, tokens, lengths, given, counts):
        logits, cache = forward.prefill(
            *(NETWORK, params, tokens, lengths), options=options, slots=slots
        )
        fed = given_tokens.feed(
            *(NETWORK, params, given, counts, lengths, logits, cache), options=options
        )
        return logits, cache, fed

    return jax.jit(run)


@functools.cache
def step(options):
    return jax.jit(functools.partial(forward.decode_step, NETWORK, options=options))


def inputs():
    tokens, lengths = tiny.prompts(0, [PROMPT, 3, 5, 6], PROMPT)
    given, counts = tiny.prompts(1, COUNTS, NEW)
    return tiny.params(), tokens, lengths, given, counts


@pytest.mark.parametrize("name", POLICIES)
def test_feeding_is_decoding_given_tokens(name):
    options, (params, tokens, lengths, given, counts) = POLICIES[name], inputs()
    logits, cache, fed = program(options)(params, tokens, lengths, given, counts)
    for order in range(NEW):
        running = order < counts
        wanted = jax.nn.log_softmax(logits)[jnp.arange(4), given[:, order]]
        wanted = jnp.where(running, wanted, 0)
        np.testing.assert_allclose(fed.log_probs[:, order], wanted, atol=2e-5)
        position = jnp.where(running, lengths + order, -1)
        new, cache = step(options)(params, given[:, order], position, cache)
        logits = jnp.where(running[:, None], new, logits)
    np.testing.assert_allclose(fed.logits, logits, atol=2e-4)
    for ours, theirs in zip(fed.cache, cache, strict=True):
        np.testing.assert_array_equal(ours.positions, theirs.positions)
        np.testing.assert_array_equal(ours.target, theirs.target)


def test_feeding_a_full_cache_is_reading():
    params, tokens, lengths, given, counts = inputs()
    _, _, fed = program(POLICIES["full"])(params, tokens, lengths, given, counts)
    whole = jnp.pad(tokens, ((0, 0), (0, NEW)))
    for row, (length, count) in enumerate(zip(lengths, counts, strict=True)):
        whole = whole.at[row, length : length + count].set(given[row, :count])
    read = functools.partial(
        forward.prefill, NETWORK, options=POLICIES["full"], slots=whole.shape[1]
    )
    logits, _ = jax.jit(read)(params, whole, lengths + counts)
    np.testing.assert_allclose(fed.logits, logits, atol=2e-4)


@pytest.mark.parametrize("name", POLICIES)
def test_a_row_is_fed_as_it_is_alone(name):
    params, *arrays = inputs()
    _, _, fed = program(POLICIES[name])(params, *arrays)
    # The others' counts change how many steps there are, and nothing else.
    fewer = arrays[3].at[0].set(1)
    _, _, other = program(POLICIES[name])(params, *arrays[:3], fewer)
    np.testing.assert_array_equal(fed.log_probs[1:], other.log_probs[1:])
    np.testing.assert_array_equal(fed.logits[1:], other.logits[1:])


@dataclasses.dataclass(frozen=True, kw_only=True)
class Keeps(Full):
    """One of somebody's own that keeps everything, and may remember it."""

    remembers: bool = False

    def begin(self, state, lengths):
        memory = jnp.zeros(len(lengths)) if self.remembers else ()
        return dataclasses.replace(state, memory=memory)

    def attend(self, *args, implementation=None):
        assert self.remembers, "given tokens need not come one by one"
        out, state = super().attend(*args, implementation=implementation)
        return out, dataclasses.replace(state, memory=state.memory + 1)


@pytest.mark.parametrize("remembers", [False, True])
def test_what_keeps_everything_is_fed_in_blocks_unless_it_remembers(remembers):
    options = Options(decode=Keeps(remembers=remembers))
    params, tokens, lengths, given, counts = inputs()

    def run(params, counts):
        _, cache = forward.prefill(
            *(NETWORK, params, tokens, lengths), options=options, slots=PROMPT + NEW
        )
        where = (*(NETWORK, params, given, counts, lengths),)
        logits, cache = given_tokens.feed_on(*where, cache, options=options)
        return logits, [state.memory for state in cache]

    logits, memory = jax.jit(run)(params, jnp.maximum(counts, 1))
    _, _, fed = program(POLICIES["full"])(
        *(params, tokens, lengths, given, jnp.maximum(counts, 1))
    )
    np.testing.assert_allclose(logits, fed.logits, atol=2e-4)
    assert [int(x.max()) for x in jax.tree.leaves(memory)] == [NEW] * (
        len(memory) if remembers else 0
    )
