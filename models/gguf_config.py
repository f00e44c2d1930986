"""The network's configuration out of the metadata of a GGUF file.

Only what the network computes exactly is let through: a key of the architecture that
would change the numbers and is not supported is an error, never ignored.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from jaxkv.models import checkpoint_values as values
from jaxkv.models.checkpoint import CheckpointError
from jaxkv.models.config import Config
from jaxkv.models.gguf_header import Header
from jaxkv.models.rope import FrequencyFactors, Rope

EMBEDDING = "token_embd.weight"
HEAD = "output.weight"
FACTORS = "rope_freqs.weight"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Family:
    """What `general.architecture` implies beyond the keys.

    Attributes:
      interleaved: whether the rows of queries and keys are stored so that the two
        halves of a rotary pair are neighbours.
      qkv_bias: whether queries, keys and values must have a bias.
      switches: of `Config`.
    """

    interleaved: bool = False
    qkv_bias: bool = False
    switches: Mapping[str, Any] = dataclasses.field(default_factory=dict)


FAMILIES = {
    "llama": Family(interleaved=True),  # Mistral, too
    "qwen2": Family(qkv_bias=True),
    "qwen3": Family(switches=dict(qk_norm=True)),
    "olmo2": Family(
        switches=dict(
            qk_norm=True, qk_norm_per_head=False, pre_norm=False, post_norm=True
        )
    ),
}

# Keys of the architecture that change what the network computes, and the values that
# leave it alone.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "attention.causal": (True,),
    "attention.clamp_kqv": (0,),
    "attention.max_alibi_bias": (0,),
    "attn_logit_softcapping": (0,),
    "embedding_scale": (0, 1),
    "expert_count": (0,),
    "expert_used_count": (0,),
    "final_logit_softcapping": (0,),
    "logit_scale": (0, 1),
    "pooling_type": (0,),
    "residual_scale": (0, 1),
    "rope.scale_linear": (0, 1),
    "rope.scaling.alpha": (0,),
    "rope.scaling.attn_factor": (1,),
    "rope.scaling.factor": (0, 1),
    "rope.scaling.type": ("none", "linear"),  # the factor has a key of its own
    "use_parallel_residual": (False,),
}
_READ = frozenset(
    "attention.head_count attention.head_count_kv attention.key_length "
    "attention.layer_norm_rms_epsilon attention.sliding_window attention.value_length "
    "block_count context_length embedding_length feed_forward_length "
    "rope.dimension_count rope.freq_base vocab_size".split()
)
# Records of how the file was made, which no number depends on.
_INERT = frozenset(
    "rope.scaling.finetuned rope.scaling.original_context_length "
    "tensor_data_layout".split()
)


def read_config(header: Header) -> Config:
    """Return the network's configuration, for an architecture of `FAMILIES`.

    Args:
      header: of the file.

    Returns:
      The network's configuration. What the keys leave open, such as biases and an
      output layer of its own, is told by the tensors.

    Raises:
      CheckpointError: if a key is missing, damaged, or has a value that the network
        does not compute; the message names key and value.
    """
    try:
        return _convert(header)
    except CheckpointError as error:
        raise header.error(str(error)) from None


def family(header: Header) -> Family:
    """Return what the file's architecture implies."""
    return FAMILIES[header.metadata["general.architecture"]]


def stop_ids(header: Header, vocab_size: int) -> tuple[int, ...]:
    """Return the token ids that end a text, a turn or a message, without repetition.

    Raises:
      CheckpointError: if one is not an id of the vocabulary.
    """
    found: dict[int, None] = {}
    for end in ("eos", "eot", "eom"):
        key = f"tokenizer.ggml.{end}_token_id"
        value = header.metadata.get(key)
        if value is None:
            continue
        if type(value) is not int or not 0 <= value < vocab_size:
            raise header.error(
                f"{key} must be a token id below {vocab_size}, found "
                f"{values.shown(value)}."
            )
        found[value] = None
    return tuple(found)


