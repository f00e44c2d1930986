"""Our policies keep, index by index, what kvpress and what authors' code keeps.

`benchmarks/kvpress_oracle.py` and `authors_oracle.py` wrote `oracle/`, with the
versions and commits of what they ran. Each prompt is cut to as many tokens as these
kept of it. Where a policy deviates on purpose, the setting that is theirs is compared.
"""

import functools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxkv import (
    TOVA,
    AdaKV,
    ChunkKV,
    CriticalKV,
    DefensiveKV,
    DropKV,
    ExpectedAttention,
    KeyDiff,
    KNorm,
    KVzip,
    LagKV,
    PyramidKV,
    SnapKV,
    StreamingLLM,
)
from jaxkv import state as kv
from jaxkv.policies.base import Prompt

FOLDER = Path(__file__).parents[1] / "oracle"
GOLDEN = json.loads((FOLDER / "kvpress.json").read_text())
AUTHORS = json.loads((FOLDER / "authors.json").read_text())
CASES = GOLDEN["cases"] + AUTHORS["cases"]
LENGTH = GOLDEN["length"]
SNAP = SnapKV.kvpress(window_size=6)


def expected(**options):
    options = dict(n_future_positions=32, epsilon=0.0) | options
    return ExpectedAttention.kvpress(**options)


def defensive(**options):
    return AdaKV(policy=DefensiveKV(**options), safeguard=0.0)


POLICIES = {
    "snapkv": SNAP,
    "snapkv, 87.5 %": SNAP,
    "pyramidkv": PyramidKV.kvpress(window_size=6, beta=4),
    "pyramidkv, capped": PyramidKV.kvpress(window_size=6),
    "pyramidkv, flat": PyramidKV.kvpress(window_size=6),
    "tova": TOVA.kvpress(),
    "knorm": KNorm(),
    "streaming-llm": StreamingLLM(),
    "expected-attention": expected(),
    "expected-attention, epsilon": expected(epsilon=1e-2),
    "expected-attention, mean only": expected(use_covariance=False),
    "keydiff": KeyDiff(),
    "lagkv": LagKV(lag_size=8),
    "lagkv, short": LagKV(lag_size=40),
    "lagkv, cross": LagKV(lag_size=8, cross_scoring=True),
    "chunkkv": ChunkKV.kvpress(policy=SNAP, chunk_length=7),
    "chunkkv of keydiff": ChunkKV.kvpress(policy=KeyDiff(), chunk_length=5),
    "adakv": AdaKV(policy=SNAP),
    "adakv of expected-attention": AdaKV(policy=expected(epsilon=1e-2)),
    # SnapKV adds up what its window pays, kvpress takes the mean.
    "criticalkv": CriticalKV(policy=SNAP, epsilon=6e-4),
    "criticalkv of expected-attention": CriticalKV(
        policy=expected(use_value_norm=False)
    ),
    "kvzip": AdaKV(policy=KVzip(repeat_ids=(0,) * GOLDEN["asked"]), safeguard=0.0),
    "criticalkv of adakv": CriticalKV(policy=AdaKV(policy=SNAP), epsilon=6e-4),
    "defensivekv": defensive(window_size=6),
    "defensivekv, 75 %": defensive(window_size=6),
    "defensivekv, kernel": defensive(window_size=4, kernel_size=3),
    "dropkv": DropKV(window_size=6),
    "dropkv, 75 %": DropKV(window_size=6, kernel_size=3),
}
NAMES = sorted({case["network"] for case in CASES})


@functools.cache
def arrays():
    with np.load(FOLDER / "kvpress.npz") as file:
        return {name: jnp.asarray(file[name]) for name in file.files}


def prompts_of(rows, keeps, *, pseudo):
    """Return one batch of several layers, as far as their prompts and `pseudo` go."""

    def of(name):
        stacked = jnp.stack([arrays()[f"{row}/{name}"] for row in rows])
        return stacked[:, : LENGTH + pseudo]

    size = arrays()[f"{rows[0]}/keys"].shape[-1]
    exponents = jnp.arange(0, size, 2, dtype=jnp.float32) / size
    return Prompt(
        queries=of("queries"),
        keys=of("keys"),
        values=of("values"),
        lengths=jnp.full(len(rows), LENGTH, jnp.int32),
        keep=jnp.asarray(keeps, jnp.int32),
        frequencies=GOLDEN["rope_theta"] ** -exponents,
        scale=size**-0.5,
        output=arrays()[f"{rows[0]}/output"],
    )


def budgets(policy, kept):
    """Return what each layer keeps, and the most that a head of it may."""
    counts = [round(np.mean([len(head) for head in layer])) for layer in kept]
    if not isinstance(policy, PyramidKV):
        return counts, [policy.layer_budgets(count, 1)[0] for count in counts]
    keep = np.array([round(np.mean(counts))], np.int32)
    keeps = policy.layer_keeps(keep, np.array([LENGTH], np.int32), len(kept))
    return [int(x[0]) for x in keeps], policy.layer_budgets(int(keep[0]), len(kept))


@functools.partial(jax.jit, static_argnums=(0, 3))
def positions_of(policy, prompt, state, bound):
    prompt = prompt._replace(implementation="reference")
    return policy.compress(prompt, state, budget=bound).positions


def kept(policy, rows, keeps, bound):
    """Return the positions that each head of each row keeps."""
    pseudo = policy.num_pseudo + LENGTH * policy.repeats
    prompt = prompts_of(rows, keeps, pseudo=pseudo)
    state = kv.init(
        batch=len(rows), kv_heads=2, slots=LENGTH, head_dim=8, dtype=jnp.float32
    )
    positions = np.asarray(positions_of(policy, prompt, state, min(bound, LENGTH)))
    return [[head[head >= 0].tolist() for head in row] for row in positions]


@pytest.mark.parametrize("press", POLICIES)
def test_the_same_tokens_are_kept(press):
    policy = POLICIES[press]
    rows, keeps, bounds, wanted = [], [], [], []
    for case in (case for case in CASES if case["press"] == press):
        of_layers, most = budgets(policy, case["kept"])
        rows += [f"{case['network']}/{layer}" for layer in range(len(case["kept"]))]
        keeps, bounds = keeps + of_layers, bounds + list(most)
        wanted += case["kept"]
    assert len(rows) == len(NAMES) * 3
    policy.check(min(keeps))
    # A projection is that of one layer.
    size = 1 if policy.reads_output else len(rows)
    for first in range(0, len(rows), size):
        some = slice(first, first + size)
        found = kept(policy, rows[some], keeps[some], max(bounds))
        for row, got, want in zip(rows[some], found, wanted[some], strict=True):
            assert got == want, row


def test_every_press_is_compared():
    assert {case["press"] for case in CASES} == set(POLICIES)
