"""Network and reader against transformers and torch, on tiny random checkpoints.

Each case is written by `save_pretrained`, and both sides load that very folder; our
side reads the same weights from a GGUF file, too.
"""

import dataclasses
import json

import gguf_files
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from parity_cases import CASES, HUB_ONLY, SIZES
from plain_forward import forward
from safetensors.numpy import load_file
from windowed_cases import CASES as WINDOWED

import jaxkv
from jaxkv.models.decoder import parameter_shapes
from jaxkv.models.gguf import config as gguf_config
from jaxkv.models.gguf import weights as gguf_weights
from jaxkv.models.gguf.header import read_header
from jaxkv.models.hf.config import read_config
from jaxkv.models.hf.generation import stop_ids
from jaxkv.models.hf.weights import read_weights
from jaxkv.models.rope import Llama3Scaling

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

LENGTH = 80  # longer than the first training stage of the cases' scalings
NEW_TOKENS = 64


def make(folder, case, dtype="float32", **save_options):
    """Write a checkpoint whose every weight matters: no zero bias, no norm of ones."""
    family, options = CASES[case]
    config = getattr(transformers, f"{family}Config")(**SIZES | options)
    causal = f"{family.removesuffix('Text')}ForCausalLM"
    model = getattr(transformers, causal)(config)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight.normal_(0.0, 0.2)
            if "norm" in name and not family.startswith("Gemma"):  # has 1 + weight
                weight.add_(1.0)
    model.to(getattr(torch, dtype)).save_pretrained(folder, **save_options)
    return folder


def load_torch(folder):
    return transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    ).eval()


def random_tokens(shape):
    return np.random.default_rng(0).integers(3, SIZES["vocab_size"], shape)


def shapes_of(tree):
    return jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), tree)


def read(folder, layout="hub"):
    """Return configuration and float32 parameters, by way of a GGUF file or not."""
    if layout == "hub":
        config = read_config(folder)
        return config, read_weights(folder, config, dtype="float32")
    header = read_header(to_gguf(folder))
    config = gguf_config.read_config(header)
    return config, gguf_weights.read_weights(header, config, dtype="float32")


def to_gguf(folder):
    """Write the weights of a folder as a GGUF file, with torch's rotary factors."""
    model = load_torch(folder)
    config = read_config(folder)
    kind = model.config.model_type
    arch = {
        **dict(mistral="llama", mixtral="llama", qwen3_moe="qwen3moe"),
        "gemma3_text": "gemma3",
    }.get(kind, kind)
    tensors = load_file(folder / "model.safetensors")
    tensors = gguf_files.gguf_tensors(tensors, config, arch)
    if isinstance(config.rope.scaling, Llama3Scaling):
        steps = np.arange(0, config.head_dim, 2) / config.head_dim
        scaled = model.model.rotary_emb.inv_freq.numpy()
        factors = config.rope.theta**-steps / scaled
        tensors["rope_freqs.weight"] = factors.astype(np.float32)
    keys = gguf_files.metadata(config, arch)
    return gguf_files.write(folder / "model.gguf", keys, tensors, arch=arch)


def assert_same_logits(folder, layout="hub", **changes):
    tokens = random_tokens((2, LENGTH))
    with torch.no_grad():
        expected = load_torch(folder)(torch.from_numpy(tokens)).logits.numpy()
    config, params = read(folder, layout)
    config = dataclasses.replace(config, **changes)
    assert shapes_of(params) == shapes_of(parameter_shapes(config))
    found = jax.jit(forward, static_argnums=0)(config, params, tokens)
    assert found.dtype == jnp.float32
    assert np.std(expected) > 1  # else a small difference would prove nothing
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("case", "layout"),
    [(case, "hub") for case in CASES]
    + [(case, "gguf") for case in CASES if case not in HUB_ONLY],
)
def test_logits(tmp_path, case, layout):
    assert_same_logits(make(tmp_path, case), layout)


@pytest.mark.parametrize(
    "kind", ["F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q4_K", "Q6_K"]
)
def test_logits_of_gguf_types(tmp_path, kind):
    """Here transformers reads the GGUF file, too."""
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    sizes = dict(hidden_size=256, intermediate_size=512, head_dim=64, vocab_size=160)
    _, keys, tensors = gguf_files.tiny(**sizes)
    matrices = {name: 0.1 * x for name, x in tensors.items() if x.ndim == 2}
    if kind != "F32":
        matrices = {
            name: (gguf_files.quantised(matrix, kind, most=0.3), kind)
            for name, matrix in matrices.items()
        }
    path = tmp_path / "model.gguf"
    gguf_files.write(path, keys | {"general.name": "tiny"}, tensors | matrices)
    model = transformers.AutoModelForCausalLM.from_config(
        transformers.AutoConfig.from_pretrained(tmp_path, gguf_file=path.name),
        dtype=torch.float32,
    ).eval()
    weights = load_gguf_checkpoint(path, return_tensors=True, model_to_load=model)
    model.load_state_dict(weights["tensors"])
    tokens = random_tokens((2, LENGTH))
    with torch.no_grad():
        expected = model(torch.from_numpy(tokens)).logits.numpy()
    header = read_header(path)
    config = gguf_config.read_config(header)
    params = gguf_weights.read_weights(header, config, dtype="float32")
    found = jax.jit(forward, static_argnums=0)(config, params, tokens)
    assert np.std(expected) > 1
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("case", ["llama-rope-head_dim", "qwen2"])
@pytest.mark.parametrize("type_key", ["type", "rope_type"])
def test_logits_of_transformers_4_spelling(tmp_path, case, type_key):
    """The hub's older checkpoints have `rope_theta` and `rope_scaling`."""
    path = make(tmp_path, case) / "config.json"
    raw = json.loads(path.read_text())
    rope = raw.pop("rope_parameters")
    raw["rope_theta"] = rope.pop("rope_theta")
    kind = rope.pop("rope_type")
    raw["rope_scaling"] = None if kind == "default" else {type_key: kind, **rope}
    raw["torch_dtype"] = raw.pop("dtype")
    path.write_text(json.dumps(raw))
    assert_same_logits(tmp_path)


