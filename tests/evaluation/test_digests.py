"""A digest changes with everything that it stands for, and with nothing else."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from questions_by_hand import question

import jaxkv
from jaxkv import identity
from jaxkv.evaluation import digests
from jaxkv.models import orbax_copy
from jaxkv.models.rope import Rope

PARAMS = {"a": jnp.arange(6.0).reshape(2, 3), "b": (jnp.zeros(3, jnp.bfloat16),)}


def changed(place, value):
    return {"a": PARAMS["a"].at[place].set(value), "b": PARAMS["b"]}


OTHERS = {
    "a bit": lambda: changed((1, 1), np.nextafter(np.float32(4), np.float32(5))),
    "the sign of a nought": lambda: changed((0, 0), -0.0),
    "two values": lambda: {"a": PARAMS["a"][:, ::-1], "b": PARAMS["b"]},
    "a shape": lambda: {"a": PARAMS["a"].reshape(3, 2), "b": PARAMS["b"]},
    "a name": lambda: {"c": PARAMS["a"], "b": PARAMS["b"]},
    "a dtype": lambda: {"a": PARAMS["a"], "b": (jnp.zeros(3, jnp.float16),)},
    "noughts": lambda: jax.tree.map(jnp.zeros_like, PARAMS),
}


@pytest.mark.parametrize("other", OTHERS)
def test_other_weights_have_another_digest(other):
    assert digests.of_weights(OTHERS[other]()) != digests.of_weights(PARAMS)


def test_the_same_weights_have_the_same_digest_wherever_they_come_from(
    tiny, tiny_lm, tmp_path
):
    whole = digests.of_weights(tiny_lm.params)
    again = jax.tree.map(np.asarray, tiny_lm.params)
    assert digests.of_weights(again) == whole == digests.of_weights(tiny_lm.params)
    jaxkv.save(tiny_lm, tmp_path / "copy")
    _, params = orbax_copy.load_orbax(tmp_path / "copy")
    assert digests.of_weights(params) == whole


def test_what_makes_a_model_answer_otherwise_is_told_apart(tiny_lm):
    here = digests.of_model(tiny_lm)
    assert here["jaxkv"] == jaxkv.__version__ and here["stop_ids"] == [1]
    config = dataclasses.replace(tiny_lm.config, rope=Rope(theta=5.0))
    network = dataclasses.replace(tiny_lm.network, config=config)
    other = digests.of_model(dataclasses.replace(tiny_lm, network=network))
    assert {name for name in here if here[name] != other[name]} == {"network"}


class Tokenizer:
    """As the fast ones of transformers."""

    def __init__(self, state, special=(1,)):
        self.backend_tokenizer = self
        self.all_special_ids = list(special)
        self._state = state

    def to_str(self):
        return self._state


def test_tokenizers_are_told_apart(tiny_lm):
    whole = identity.of_tokenizer(tiny_lm.tokenizer)
    tiny_lm.tokenizer(["a", "b c"], padding=False)  # as a call may leave it
    assert identity.of_tokenizer(tiny_lm.tokenizer) == whole
    assert identity.of_tokenizer(None) is None
    states = ['{"model": 1}', '{"model": 1, "decoder": 2}', '{"model": 2}']
    found = {identity.of_tokenizer(Tokenizer(state)) for state in states}
    found.add(identity.of_tokenizer(Tokenizer(states[0], special=[1, 2])))
    assert len(found) == 4
    padded = Tokenizer('{"model": 1, "padding": {}, "truncation": 3}')
    assert identity.of_tokenizer(padded) == identity.of_tokenizer(Tokenizer(states[0]))

    class Slow:
        def __init__(self, vocabulary):
            self.get_vocab = lambda: vocabulary

    assert identity.of_tokenizer(Slow({"a": 1})) != identity.of_tokenizer(
        Slow({"a": 2})
    )


def test_other_questions_have_another_digest():
    ours = [question(0), question(1)]
    whole = digests.of_questions(ours)
    assert digests.of_questions([question(0), question(1)]) == whole
    gold = dataclasses.replace(ours[1].sample, outputs=("red", "green"))
    limit = dataclasses.replace(ours[1].sample, max_new_tokens=11)
    ids = ours[1].ids.copy()
    ids[5] = 60
    others = [
        [ours[0], dataclasses.replace(ours[1], sample=gold)],
        [ours[0], dataclasses.replace(ours[1], sample=limit)],
        [ours[0], dataclasses.replace(ours[1], ids=ids)],
        [ours[0], dataclasses.replace(ours[1], by_lines=True)],
        [ours[0]],
        [ours[1], ours[0]],
        [*ours, question(2)],
    ]
    assert len({whole, *map(digests.of_questions, others)}) == 8
