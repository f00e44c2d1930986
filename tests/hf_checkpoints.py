"""Checkpoints as Hugging Face writes them, for the tests that read them.

The names of the tensors are listed anew here, independently of `models.hf.weights`.
"""

import dataclasses
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

from jaxkv.models.checkpoint import CheckpointError
from jaxkv.models.config import Config

CONFIG = Config(
    vocab_size=20,
    hidden_size=8,
    intermediate_size=12,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=2,
)
LLAMA = dict(
    architectures=["LlamaForCausalLM"],
    model_type="llama",
    vocab_size=20,
    hidden_size=8,
    intermediate_size=12,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
)
MODEL, INDEX = "model.safetensors", "model.safetensors.index.json"
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
Q_PROJ = "model.layers.0.self_attn.q_proj.weight"


def write_config(folder, **changes):
    """Write `config.json`; a key changed to `...` is left out."""
    raw = {k: v for k, v in (LLAMA | changes).items() if v is not ...}
    (folder / "config.json").write_text(json.dumps(raw))
    return folder


def hf_tensors(config, dtype="float32"):
    """Return random weights in Hugging Face's names and layout, `[out, in]`."""
    c, rng = config, np.random.default_rng(0)
    kv, queries = c.num_kv_heads * c.head_dim, c.num_heads * c.head_dim
    layer = {
        "input_layernorm.weight": [c.hidden_size],
        "post_attention_layernorm.weight": [c.hidden_size],
        "self_attn.q_proj.weight": [queries, c.hidden_size],
        "self_attn.k_proj.weight": [kv, c.hidden_size],
        "self_attn.v_proj.weight": [kv, c.hidden_size],
        "self_attn.o_proj.weight": [c.hidden_size, queries],
        "mlp.gate_proj.weight": [c.intermediate_size, c.hidden_size],
        "mlp.up_proj.weight": [c.intermediate_size, c.hidden_size],
        "mlp.down_proj.weight": [c.hidden_size, c.intermediate_size],
    }
    if c.qkv_bias:
        layer |= {
            "self_attn.q_proj.bias": [queries],
            "self_attn.k_proj.bias": [kv],
            "self_attn.v_proj.bias": [kv],
        }
    if c.output_bias:
        layer["self_attn.o_proj.bias"] = [c.hidden_size]
    if c.qk_norm:
        layer["self_attn.q_norm.weight"] = [c.head_dim]
        layer["self_attn.k_norm.weight"] = [c.head_dim]
    shapes = {
        EMBEDDING: [c.vocab_size, c.hidden_size],
        "model.norm.weight": [c.hidden_size],
    }
    if not c.tied:
        shapes[HEAD] = [c.vocab_size, c.hidden_size]
    for i in range(c.num_layers):
        shapes |= {f"model.layers.{i}.{name}": shape for name, shape in layer.items()}
    return {n: rng.normal(size=s).astype(jnp.dtype(dtype)) for n, s in shapes.items()}


def write_checkpoint(folder, dtype="float32", **changes):
    """Write weights as one file; return their configuration and the tensors."""
    config = dataclasses.replace(CONFIG, **changes)
    tensors = hf_tensors(config, dtype)
    save_file(tensors, folder / MODEL)
    return config, tensors


def write_shards(folder, tensors, num_shards):
    """Write tensors in turn to shards, with their index."""
    weight_map = {}
    for i in range(num_shards):
        name = f"model-{i + 1:05}-of-{num_shards:05}.safetensors"
        part = dict(list(tensors.items())[i::num_shards])
        save_file(part, folder / name)
        weight_map |= dict.fromkeys(part, name)
    write_index(folder, weight_map)
    return weight_map


def write_index(folder, weight_map):
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def assert_trees_equal(found, expected):
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    jax.tree.map(np.testing.assert_array_equal, found, expected)


def raises(*words):
    """Expect a CheckpointError whose message has all the words, in order."""
    pattern = "(?s)" + ".*".join(re.escape(str(word)) for word in words)
    return pytest.raises(CheckpointError, match=pattern)
