"""The feed-forward of experts: a loop in float32, and the fast ways to the same."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxkv.kernels import experts
from jaxkv.kernels.experts import Gate, Weights
from jaxkv.kernels.experts_triton import MOST_TOKENS

CLAMPED = Gate(alpha=1.702, limit=0.6, shift=1.0)  # so low that it acts
# batch, tokens, experts, experts of a token, biases, activation
CASES = {
    "one token": (1, 1, 8, 2, False, Gate()),
    "few tokens": (3, 2, 4, 2, True, CLAMPED),
    "a prompt": (2, 70, 5, 3, True, CLAMPED),
    "all experts": (1, 7, 3, 3, False, Gate()),
    "blocks that overflow": (1, 40, 16, 1, False, Gate()),
}
HIDDEN, INNER = 16, 24
PLAIN = [name for name in experts._RUNS if name != "triton"]  # see its own tests


def inputs(case, dtype="float32", seed=0):
    """Return tokens, choices, shares and weights; one expert is liked by many."""
    batch, length, count, per_token, biased, gate = CASES[case]
    rng = np.random.default_rng(seed)

    def draw(*shape, scale=0.3):
        return jnp.asarray(scale * rng.normal(size=shape), dtype)

    shapes = [(HIDDEN, 2 * INNER), (INNER, HIDDEN), (2 * INNER,), (HIDDEN,)]
    leaves = [draw(count, *shape) for shape in shapes]
    weights = Weights(*leaves) if biased else Weights(*leaves[:2])
    logits = draw(batch, length, count, scale=2.0).astype(jnp.float32)
    logits = logits.at[:, : length // 2, 0].add(9.0)
    chosen, shares = experts.route(logits, per_token=per_token, normalize=True)
    return (draw(batch, length, HIDDEN, scale=1.0), chosen, shares, weights), gate


def reference(x, chosen, shares, weights, *, gate):
    flat = (leaf.reshape(-1, leaf.shape[-1]) for leaf in (x, chosen, shares))
    return experts._reference(*flat, weights, gate=gate).reshape(x.shape)


@pytest.mark.parametrize(
    ("case", "dtype"),
    [*((case, "float32") for case in CASES), ("a prompt", "bfloat16")],
)
def test_every_way_is_the_reference(case, dtype):
    arguments, gate = inputs(case, dtype)
    wanted = np.asarray(reference(*arguments, gate=gate))
    assert np.std(wanted) > 0.1
    for implementation in PLAIN:
        found = run(implementation, gate)(*arguments)
        assert found.dtype == dtype
        error = np.abs(np.asarray(found, np.float32) - wanted).max()
        assert error < {"float32": 2e-6, "bfloat16": 2**-6}[dtype], implementation


def run(implementation, gate):
    return jax.jit(
        functools.partial(
            experts.feed_forward, gate=gate, implementation=implementation
        )
    )


@pytest.mark.parametrize("implementation", PLAIN)
def test_a_token_is_alone_what_it_is_among_others(implementation):
    """There is no capacity: however many like the same expert, none is turned away."""
    (x, chosen, shares, weights), gate = inputs("a prompt")
    compute = run(implementation, gate)
    together = compute(x, chosen, shares, weights)
    for row, token in [(0, 0), (1, 69)]:
        at = slice(row, row + 1), slice(token, token + 1)
        alone = compute(x[at], chosen[at], shares[at], weights)
        np.testing.assert_allclose(alone, together[at], rtol=0, atol=1e-6)
    # Not even if the others are infinite.
    other = x.at[1].set(jnp.inf)
    np.testing.assert_array_equal(
        compute(other, chosen, shares, weights)[0], together[0]
    )


def test_the_reference_is_what_transformers_computes():
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    sizes = dict(hidden_size=HIDDEN, num_local_experts=5, num_experts_per_tok=3)
    model = "a prompt"
    (x, _, _, weights), _ = inputs(model)

    def tensor(array):
        return torch.from_numpy(np.array(array))

    def interleaved(array):
        gate, up = jnp.split(array, 2, axis=-1)
        return tensor(jnp.stack([gate, up], axis=-1).reshape(array.shape))

    router = tensor(jnp.asarray(np.random.default_rng(1).normal(size=(5, HIDDEN))))
    router = router.float()
    config = transformers.GptOssConfig(
        **sizes, intermediate_size=INNER, swiglu_limit=CLAMPED.limit
    )
    gpt_oss = transformers.models.gpt_oss.modeling_gpt_oss.GptOssMLP(config)
    gpt_oss.load_state_dict(
        {
            "router.weight": router,
            "router.bias": torch.arange(5.0),
            "experts.gate_up_proj": interleaved(weights.gate_up),
            "experts.gate_up_proj_bias": interleaved(weights.gate_up_bias),
            "experts.down_proj": tensor(weights.down),
            "experts.down_proj_bias": tensor(weights.down_bias),
        }
    )
    logits = x @ np.asarray(router).T
    biased = logits + np.arange(5.0, dtype="f4")[None, None]
    found = _routed(x, biased, weights, True, CLAMPED)
    with torch.no_grad():
        np.testing.assert_allclose(found, gpt_oss(tensor(x))[0], atol=1e-5)

    config = transformers.OlmoeConfig(
        hidden_size=HIDDEN,
        num_experts=5,
        num_experts_per_tok=3,
        intermediate_size=INNER,
    )
    for normalize in (False, True):
        config.norm_topk_prob = normalize
        olmoe = transformers.models.olmoe.modeling_olmoe.OlmoeSparseMoeBlock(config)
        olmoe.load_state_dict(
            {
                "gate.weight": router,
                "experts.gate_up_proj": tensor(weights.gate_up.swapaxes(1, 2)),
                "experts.down_proj": tensor(weights.down.swapaxes(1, 2)),
            }
        )
        plain = Weights(*weights[:2])
        found = _routed(x, logits, plain, normalize, Gate())
        with torch.no_grad():
            np.testing.assert_allclose(found, olmoe(tensor(x)), atol=1e-5)


def _routed(x, logits, weights, normalize, gate):
    chosen, shares = experts.route(
        jnp.asarray(logits), per_token=3, normalize=normalize
    )
    return reference(x, chosen, shares, weights, gate=gate)


def test_shares_by_hand():
    logits = jnp.log(jnp.asarray([[[0.1, 0.4, 0.2, 0.3]]]))
    chosen, shares = experts.route(logits, per_token=2, normalize=False)
    assert chosen.tolist() == [[[1, 3]]]
    np.testing.assert_allclose(shares, [[[0.4, 0.3]]], rtol=1e-6)
    _, shares = experts.route(logits, per_token=2, normalize=True)
    np.testing.assert_allclose(shares, [[[4 / 7, 3 / 7]]], rtol=1e-6)
    chosen, _ = experts.route(jnp.zeros((1, 1, 4)), per_token=2, normalize=True)
    assert chosen.tolist() == [[[0, 1]]]


@pytest.mark.parametrize(
    ("backend", "tokens", "best"),
    [
        *(("cpu", tokens, "sorted") for tokens in (1, 64, 65)),
        *(("gpu", *case) for case in [(15, "gather"), (16, "dense"), (64, "dense")]),
        *(("gpu", *case) for case in [(1024, "dense"), (1025, "blocks")]),
        ("tpu", 1, "gather"),
        ("tpu", 65, "ragged"),
    ],
)
def test_what_is_best(backend, tokens, best, monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    assert experts.choose(tokens, 8, 128) == best
    kernel = backend == "gpu" and tokens <= MOST_TOKENS
    assert experts.choose(tokens, 8, 128, triton=kernel) == (
        "triton" if kernel else best
    )


def test_refusals():
    arguments, gate = inputs("few tokens")
    with pytest.raises(ValueError, match="unknown implementation='magic'; choose"):
        experts.feed_forward(*arguments, gate=gate, implementation="magic")
    weights = arguments[3]._replace(down=arguments[3].down[:, 1:])
    with pytest.raises(ValueError, match="gate beside up of 23 columns, but has 48"):
        experts.feed_forward(*arguments[:3], weights, gate=gate)


def test_a_gate_by_hand():
    found = dataclasses.replace(CLAMPED, alpha=0.0)(jnp.asarray([0.5, 2.0, -2.0, 0.1]))
    np.testing.assert_allclose(found, [0.25 * 0.4, 0.3 * 1.1], rtol=1e-6)
