"""The network's configuration out of the metadata of a GGUF file.

Only what the network computes exactly is let through: a key of the architecture that
would change the numbers and is not supported is an error, never ignored.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from jaxkv.models import checkpoint_values as values
from jaxkv.models.checkpoint import CheckpointError
from jaxkv.models.config import Config, Experts, LayerKind
from jaxkv.models.gguf import gemma as gguf_gemma
from jaxkv.models.gguf import rope as gguf_rope
from jaxkv.models.gguf.header import Header
from jaxkv.models.gguf.keys import Keys
from jaxkv.models.hf import gemma as hf_gemma
from jaxkv.models.rope import Rope, reach

EMBEDDING = "token_embd.weight"
HEAD = "output.weight"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Family:
    """What `general.architecture` implies beyond the keys.

    Attributes:
      name: as its makers write it; None of an architecture that several have.
      interleaved: whether the rows of queries and keys are stored so that the two
        halves of a rotary pair are neighbours.
      qkv_bias: whether queries, keys and values must have a bias.
      fused: whether queries, keys and values are one tensor, and gate and up.
      no_rope_interval: every so many layers one has no rotation; 0 is never.
      windows: whether all layers have the window that a key says, if it acts.
      partial_rotary: whether a part of each head may be rotated.
      switches: of `Config`.
      scales: whether keys scale embeddings, queries, the residual stream and logits.
      gemma: what it is of a Gemma; None is no Gemma.
      experts: the key that says how many columns an expert has, in architectures that
        may have experts.
      normalize: whether the shares of a token's experts add up to one.
    """

    name: str | None = None
    interleaved: bool = False
    qkv_bias: bool = False
    fused: bool = False
    no_rope_interval: int = 0
    windows: bool = False
    partial_rotary: bool = False
    switches: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    scales: bool = False
    gemma: gguf_gemma.Gemma | None = None
    experts: str | None = None
    normalize: bool = True


FAMILIES = {
    # Mistral and Mixtral, too
    "llama": Family(interleaved=True, experts="feed_forward_length"),
    "qwen2": Family(name="Qwen2", qkv_bias=True),
    "qwen3": Family(name="Qwen3", switches=dict(qk_norm=True)),
    "qwen3moe": Family(
        name="Qwen3-MoE",
        switches=dict(qk_norm=True),
        experts="expert_feed_forward_length",
    ),
    "olmoe": Family(
        name="OLMoE",
        switches=dict(qk_norm=True, qk_norm_per_head=False),
        experts="feed_forward_length",
        normalize=False,
    ),
    "phi3": Family(name="Phi-3", fused=True, windows=True, partial_rotary=True),
    "smollm3": Family(name="SmolLM3", interleaved=True, no_rope_interval=4),
    "granite": Family(name="Granite", interleaved=True, scales=True),
    "olmo2": Family(
        name="OLMo 2",
        switches=dict(
            qk_norm=True, qk_norm_per_head=False, pre_norm=False, post_norm=True
        ),
    ),
    "gemma2": Family(
        name="Gemma 2", switches=hf_gemma.SWITCHES, gemma=gguf_gemma.GEMMA2
    ),
    "gemma3": Family(
        name="Gemma 3",
        switches=dict(hf_gemma.SWITCHES, qk_norm=True),
        gemma=gguf_gemma.GEMMA3,
    ),
}

# The scales of Granite, and their names in `Config`.
_SCALES = {
    "attention.scale": "query_scale",
    "embedding_scale": "embedding_scale",
    "logit_scale": "logit_scale",
    "residual_scale": "residual_scale",
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
    "rope.scaling.alpha": (0,),
    "use_parallel_residual": (False,),
}
_READ = gguf_rope.KEYS | frozenset(
    "attention.head_count attention.head_count_kv attention.key_length "
    "attention.layer_norm_rms_epsilon attention.sliding_window attention.value_length "
    "block_count context_length embedding_length feed_forward_length vocab_size".split()
)
# Records of how the file was made, which no number depends on.
_INERT = frozenset(("rope.scaling.finetuned", "tensor_data_layout"))


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
    keys = Keys(prefix, raw)
    kind = FAMILIES[architecture]
    experts = _experts(keys, kind)
    known = {"expert_count", "expert_used_count", kind.experts} if experts else set()
    scales = _scales(keys) if kind.scales else {}
    known |= {key for key in _SCALES if scales}
    known |= gguf_gemma.KEYS if kind.gemma else set()
    for key, value in raw.items():
        if key not in known:
            _refuse_unknown(prefix + key, key, value)
    hidden_size, num_heads = (
        keys.integer("embedding_length"),
        keys.integer("attention.head_count"),
    )
    max_positions = keys.integer("context_length")
    head_dim = _head_dim(keys, hidden_size, num_heads)
    layers = keys.integer("block_count")
    if layers > values.MOST_LAYERS:
        raise CheckpointError(
            f"{prefix}block_count must be at most {values.MOST_LAYERS}, found {layers}."
        )
    rope = gguf_rope.read_rope(
        *(header, keys),
        head_dim=head_dim,
        max_positions=max_positions,
        partial=FAMILIES[architecture].partial_rotary,
    )
    max_positions = reach(rope, max_positions)
    switches = kind.switches
    if kind.gemma:
        sizes = (hidden_size, num_heads, head_dim, layers)
        switches = {**switches, **gguf_gemma.switches(kind.gemma, keys, *sizes)}
    return Config(
        vocab_size=keys.integer("vocab_size", _rows(header, EMBEDDING)),
        hidden_size=hidden_size,
        intermediate_size=keys.integer("feed_forward_length"),
        num_layers=layers,
        num_heads=num_heads,
        num_kv_heads=_kv_heads(keys, num_heads),
        head_dim=head_dim,
        rms_norm_eps=keys.number("attention.layer_norm_rms_epsilon"),
        rope=rope,
        kinds=_kinds(keys, architecture, rope, max_positions, layers),
        max_positions=max_positions,
        qkv_bias=FAMILIES[architecture].qkv_bias
        or "blk.0.attn_q.bias" in header.tensors,
        output_bias="blk.0.attn_output.bias" in header.tensors,
        tied=HEAD not in header.tensors,
        experts=experts,
        **switches,
        **scales,
    )


def _kv_heads(keys: Keys, num_heads: int) -> int:
    num_kv_heads = keys.integer("attention.head_count_kv", num_heads)
    if num_heads % num_kv_heads:
        raise CheckpointError(
            f"{keys.prefix}attention.head_count={num_heads} must be a multiple of "
            f"attention.head_count_kv={num_kv_heads}."
        )
    return num_kv_heads


def _scales(keys: Keys) -> dict[str, Any]:
    """Return the scales of a Granite; logits are divided by theirs."""
    found = {field: keys.number(key) for key, field in _SCALES.items()}
    return found | {"logit_scale": 1 / found["logit_scale"]}


def _experts(keys: Keys, family: Family) -> Experts | None:
    """Return the experts of a file that has any; all its layers have them."""
    if family.experts is None or keys.raw.get("expert_count", 0) == 0:
        return None
    count, used = keys.integer("expert_count"), keys.integer("expert_used_count")
    if used > count:
        values.unsupported(f"{keys.prefix}expert_used_count", used, f"up to {count}")
    return Experts(
        count=count,
        per_token=used,
        size=keys.integer(family.experts),
        normalize=family.normalize,
    )


def _kinds(
    keys: Keys, architecture: str, rope: Rope, max_positions: int, layers: int
) -> tuple[LayerKind, ...]:
    """Return what each layer's attention does, nothing where all do the same."""
    family = FAMILIES[architecture]
    if family.gemma:
        sizes = dict(max_positions=max_positions, layers=layers)
        return gguf_gemma.kinds(family.gemma, keys, rope, **sizes)
    if keys.raw.get("attention.sliding_window", 0):
        window = keys.integer("attention.sliding_window")
        if window < max_positions and family.windows:
            return (LayerKind(rope=rope, window=window),) * layers
        if window < max_positions:
            keys.refuse("attention.sliding_window", 0)
    interval = family.no_rope_interval
    if not interval:
        return ()
    return tuple(
        LayerKind(rope=rope if layer % interval else None)
        for layer in range(1, layers + 1)
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


def _head_dim(keys: Keys, hidden_size: int, num_heads: int) -> int:
    if "attention.key_length" not in keys.raw and hidden_size % num_heads:
        raise CheckpointError(
            f"{keys.prefix}embedding_length={hidden_size} must be a multiple of "
            f"attention.head_count={num_heads}."
        )
    head_dim = keys.integer("attention.key_length", hidden_size // num_heads)
    if keys.integer("attention.value_length", head_dim) != head_dim:
        keys.refuse("attention.value_length", head_dim)
    if head_dim % 2:
        raise CheckpointError(f"{head_dim=} must be even for rotary positions.")
    return head_dim


def _rows(header: Header, name: str) -> int:
    if name not in header.tensors:
        raise CheckpointError(f"tensor {name} is missing.")
    return header.tensors[name].rows