@pytest.mark.parametrize("case", ["qwen3-moe"])
def test_logits_of_fused_experts(tmp_path, case):
    """transformers 5 holds the experts of a layer as one tensor of each kind."""
    make(tmp_path, case, save_original_format=False)
    names = load_file(tmp_path / "model.safetensors")
    assert "model.layers.1.mlp.experts.gate_up_proj" in names
    assert_same_logits(tmp_path)


def test_logits_of_short_sequences_by_longrope(tmp_path):
    """A network for sequences that are no longer than those of its first training."""
    path = make(tmp_path, "phi3-longrope") / "config.json"
    raw = json.loads(path.read_text())
    raw["original_max_position_embeddings"] = LENGTH
    raw["rope_parameters"]["original_max_position_embeddings"] = LENGTH
    path.write_text(json.dumps(raw))
    assert_same_logits(tmp_path, max_positions=LENGTH)
    with pytest.raises(AssertionError, match="Mismatched elements"):
        assert_same_logits(tmp_path)


def test_logits_of_shards(tmp_path):
    make(tmp_path, "qwen3", max_shard_size="60KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    assert_same_logits(tmp_path)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_weights_are_bit_equal(tmp_path, dtype):
    make(tmp_path, "llama-gqa", dtype)
    params = read_weights(tmp_path, read_config(tmp_path), dtype=None)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype="auto")
    for found, expected in [
        (params["embedding"], model.model.embed_tokens.weight),
        (params["head"].T, model.lm_head.weight),
        (params["layer_1"]["down"].T, model.model.layers[1].mlp.down_proj.weight),
    ]:
        assert found.dtype == dtype
        np.testing.assert_array_equal(
            np.asarray(found).view(np.int16),
            expected.detach().view(torch.int16).numpy(),
        )


@pytest.mark.parametrize("ids", [7, [5, 9, 11]])
def test_stop_ids(tmp_path, ids):
    config = transformers.LlamaConfig(**SIZES | dict(eos_token_id=ids))
    model = transformers.LlamaForCausalLM(config)
    model.save_pretrained(tmp_path)
    wanted = load_torch(tmp_path).generation_config.eos_token_id
    assert stop_ids(tmp_path) == tuple(wanted if isinstance(ids, list) else [wanted])


@pytest.mark.parametrize(
    "case", ["llama-rope-head_dim", "mistral", "qwen2-mha-tied", "qwen3"]
)
def test_greedy_tokens(tmp_path, case):
    make(tmp_path, case)
    prompt = random_tokens((2, 12))
    model = load_torch(tmp_path)
    with torch.no_grad():
        expected = model.generate(
            torch.from_numpy(prompt),
            attention_mask=torch.ones_like(torch.from_numpy(prompt)),
            do_sample=False,
            max_new_tokens=NEW_TOKENS,
            eos_token_id=None,
            pad_token_id=0,
        ).numpy()
    config = read_config(tmp_path)
    params = read_weights(tmp_path, config, dtype="float32")
    found = np.asarray(jax.jit(greedy, static_argnums=0)(config, params, prompt))
    assert len(np.unique(found[:, 12:])) > 8  # not stuck on a few tokens
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize(
    "case",
    [
        *("olmo2", "mistral-window", "qwen2-window", "qwen3-yarn"),
        *("qwen3-moe", "phi3-longrope", "smollm3", "glm4"),
        *(pytest.param(case, marks=pytest.mark.slow) for case in ("mixtral", "olmoe")),
        "granite",
        *(case for case in WINDOWED if not case.endswith("gguf")),
    ],
)
def test_decoding_of_a_ragged_batch(tmp_path, case):
    """Prefill and decode steps give torch's tokens, each as likely as torch has it."""
    make(tmp_path, case)
    config, params = read(tmp_path)
    lm = tiny.language_model(config=config, weights=params)
    prompts = [random_tokens(length).tolist() for length in (12, 5, 20)]
    out = jaxkv.generate(lm, prompts, max_new_tokens=NEW_TOKENS, logprobs=True)
    model = load_torch(tmp_path)
    for prompt, tokens, found in zip(prompts, out.tokens, out.logprobs, strict=True):
        whole = torch.tensor([[*prompt, *tokens[:-1]]])
        with torch.no_grad():
            logits = model(whole).logits[0, len(prompt) - 1 :]
        expected, best = torch.log_softmax(logits, -1).max(-1)
        assert len(set(tokens)) > 8  # not stuck on a few tokens
        np.testing.assert_array_equal(tokens, best.numpy())
        np.testing.assert_allclose(found, expected.numpy(), rtol=0, atol=1e-4)


def greedy(config, params, prompt):
    """Append greedy tokens, recomputing the whole padded sequence at each step."""
    start = prompt.shape[1]
    padded = jnp.pad(prompt, ((0, 0), (0, NEW_TOKENS)))

    def step(i, tokens):
        logits = forward(config, params, tokens)[:, i - 1]
        return tokens.at[:, i].set(jnp.argmax(logits, axis=-1).astype(tokens.dtype))

    return jax.lax.fori_loop(start, start + NEW_TOKENS, step, padded)
