"""Write parameters as a Hugging Face folder that transformers and `load` read."""

import dataclasses
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from safetensors.numpy import save_file

from jaxkv.models.config import Config
from jaxkv.models.rope import Rope

_SIZES = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_layers", "num_heads"),
    *("num_kv_heads", "head_dim", "rms_norm_eps", "max_positions", "tied"),
)


def write_qwen3(
    params: Any,
    config: Config,
    folder: str | os.PathLike[str],
    *,
    bos_id: int,
    stop_ids: Sequence[int],
    pad_id: int,
    extra_files: Sequence[Path] = (),
    shard_bytes: int = 15 * 2**20,
) -> None:
    """Write `config.json`, `generation_config.json` and sharded safetensors.

    Args:
      params: of a network with norms on queries and keys and without biases.
      config: of that network.
      folder: replaced as a whole once everything is written beside it.
      bos_id: id that starts a sequence.
      stop_ids: ids that end one.
      pad_id: id of padding.
      extra_files: copied into the folder, e.g. the tokenizer's.
      shard_bytes: most bytes of one weight file, a single tensor excepted.

    Raises:
      ValueError: the network is not of Qwen3's shape.
    """
    _check(config)
    folder = Path(folder)
    beside = folder.with_name(folder.name + ".partial")
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir(parents=True)
    dtype = str(params["embedding"].dtype)
    ids = {
        "bos_token_id": bos_id,
        "eos_token_id": list(stop_ids),
        "pad_token_id": pad_id,
    }
    _write_json(beside / "config.json", qwen3_config(config, dtype) | ids)
    _write_json(beside / "generation_config.json", ids | {"do_sample": False})
    _write_shards(dict(_tensors(params, config)), beside, shard_bytes)
    for file in extra_files:
        shutil.copy(file, beside / file.name)
    shutil.rmtree(folder, ignore_errors=True)
    beside.rename(folder)


def _check(config: Config) -> None:
    """Raise unless a Qwen3 of these sizes has all switches of the network."""
    written = {name: getattr(config, name) for name in _SIZES}
    rope = Rope(theta=config.rope.theta)
    qwen3 = Config(qk_norm=True, rope=rope, **written)
    others = [
        f"{field.name}={getattr(config, field.name)!r}"
        for field in dataclasses.fields(Config)
        if getattr(config, field.name) != getattr(qwen3, field.name)
    ]
    if others:
        raise ValueError(f"write_qwen3: no Qwen3 has {', '.join(others)}.")


def qwen3_config(config: Config, dtype: str) -> dict[str, Any]:
    """Return `config.json` of a network of Qwen3's shape, without its token ids."""
    return {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "dtype": dtype,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "hidden_size": config.hidden_size,
        "initializer_range": 0.02,
        "intermediate_size": config.intermediate_size,
        "max_position_embeddings": config.max_positions,
        "num_attention_heads": config.num_heads,
        "num_hidden_layers": config.num_layers,
        "num_key_value_heads": config.num_kv_heads,
        "rms_norm_eps": config.rms_norm_eps,
        "rope_parameters": {"rope_theta": config.rope.theta, "rope_type": "default"},
        "sliding_window": None,
        "tie_word_embeddings": config.tied,
        "use_cache": True,
        "use_sliding_window": False,
        "vocab_size": config.vocab_size,
    }


def _tensors(params: Any, config: Config) -> Iterator[tuple[str, np.ndarray]]:
    """Yield HF names and `[out, in]` matrices; fused projections are taken apart."""
    yield "model.embed_tokens.weight", _numpy(params["embedding"])
    yield "model.norm.weight", _numpy(params["final_norm"])
    if not config.tied:
        yield "lm_head.weight", _numpy(params["head"].T)
    queries = config.num_heads * config.head_dim
    keys = config.num_kv_heads * config.head_dim
    for index in range(config.num_layers):
        layer = params[f"layer_{index}"]
        prefix = f"model.layers.{index}"
        q, k, v = np.split(_numpy(layer["qkv"]), [queries, queries + keys], axis=1)
        gate, up = np.split(_numpy(layer["gate_up"]), 2, axis=1)
        matrices = {
            "self_attn.q_proj": q,
            "self_attn.k_proj": k,
            "self_attn.v_proj": v,
            "self_attn.o_proj": _numpy(layer["output"]),
            "mlp.gate_proj": gate,
            "mlp.up_proj": up,
            "mlp.down_proj": _numpy(layer["down"]),
        }
        for name, matrix in matrices.items():
            yield f"{prefix}.{name}.weight", np.ascontiguousarray(matrix.T)
        norms = {
            "input_layernorm": "attention_norm",
            "post_attention_layernorm": "mlp_norm",
            "self_attn.q_norm": "q_norm",
            "self_attn.k_norm": "k_norm",
        }
        for name, ours in norms.items():
            yield f"{prefix}.{name}.weight", _numpy(layer[ours])


def _write_shards(
    tensors: dict[str, np.ndarray], folder: Path, shard_bytes: int
) -> None:
    """Fill files up to `shard_bytes` in order, and write the index of who is where."""
    shards: list[dict[str, np.ndarray]] = [{}]
    free = shard_bytes
    for name, tensor in tensors.items():
        if tensor.nbytes > free and shards[-1]:
            shards.append({})
            free = shard_bytes
        shards[-1][name] = tensor
        free -= tensor.nbytes
    places: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        save_file(shard, folder / file, metadata={"format": "pt"})
        places |= dict.fromkeys(shard, file)
    total = sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": places}
    _write_json(folder / "model.safetensors.index.json", index)


def _numpy(x: jax.Array) -> np.ndarray:
    return np.ascontiguousarray(x)


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")
