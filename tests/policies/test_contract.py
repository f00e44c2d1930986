"""A mistake in a policy of one's own is named: class, method, wanted and given."""

import dataclasses

import jax.numpy as jnp
import pytest
from tiny import CONFIG, language_model, params

import jaxkv
from jaxkv import KNorm, LongFlow, StreamingLLM, Tree
from jaxkv.policies.base import PlainAttention, Prompt, WholePrompt, keep_top
from jaxkv.policies.eviction import aim_at_least, attend_and_write
from jaxkv.speculation.rules import TopK
from jaxkv.state import KVState
from jaxkv.trees import Pending

PROMPTS = [[5, 6, 7, 8] * 5, [9, 10, 11]]


def generate(tmp_path, **options):
    lm = language_model(tmp_path)
    return jaxkv.generate(lm, PROMPTS, max_new_tokens=4, budget=9, **options)


class Own(WholePrompt):
    """What all of these policies of the prompt have."""

    def check(self, budget):
        pass

    def __hash__(self):
        return hash(type(self))

    def __eq__(self, other):
        return type(self) is type(other)


def compressing(compress):
    return type("Mine", (Own,), dict(compress=compress))()


def scores_of(prompt):
    return -jnp.linalg.norm(prompt.keys, axis=-1)  # [B, T, K]


def changed(**changes):
    """Return a policy that spoils fields of a good state."""

    def compress(self, prompt, state, *, budget):
        good = KNorm().compress(prompt, state, budget=budget)
        new = {name: change(getattr(good, name)) for name, change in changes.items()}
        return dataclasses.replace(good, **new)

    return compressing(compress)


def with_(**members):
    return type("Mine", (Own,), dict(scores=KNorm.scores) | members)()


COMPRESS = r"Mine\.compress: "
PREFILL = {
    "axes": (
        compressing(
            lambda s, p, state, budget: keep_top(p, scores_of(p), state, budget=budget)
        ),
        COMPRESS + r"scores must be floating-point \[B heads L\]=\[2, 2, 64\], got "
        r"float32 \[2, 64, 2\]. Its axes are in another order",
    ),
    "whole numbers": (
        compressing(
            lambda s, p, state, budget: keep_top(
                p, scores_of(p).swapaxes(1, 2).astype(jnp.int32), state, budget=budget
            )
        ),
        COMPRESS + r"scores must be floating-point .*, got int32 \[2, 2, 64\]\.",
    ),
    "scores by query head": (
        compressing(
            lambda s, p, state, budget: keep_top(
                p, jnp.repeat(scores_of(p).swapaxes(1, 2), 2, 1), state, budget=budget
            )
        ),
        COMPRESS + r"scores must be .*=\[2, 2, 64\], got float32 \[2, 4, 64\]\.",
    ),
    "nothing": (
        compressing(lambda s, p, state, budget: None),
        COMPRESS + "must return a KVState, got NoneType",
    ),
    "a tuple": (
        compressing(lambda s, p, state, budget: (state, 1)),
        COMPRESS + "must return a KVState, got a tuple of 2",
    ),
    "slots": (
        changed(keys=lambda x: x[:, :, :8]),
        COMPRESS + r"keys must be float32 \[B K S H\]=\[2, 2, \d+, 8\], got .* 8, 8\]",
    ),
    "dtype": (
        changed(values=lambda x: x.astype(jnp.bfloat16)),
        COMPRESS + "values must be float32 .*, got bfloat16",
    ),
    "positions": (
        changed(positions=lambda x: x.astype(jnp.float32)),
        COMPRESS + "positions must be int32 .*, got float32",
    ),
    "target": (changed(target=lambda x: x[0]), COMPRESS + r"target must be .* \[2\]\."),
    "no array": (changed(target=lambda x: 0), COMPRESS + "target must be an array"),
    "pseudo tokens": (
        with_(num_pseudo=3),
        r"Mine\.pseudo_tokens: the result must be int32 .*=\[2, 3\], got .*\[2, 0\]",
    ),
    "budgets of layers": (
        with_(layer_budgets=lambda s, budget, num_layers: (budget,)),
        r"Mine\.layer_budgets: must return a tuple of 2, one a layer; got 1\.",
    ),
    "keeps of layers": (
        with_(layer_keeps=lambda s, keep, lengths, num_layers: [keep] * 2),
        r"Mine\.layer_keeps: must return a tuple of 2, one a layer; got list\.",
    ),
    "a keep": (
        with_(layer_keeps=lambda s, keep, lengths, num_layers: (keep[:1],) * 2),
        r"Mine\.layer_keeps: entry 0 must be int32 \[B\]=\[2\], got int32 \[1\]",
    ),
}


@pytest.mark.parametrize(("policy", "message"), PREFILL.values(), ids=PREFILL)
def test_mistakes_of_a_prompt_s_eviction(tmp_path, policy, message):
    with pytest.raises(ValueError, match=message):
        generate(tmp_path, prefill=policy)


