"""The families of networks that Hugging Face checkpoints may be of, a table."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Literal

from jaxkv.models.hf import gemma, granite
from jaxkv.models.hf.rope import NO_ROPE


@dataclasses.dataclass(frozen=True, kw_only=True)
class Family:
    """What a `model_type` implies beyond its keys, as transformers implements it.

    Attributes:
      name: as its makers write it.
      architecture: the class with an output layer for the next token.
      bias: of the projections to queries, keys and values, and from the heads.
      output_bias: the key that says whether the latter has one, if `bias` is "by
        attention_bias"; None is never.
      interleaved: whether the two halves of a rotary pair are neighbours in a
        checkpoint; see `rope.head_order`.
      switches: of `Config`.
      experts: whether layers have experts.
      rope: options of `rope.read_ropes`.
      keys: that no other family reads.
      read: returns switches of `Config` that some keys decide.
    """

    name: str
    architecture: str
    bias: Literal["never", "qkv", "by attention_bias"]
    output_bias: str | None = "attention_bias"
    interleaved: bool = False
    switches: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    experts: bool = False
    rope: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    keys: frozenset[str] = frozenset()
    read: Callable[..., dict[str, Any]] | None = None


FAMILIES = {
    "llama": Family(
        name="Llama", architecture="LlamaForCausalLM", bias="by attention_bias"
    ),
    "mistral": Family(name="Mistral", architecture="MistralForCausalLM", bias="never"),
    "qwen2": Family(name="Qwen2", architecture="Qwen2ForCausalLM", bias="qkv"),
    "qwen3": Family(
        name="Qwen3",
        architecture="Qwen3ForCausalLM",
        bias="by attention_bias",
        switches=dict(qk_norm=True),
    ),
    "phi3": Family(
        name="Phi-3",
        architecture="Phi3ForCausalLM",
        bias="never",
        rope=dict(partial=True, longrope=("su", "yarn")),
    ),
    "smollm3": Family(
        name="SmolLM3",
        architecture="SmolLM3ForCausalLM",
        bias="by attention_bias",
        keys=NO_ROPE,
    ),
    "olmo2": Family(
        name="OLMo 2",
        architecture="Olmo2ForCausalLM",
        bias="by attention_bias",
        switches=dict(
            qk_norm=True, qk_norm_per_head=False, pre_norm=False, post_norm=True
        ),
    ),
    "mixtral": Family(
        name="Mixtral", architecture="MixtralForCausalLM", bias="never", experts=True
    ),
    "qwen3_moe": Family(
        name="Qwen3-MoE",
        architecture="Qwen3MoeForCausalLM",
        bias="by attention_bias",
        switches=dict(qk_norm=True),
        experts=True,
    ),
    "gpt_oss": Family(
        name="gpt-oss",
        architecture="GptOssForCausalLM",
        bias="by attention_bias",
        switches=dict(sinks=True),
        experts=True,
        keys=frozenset({"initial_context_length"}),  # that of rope_scaling, again
    ),
    "olmoe": Family(
        name="OLMoE",
        architecture="OlmoeForCausalLM",
        bias="by attention_bias",
        switches=dict(qk_norm=True, qk_norm_per_head=False),
        experts=True,
    ),
    "olmo3": Family(
        name="OLMo 3",
        architecture="Olmo3ForCausalLM",
        bias="by attention_bias",
        switches=dict(
            qk_norm=True, qk_norm_per_head=False, pre_norm=False, post_norm=True
        ),
        rope=dict(by_type=True),
    ),
    "gemma2": Family(
        name="Gemma 2",
        architecture="Gemma2ForCausalLM",
        bias="by attention_bias",
        switches=gemma.SWITCHES,
        read=gemma.read_gemma,
        keys=gemma.KEYS,
    ),
    "gemma3_text": Family(
        name="Gemma 3",
        architecture="Gemma3ForCausalLM",
        bias="by attention_bias",
        switches=dict(gemma.SWITCHES, qk_norm=True),
        read=gemma.read_gemma,
        keys=gemma.KEYS,
        rope=dict(by_type=True),
    ),
    "granite": Family(
        name="Granite",
        architecture="GraniteForCausalLM",
        bias="by attention_bias",
        keys=granite.KEYS,
        read=granite.read_granite,
    ),
    "seed_oss": Family(
        name="Seed-OSS",
        architecture="SeedOssForCausalLM",
        bias="by attention_bias",
        output_bias="attention_out_bias",
        keys=frozenset({"attention_out_bias", "residual_dropout"}),
    ),
    "glm": Family(
        name="GLM",
        architecture="GlmForCausalLM",
        bias="by attention_bias",
        output_bias=None,
        interleaved=True,
        rope=dict(partial=True),
    ),
    "glm4": Family(
        name="GLM-4",
        architecture="Glm4ForCausalLM",
        bias="by attention_bias",
        output_bias=None,
        interleaved=True,
        switches=dict(post_norm=True),
        rope=dict(partial=True),
    ),
    "helium": Family(
        name="Helium",
        architecture="HeliumForCausalLM",
        bias="by attention_bias",
        output_bias=None,
        interleaved=True,
    ),
}
