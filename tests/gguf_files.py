"""GGUF files, written by package gguf as llama.cpp's converter would.

The names of the tensors come from package gguf, independently of `models.gguf.weights`.
"""

import contextlib
import dataclasses

import gguf
import numpy as np
from hf_checkpoints import CONFIG, hf_tensors

from jaxkv.models.gguf.config import read_config, stop_ids
from jaxkv.models.gguf.header import read_header
from jaxkv.models.gguf.tokenizer import read_tokenizer
from jaxkv.models.gguf.weights import read_weights
from jaxkv.models.rope import LinearScaling, LongRopeScaling, YarnScaling

WORDS = ["<|end|>", "<|user|>", "a", "b", "c", "ab", "abc", "Ġ", "Ġa", "1", "2", "Ċ"]
TEMPLATE = "{% for m in messages %}<|user|>{{ m.content }}{% endfor %}<|end|>"
TOKENIZER = {
    "tokenizer.ggml.model": "gpt2",
    "tokenizer.ggml.pre": "smollm",
    "tokenizer.ggml.tokens": WORDS + [f"x{i}" for i in range(8)],
    "tokenizer.ggml.token_type": [3, 3, *[1] * 18],
    "tokenizer.ggml.merges": ["a b", "ab c", "Ġ a"],
    "tokenizer.ggml.eos_token_id": 0,
    "tokenizer.ggml.bos_token_id": 1,
    "tokenizer.chat_template": TEMPLATE,
}


def metadata(config, arch="llama"):
    """Return the keys of an architecture, as the converter writes them."""
    keys = {
        "block_count": config.num_layers,
        "context_length": config.max_positions,
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_heads,
        "attention.head_count_kv": config.num_kv_heads,
        "attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        "attention.key_length": config.head_dim,
        "attention.value_length": config.head_dim,
        "rope.freq_base": config.rope.theta,
    }
    if config.experts:
        keys |= {
            "expert_count": config.experts.count,
            "expert_used_count": config.experts.per_token,
        }
    if arch == "qwen3moe":
        keys["expert_feed_forward_length"] = config.experts.size
    if arch in ("gemma2", "gemma3"):  # the first layer's; the last has none
        first = config.layer_kinds[0]
        keys["attention.sliding_window"] = first.window
        if arch == "gemma3":
            keys["rope.freq_base_swa"] = first.rope.theta
        caps = {"attn": config.attention_cap, "final": config.logit_cap}
        found = {f"{name}_logit_softcapping": x for name, x in caps.items() if x}
        keys |= found
    keys |= rope_keys(config.rope)
    if arch == "phi3" and config.kinds:
        keys["attention.sliding_window"] = config.kinds[0].window
    if arch == "granite":
        keys |= {
            "attention.scale": config.query_scale,
            "embedding_scale": config.embedding_scale,
            "logit_scale": 1 / config.logit_scale,
            "residual_scale": config.residual_scale,
        }
    if arch in ("llama", "phi3", "smollm3"):
        keys |= {
            "vocab_size": config.vocab_size,
            "rope.dimension_count": config.rope.rotary_dim or config.head_dim,
        }
    return {f"{arch}.{key}": value for key, value in keys.items()}


def rope_keys(rope):
    """Return the keys of a scaling that no tensor holds."""
    scaling = rope.scaling
    if isinstance(scaling, LinearScaling):
        return {"rope.scaling.type": "linear", "rope.scaling.factor": scaling.factor}
    if isinstance(scaling, YarnScaling):
        usual = 1 + 0.1 * np.log(scaling.factor)  # llama.cpp multiplies with it
        return {
            "rope.scaling.type": "yarn",
            "rope.scaling.factor": scaling.factor,
            "rope.scaling.original_context_length": scaling.original_max_positions,
            "rope.scaling.attn_factor": float(scaling.attention_factor / usual),
            "rope.scaling.yarn_beta_fast": scaling.beta_fast,
            "rope.scaling.yarn_beta_slow": scaling.beta_slow,
        }
    if isinstance(scaling, LongRopeScaling):
        return {
            "rope.scaling.original_context_length": scaling.original_max_positions,
            "rope.scaling.attn_factor": scaling.attention_factor,
        }
    return {}


