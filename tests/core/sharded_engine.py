"""Run by test_sharding.py, where JAX finds four devices: an engine over meshes.

Prints "equal" where no mesh changes a token of any request. Takes one argument, fast or
slow.
"""

import dataclasses
import functools
import sys

import jax
import numpy as np
import tiny

import jaxkv
from jaxkv import Categorical, DapQ, Greedy, LongFlow, PromptLookup, SnapKV, sharding
from jaxkv.serving import engine as serving
from jaxkv.serving.board import Board

CONFIG = dataclasses.replace(
    tiny.CONFIG, vocab_size=64, num_heads=4, num_kv_heads=2, tied=False
)
SIZES = dict(rows=4, max_prompt=64, max_new_tokens=12, block=4, together=2)
METHODS = {
    "longflow": dict(budget=10, prefill=SnapKV(window_size=2), decode=LongFlow()),
    "dapq": dict(budget=10, prefill=DapQ(window_size=4)),
    "drafts": dict(speculate=PromptLookup(num_draft_tokens=3, break_even=0.0)),
}
FAST = [("longflow", (2, 2))]


def served(lm, **options):
    """Return the tokens of seven requests, more than there are rows."""
    engine = jaxkv.Engine(lm, **SIZES, **options)
    samplers = Greedy(), Categorical(temperature=0.8, top_k=9)
    rng = np.random.default_rng(0)
    handles = [
        engine.submit(
            rng.integers(0, 64, rng.integers(1, 60)).tolist(),
            sampler=samplers[number % 2],
            max_new_tokens=3 + number,
            seed=number,
        )
        for number in range(7)
    ]
    list(engine.run())
    assert {handle.result.finish_reason for handle in handles} == {"length"}
    return [handle.tokens for handle in handles]


if __name__ == "__main__":
    assert jax.device_count() == 4
    alone = tiny.language_model(config=CONFIG, weights=tiny.parameters(CONFIG))
    meshes = [(2, 2), (1, 4), (4, 1)]
    cases = [(name, mesh) for name in METHODS for mesh in meshes]
    for name, (data, model) in FAST if sys.argv[1] == "fast" else cases:
        mesh = sharding.make_mesh(data=data, model=model)
        network, params = sharding.spread(alone.network, alone.params, mesh)
        spread = dataclasses.replace(alone, network=network, params=params)
        want = served(alone, **METHODS[name])
        for on_gpu in (False, True):
            serving.Board = functools.partial(Board, on_gpu=on_gpu)
            assert served(spread, **METHODS[name]) == want, (name, data, model, on_gpu)
    print("equal")