@dataclasses.dataclass(frozen=True)
class Mine(StreamingLLM):
    """Gives what `spoil` makes of a good result of one method."""

    method: str = ""
    spoil: object = None

    def begin(self, state, lengths):
        return self._spoilt("begin", super().begin(state, lengths))

    def attend(self, *args, **how):
        return self._spoilt("attend", super().attend(*args, **how))

    def attend_tree(self, *args, **how):
        return self._spoilt("attend_tree", super().attend_tree(*args, **how))

    def _spoilt(self, method, result):
        return self.spoil(result) if method == self.method else result


def state_with(**changes):
    def spoil(result):
        out, state = result
        new = {name: change(getattr(state, name)) for name, change in changes.items()}
        return out, dataclasses.replace(state, **new)

    return spoil


ATTEND = r"Mine\.attend: "
DECODE = {
    "nothing begun": ("begin", lambda state: None, r"begin: must return a KVState"),
    "target begun": (
        "begin",
        lambda state: dataclasses.replace(
            state, target=state.target.astype(jnp.float32)
        ),
        r"Mine\.begin: target must be int32 \[B K\]=\[2, 2\], got float32",
    ),
    "no state": (
        "attend",
        lambda r: r[0],
        ATTEND + "must return a tuple of",
    ),
    "no tuple of states": (
        "attend",
        lambda r: (r[0], r),
        ATTEND + "must return a KV",
    ),
    "output": (
        "attend",
        lambda r: (r[0].swapaxes(1, 2), r[1]),
        ATTEND + r"the output must be .* \[B N H\]=\[2, 4, 8\], got .* another order",
    ),
    "shared target": (
        "attend",
        state_with(target=lambda x: x[:, :1]),
        ATTEND + r"target must be int32 \[B K\]=\[2, 2\], got int32 \[2, 1\]",
    ),
    "memory": (
        "attend",
        state_with(memory=lambda x: jnp.zeros(3)),
        ATTEND + "memory must keep the structure that begin gave it",
    ),
    "pending": ("attend_tree", lambda r: (r[0], r), "must return a Pending, got a tup"),
    "slots of a tree": (
        "attend_tree",
        lambda r: (r[0], r[1]._replace(slots=r[1].slots[:, :, 1:])),
        r"Mine\.attend_tree: slots must be int32 \[B K D\+2\]=\[2, 2, 5\], got",
    ),
    "targets of a tree": (
        "attend_tree",
        lambda r: (r[0], Pending(*r[1][:2], r[1].slots[..., :1], r[1].slots)),
        r"Mine\.attend_tree: targets must be int32 \[B K T\]=\[2, 2, 8\], got",
    ),
}
DRAFTER = Tree(num_draft_tokens=7, depth=3, break_even=0.0)


@pytest.mark.parametrize(("method", "spoil", "message"), DECODE.values(), ids=DECODE)
def test_mistakes_of_decoding(tmp_path, method, spoil, message):
    policy = Mine(method=method, spoil=spoil)
    drafter = DRAFTER if method == "attend_tree" else None
    with pytest.raises(ValueError, match=message):
        generate(tmp_path, prefill=KNorm(), decode=policy, speculate=drafter)


class Remembering(PlainAttention):
    """Remembers in one step what it did not in the one before."""

    evicts, spare = True, 1

    def check(self, budget):
        pass

    def begin(self, state, lengths):
        return dataclasses.replace(state, memory=jnp.zeros(state.target.shape))

    def attend(self, query, key, value, state, position, *, implementation=None):
        out, state = attend_and_write(
            query, key, value, state, position, implementation=implementation
        )
        state = dataclasses.replace(state, memory=state.positions)
        importance = state.positions.swapaxes(1, 2).astype(jnp.float32)
        if self.swaps:
            return out, aim_at_least(state, importance, position, shared=True)
        return out, state

    swaps = False


class Swapping(Remembering):
    swaps = True


def test_a_policy_that_takes_no_sinks_goes_with_no_network_that_has_them(tmp_path):
    config = dataclasses.replace(CONFIG, sinks=True, attention_cap=9.0)
    message = r"attend takes no weighing=, but this network has sink and cap in its "
    with pytest.raises(ValueError, match=message):
        jaxkv.generate(
            language_model(tmp_path, config=config, weights=params(config)),
            PROMPTS,
            max_new_tokens=4,
            budget=9,
            prefill=KNorm(),
            decode=Remembering(),
        )


def test_mistakes_of_what_is_remembered(tmp_path):
    message = r"Remembering\.attend: memory must be float32 .*=\[2, 2\], got int32 "
    with pytest.raises(ValueError, match=message):
        generate(tmp_path, prefill=KNorm(), decode=Remembering())
    message = r"Swapping\.attend: importance must be .* \[B K S\]=\[2, 2, 9\]"
    with pytest.raises(ValueError, match=message):
        generate(tmp_path, prefill=KNorm(), decode=Swapping())