def gguf_tensors(tensors, config, arch="llama"):
    """Rename Hugging Face's tensors, and permute those of llama; add factors."""
    tensors = stacked_experts(tensors, config)
    kinds = {name: kind for kind, name in gguf.MODEL_ARCH_NAMES.items()}
    names = gguf.get_tensor_name_map(kinds[arch], config.num_layers)
    out, scaling = {}, config.rope.scaling
    if isinstance(scaling, LongRopeScaling):
        out["rope_factors_short.weight"] = np.float32(scaling.short_factors)
        out["rope_factors_long.weight"] = np.float32(scaling.long_factors)
    for name, tensor in tensors.items():
        if arch in ("llama", "smollm3", "granite") and (
            "q_proj" in name or "k_proj" in name
        ):
            heads = config.num_heads if "q_proj" in name else config.num_kv_heads
            split = tensor.reshape(heads, 2, -1, *tensor.shape[1:])
            tensor = split.swapaxes(1, 2).reshape(tensor.shape)
        if arch in ("gemma2", "gemma3") and "norm" in name:
            tensor = tensor + 1
        out[names.get_name(name, try_suffixes=(".weight", ".bias"))] = tensor
    return out


def stacked_experts(tensors, config):
    """Put the experts of each layer into one tensor of each kind, as files do."""
    out = {n: x for n, x in tensors.items() if ".experts." not in n}
    for i in range(config.num_layers if config.experts else 0):
        prefix = f"model.layers.{i}."
        for kind, mixtral in (
            ("gate_proj", "w1"),
            ("up_proj", "w3"),
            ("down_proj", "w2"),
        ):
            each = [
                tensors.get(f"{prefix}mlp.experts.{e}.{kind}.weight")
                if f"{prefix}mlp.gate.weight" in tensors
                else tensors[f"{prefix}block_sparse_moe.experts.{e}.{mixtral}.weight"]
                for e in range(config.experts.count)
            ]
            out[f"{prefix}mlp.experts.{kind}.weight"] = np.stack(each)
    return out


def quantised(array, kind, most=100.0):
    """Return the bytes of a matrix, random ones where gguf cannot quantise.

    Blocks are drawn until none has a number above `most`, or one that is none.
    """
    kind = gguf.GGMLQuantizationType[kind]
    with contextlib.suppress(NotImplementedError):
        return gguf.quants.quantize(array, kind)
    rng = np.random.default_rng(array.size)
    shape = gguf.quants.quant_shape_to_byte_shape(array.shape, kind)
    block_bytes = gguf.GGML_QUANT_SIZES[kind][1]
    blocks = np.zeros((np.prod(shape) // block_bytes, block_bytes), np.uint8)
    wild = np.ones(len(blocks), bool)
    while wild.any():
        blocks[wild] = rng.integers(0, 256, blocks[wild].shape, np.uint8)
        with np.errstate(all="ignore"):
            wild = ~(np.abs(gguf.quants.dequantize(blocks, kind)) <= most).all(axis=1)
    return blocks.reshape(shape)


def write(path, keys, tensors, *, arch="llama", kind="F32"):
    """Write a file; matrices are quantised, a pair of bytes and type is taken as is."""
    writer = gguf.GGUFWriter(path, arch)
    for key, value in keys.items():
        writer.add_key_value(key, value, gguf.GGUFValueType.get_type(value))
    for name, tensor in tensors.items():
        if not isinstance(tensor, tuple) and tensor.ndim == 2 and kind != "F32":
            tensor = quantised(tensor, kind), kind
        raw, of = tensor if isinstance(tensor, tuple) else (tensor, None)
        raw_dtype = None if of is None else gguf.GGMLQuantizationType[of]
        writer.add_tensor(name, raw, raw_dtype=raw_dtype)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def tiny(arch="llama", **changes):
    """Return configuration, keys and tensors of a tiny random network."""
    config = dataclasses.replace(CONFIG, **changes)
    keys = metadata(config, arch) | TOKENIZER
    return config, keys, gguf_tensors(hf_tensors(config), config, arch)


def load(path):
    """Read all that `jaxkv.load` reads, without a device's default dtype."""
    header = read_header(path)
    config = read_config(header)
    read_weights(header, config, dtype="float32")
    read_tokenizer(header)
    stop_ids(header, config.vocab_size)


def write_changed(path, change=lambda keys, tensors: None, *, arch="llama", **options):
    """Write a tiny file whose keys and tensors were changed in place."""
    switches = {"qwen2": dict(qkv_bias=True), "qwen3": dict(qk_norm=True)}.get(arch, {})
    _, keys, tensors = tiny(arch, **switches)
    change(keys, tensors)
    return write(path, keys, tensors, arch=arch, **options)
