"""How a program uses jaxkv: type checkers read it, nobody runs it."""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

import jaxkv
from jaxkv.policies.base import Prompt, WholePrompt, keep_top

lm = jaxkv.load("needle", dtype="bfloat16")
jaxkv.save(lm, "folder")

PREFILL: list[jaxkv.PrefillPolicy] = [
    jaxkv.DapQ(),
    jaxkv.DapQ.tables(kernel_size=3),
    jaxkv.ExpectedAttention(),
    jaxkv.Full(),
    jaxkv.H2O(window_size=None),
    jaxkv.KNorm(),
    jaxkv.LAQ(),
    jaxkv.PyramidKV(),
    jaxkv.Random(seed=3),
    jaxkv.SnapKV.kvpress(),
    jaxkv.StreamingLLM(),
    jaxkv.TOVA(),
]
DECODE: list[jaxkv.DecodePolicy] = [
    jaxkv.Full(),
    jaxkv.H2ODecode(n_recent=0.5),
    jaxkv.LongFlow.recommended(),
    jaxkv.RKV(),
    jaxkv.LazyEviction(),
    jaxkv.RandomDecode(),
    jaxkv.StreamingLLM(n_sink=3),
    jaxkv.TOVADecode(),
    jaxkv.VATP(),
]
DRAFTERS: list[jaxkv.Drafter] = [jaxkv.PromptLookup(), jaxkv.Tree(), jaxkv.Aligned()]

# The ordinary calls.
jaxkv.generate(lm, "a", prefill=jaxkv.SnapKV(), budget=9)
jaxkv.generate(lm, ["a", "b"], prefill=jaxkv.Full(), decode=jaxkv.Full())
jaxkv.generate(lm, [[1, 2], [3]], seed=[1, 2], budget=[3, 4], stop_ids=[3])
jaxkv.generate(lm, ["a", [1, 2], np.arange(3)], compression_ratio=0.5)
jaxkv.generate(lm, jnp.ones((2, 3), int), speculate=jaxkv.Tree(), accept=jaxkv.TopK())
out = jaxkv.generate(lm, "a", max_new_tokens=4)
for text, tokens, reason in zip(out.text, out.tokens, out.finish_reason, strict=True):
    print(text.strip(), len(tokens), reason.upper(), tokens[0] + 1)
print(out.text[0].upper(), out.lengths[0] + 1, out.stats.tokens_per_second / 2)
if out.stats.drafts is not None:
    print(out.stats.drafts.mal_with_bonus + 1)

# Contexts, scores, comparisons.
context = jaxkv.compress(lm, ["a", "b"], budget=3, prefill=jaxkv.SnapKV(), question="c")
out = jaxkv.generate(lm, ["d", [1]], context=context, documents=[1, 0], logprobs=True)
print(len(context), context.kept_positions(1)[0][0].max(), context.take([0]).policy)
if out.context is not None and out.logprobs is not None:
    jaxkv.save_context(out.context, "folder")
    print(jaxkv.load_context("folder", lm).identity.name, out.logprobs[0][0] + 1)
print(jaxkv.score(lm, "a", ["b", [3]], budget=4, decode=jaxkv.LongFlow()).totals[0] + 1)
compared = jaxkv.evaluate(
    lm,
    {"all": jaxkv.Full(), "some": (jaxkv.KNorm(), jaxkv.LongFlow())},
    budgets=["6%", 64],
)
print(compared.report.upper(), compared.rows[0]["score"])

# Choices among methods, whose type is what they have in common.
temperature = float(len(lm.name))
sampler = jaxkv.Categorical(temperature=temperature) if temperature else jaxkv.Greedy()
jaxkv.generate(lm, "a", sampler=sampler)
for sampling in [jaxkv.Greedy(), jaxkv.Categorical()]:
    jaxkv.generate(lm, "a", sampler=sampling)
prompts = {"a": jaxkv.SnapKV(), "b": jaxkv.StreamingLLM(), "c": jaxkv.Full()}
for prefill in prompts.values():
    jaxkv.generate(lm, "a", prefill=prefill, budget=4)
answers = {"a": jaxkv.LongFlow(), "b": jaxkv.H2ODecode(), "c": jaxkv.Full()}
for decode in answers.values():
    jaxkv.generate(lm, "a", decode=decode, budget=4)
for drafter in [jaxkv.PromptLookup(), jaxkv.Tree(), jaxkv.Aligned()]:
    jaxkv.generate(lm, "a", speculate=drafter)
for rule in [jaxkv.Exact(), jaxkv.Conditional(), jaxkv.Typical(), jaxkv.TopK()]:
    jaxkv.generate(lm, "a", speculate=jaxkv.Tree(), accept=rule)


def show(new: list[list[int]]) -> None:
    """Print the new tokens."""
    print(new)


jaxkv.generate(lm, "a", on_tokens=show)
try:
    jaxkv.load("elsewhere")
except (jaxkv.CheckpointError, jaxkv.LogitsError) as error:
    print(error)


# The pure functions.
def step(options: jaxkv.Options, ids: Sequence[int]) -> jax.Array:
    """Return logits after a prompt and its likeliest token."""
    tokens = jnp.asarray([ids], jnp.int32)
    lengths = jnp.asarray([len(ids)], jnp.int32)
    logits, cache = jaxkv.prefill(
        lm.network, lm.params, tokens, lengths, options=options, slots=9
    )
    print(cache[0].keys.shape, logits.argmax(-1))
    logits, cache = jaxkv.decode_step(
        lm.network, lm.params, logits.argmax(-1), lengths, cache, options=options
    )
    result = jaxkv.generate_tokens(
        lm.network,
        lm.params,
        tokens,
        lengths,
        jax.random.split(jax.random.key(0), 1),
        jnp.asarray([-1]),
        jnp.int32(4),
        options=options,
        slots=9,
        max_out=4,
    )
    print(result.tokens[0].tolist(), result.finite.all())
    return logits


step(jaxkv.Options(budget=9, prefill=jaxkv.SnapKV(), decode=jaxkv.LongFlow()), [1, 2])


# A policy of one's own.
@dataclasses.dataclass(frozen=True, kw_only=True)
class Newest(WholePrompt):
    """Keep the newest tokens."""

    step: int = 1

    def check(self, budget: int) -> None:
        """Accept any budget."""

    def compress(
        self, prompt: Prompt, state: jaxkv.KVState, *, budget: int
    ) -> jaxkv.KVState:
        """Keep the last tokens."""
        batch, length, heads, _ = prompt.keys.shape
        scores = jnp.arange(length, dtype=jnp.float32) // self.step
        scores = jnp.broadcast_to(scores, (batch, heads, length))
        return keep_top(prompt, scores, state, budget=budget)


jaxkv.generate(lm, "a", budget=4, prefill=Newest())