def _convert(header: Header) -> Config:
    architecture = _architecture(header.metadata)
    prefix = f"{architecture}."
    raw = {
        key.removeprefix(prefix): value
        for key, value in header.metadata.items()
        if key.startswith(prefix)
    }
    for key, value in raw.items():
        _refuse_unknown(prefix + key, key, value)
    keys = _Keys(prefix, raw)
    hidden_size, num_heads = (
        keys.integer("embedding_length"),
        keys.integer("attention.head_count"),
    )
    max_positions = keys.integer("context_length")
    window = raw.get("attention.sliding_window", 0)
    if window and keys.integer("attention.sliding_window") < max_positions:
        values.unsupported(f"{prefix}attention.sliding_window", window, 0)
    num_kv_heads = keys.integer("attention.head_count_kv", num_heads)
    if num_heads % num_kv_heads:
        raise CheckpointError(
            f"{prefix}attention.head_count={num_heads} must be a multiple of "
            f"attention.head_count_kv={num_kv_heads}."
        )
    head_dim = _head_dim(keys, hidden_size, num_heads)
    layers = keys.integer("block_count")
    if layers > values.MOST_LAYERS:
        raise CheckpointError(
            f"{prefix}block_count must be at most {values.MOST_LAYERS}, found {layers}."
        )
    return Config(
        vocab_size=keys.integer("vocab_size", _rows(header, EMBEDDING)),
        hidden_size=hidden_size,
        intermediate_size=keys.integer("feed_forward_length"),
        num_layers=layers,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        rms_norm_eps=keys.number("attention.layer_norm_rms_epsilon"),
        rope=Rope(
            theta=keys.number("rope.freq_base", 10_000.0),
            scaling=_factors(header, head_dim),
        ),
        max_positions=max_positions,
        qkv_bias=FAMILIES[architecture].qkv_bias
        or "blk.0.attn_q.bias" in header.tensors,
        output_bias="blk.0.attn_output.bias" in header.tensors,
        tied=HEAD not in header.tensors,
        **FAMILIES[architecture].switches,
    )


def _architecture(metadata: dict[str, Any]) -> str:
    """Return `general.architecture`, after a look at the keys of whole files."""
    architecture = metadata.get("general.architecture")
    if architecture not in tuple(FAMILIES):  # it may be an array
        values.unsupported("general.architecture", architecture, *FAMILIES)
    kind = metadata.get("general.type", "model")
    if kind != "model":
        values.unsupported("general.type", kind, "model")
    parts = metadata.get("split.count", 0)
    if parts not in (0, 1):
        raise CheckpointError(
            f"split.count={values.shown(parts)}: the file is one of several parts; "
            "join them with llama-gguf-split --merge."
        )
    return architecture


def _refuse_unknown(name: str, key: str, value: Any) -> None:
    """Raise for a key that is neither read nor known to leave the network alone."""
    if key in _READ or key in _INERT:
        return
    if key not in _NEUTRAL:
        raise CheckpointError(
            f"{name}={values.shown(value)} is not known to jaxkv, and may change what "
            "the network computes."
        )
    if value not in _NEUTRAL[key]:
        values.unsupported(name, value, *_NEUTRAL[key])


def _head_dim(keys: "_Keys", hidden_size: int, num_heads: int) -> int:
    if "attention.key_length" not in keys.raw and hidden_size % num_heads:
        raise CheckpointError(
            f"{keys.prefix}embedding_length={hidden_size} must be a multiple of "
            f"attention.head_count={num_heads}."
        )
    head_dim = keys.integer("attention.key_length", hidden_size // num_heads)
    for key in ("attention.value_length", "rope.dimension_count"):
        if keys.integer(key, head_dim) != head_dim:
            values.unsupported(keys.prefix + key, keys.raw[key], head_dim)
    if head_dim % 2:
        raise CheckpointError(f"{head_dim=} must be even for rotary positions.")
    return head_dim


def _rows(header: Header, name: str) -> int:
    if name not in header.tensors:
        raise CheckpointError(f"tensor {name} is missing.")
    return header.tensors[name].rows


def _factors(header: Header, head_dim: int) -> FrequencyFactors | None:
    """Return the divisors of the rotary frequencies that Llama 3.1 files bring."""
    tensor = header.tensors.get(FACTORS)
    if tensor is None:
        return None
    if (tensor.shape, tensor.type) != ((head_dim // 2,), "F32"):
        raise CheckpointError(
            f"tensor {FACTORS} must have shape {(head_dim // 2,)} and type F32, found "
            f"{tensor.shape} and {tensor.type}."
        )
    stored = np.fromfile(
        header.path, "<f4", count=head_dim // 2, offset=tensor.offset
    ).tolist()
    if not all(0 < factor < float("inf") for factor in stored):
        raise CheckpointError(
            f"tensor {FACTORS} must hold positive numbers, found "
            f"{values.shown(stored)}."
        )
    return FrequencyFactors(factors=tuple(stored))


@dataclasses.dataclass(frozen=True)
class _Keys:
    """The keys of one architecture, read with their full names in the errors."""

    prefix: str
    raw: dict[str, Any]

    def integer(self, key: str, default: int | None = None) -> int:
        return values.integer(
            {self.prefix + key: self.raw.get(key)}, self.prefix + key, default
        )

    def number(self, key: str, default: float | None = None) -> float:
        """Return the shortest decimal that float32 stores as the file's number."""
        value = values.number(
            {self.prefix + key: self.raw.get(key)}, self.prefix + key, default
        )
        return float(str(np.float32(value)))