@dataclasses.dataclass(frozen=True, kw_only=True)
class Drafting(Tree):
    num_draft_tokens: int = 7
    depth: int = 3
    spoil: object = None

    def draft(self, context):
        return self.spoil(super().draft(context))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Passing(TopK):
    def passes(self, view):
        return view.probability


def test_mistakes_of_drafters_and_rules(tmp_path):
    def run(**options):
        generate(tmp_path, prefill=KNorm(), **options)

    with pytest.raises(ValueError, match=r"Drafting\.draft: must return a DraftTree"):
        run(speculate=Drafting(spoil=lambda tree: tree.tokens))
    message = r"Drafting.draft: valid must be bool .*=\[2, 8\], got int32 \[2, 8\]"
    with pytest.raises(ValueError, match=message):
        run(speculate=Drafting(spoil=lambda tree: tree._replace(valid=tree.depths)))
    message = r"Passing\.passes: the result must be bool \[B T\]=\[2, 8\], got float32"
    with pytest.raises(ValueError, match=message):
        run(speculate=DRAFTER, accept=Passing())


class Bare:
    """Has one of the methods only."""

    def compress(self, prompt: Prompt, state: KVState, *, budget: int) -> KVState:
        return state

    attend = draft = passes = pick = compress


def test_a_missing_method_is_named(tmp_path):
    class Mine(WholePrompt):
        def check(self, budget):
            pass

    message = r"prefill= takes something like DapQ\(\), .*; Mine has no compress; jaxkv"
    with pytest.raises(ValueError, match=message):
        generate(tmp_path, prefill=Mine())


def test_scores_alone_make_a_policy(tmp_path):
    @dataclasses.dataclass(frozen=True)
    class Mine(WholePrompt):
        def scores(self, prompt):
            return scores_of(prompt).swapaxes(1, 2)

    wanted = generate(tmp_path, prefill=KNorm()).tokens
    assert generate(tmp_path, prefill=Mine()).tokens == wanted


@pytest.mark.parametrize(
    ("role", "message"),
    [
        (
            "prefill",
            "has no num_pseudo, .*, check, .*WholePrompt has all but",
        ),
        ("decode", "has no evicts, spare, check, .*PlainAttention has begin"),
        ("sampler", r"sampler= .*; Bare has no repetition_penalty, check\.$"),
        ("speculate", r"Bare has no num_draft_tokens, depth, .* break_even, check\.$"),
        ("accept", r"accept= takes something like .*; Bare has no exact, check\.$"),
    ],
)
def test_what_is_missing_is_named(tmp_path, role, message):
    with pytest.raises(ValueError, match=message):
        generate(tmp_path, **{role: Bare()})


def test_scores_that_are_no_numbers(tmp_path):
    def compress(self, prompt, state, *, budget):
        scores = scores_of(prompt).swapaxes(1, 2)
        # Only those of the second row, and of one head.
        broken = (prompt.lengths == 3)[:, None, None] & (scores == scores[:, 1:, :1])
        scores = jnp.where(broken, jnp.nan, scores)
        return keep_top(prompt, scores, state, budget=budget)

    message = "Mine scores tokens of prompt 1 as NaN in layer 0, or not all of them"
    with pytest.raises(ValueError, match=message):
        generate(tmp_path, prefill=compressing(compress))
    with pytest.raises(ValueError, match=message):
        generate(tmp_path, prefill=compressing(compress), speculate=DRAFTER)


def test_scores_that_are_missing(tmp_path):
    """The first prompt has more tokens than there are scores, the second has not."""
    few = scoring(lambda prompt: scores_of(prompt).swapaxes(1, 2)[..., :5])
    message = "Mine scores tokens of prompt 0 .* or not all .* how many scores"
    with pytest.raises(ValueError, match=message):
        generate(tmp_path, prefill=few)
    for scores in [1.0, 2.0], jnp.float32(3):
        with pytest.raises(ValueError, match=r"Mine.compress: scores must be .* got"):
            generate(tmp_path, prefill=scoring(lambda prompt, x=scores: x))


def scoring(scores):
    return type("Mine", (Own,), dict(scores=lambda self, prompt: scores(prompt)))()


def test_a_bug_inside_keeps_its_own_error(tmp_path):
    with pytest.raises(ZeroDivisionError):
        generate(tmp_path, prefill=compressing(lambda s, p, state, budget: 1 // 0))


def test_good_ones_of_one_s_own_work(tmp_path):
    good = with_()
    wanted = generate(tmp_path, prefill=KNorm(), decode=LongFlow()).tokens
    assert generate(tmp_path, prefill=good, decode=LongFlow()).tokens == wanted
