"""Tiny networks of each family, as options of their Hugging Face configurations."""

from windowed_cases import CASES as WINDOWED

SIZES = dict(
    vocab_size=160,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=512,
    rms_norm_eps=1e-5,
    bos_token_id=1,
    eos_token_id=2,
)
LLAMA3 = dict(
    rope_type="llama3",
    rope_theta=500.0,  # so that 8 frequencies fall on both sides and in between
    factor=8.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=64,
)
YARN = dict(
    rope_type="yarn",
    rope_theta=500.0,
    factor=4.0,
    original_max_position_embeddings=64,
)
EXPERTS = dict(num_experts=8, num_experts_per_tok=3, moe_intermediate_size=32)
LONGROPE = dict(  # of 12 dimensions of each head
    rope_type="longrope",
    rope_theta=500.0,
    partial_rotary_factor=0.75,
    short_factor=[1.0, 1.0, 1.1, 1.2, 1.3, 1.5],
    long_factor=[1.0, 1.2, 1.5, 2.0, 3.0, 5.0],
)
CASES = WINDOWED | {
    "llama-gqa": ("Llama", {}),
    "llama-mha-tied": ("Llama", dict(num_key_value_heads=4, tie_word_embeddings=True)),
    "llama-mqa-bias": ("Llama", dict(num_key_value_heads=1, attention_bias=True)),
    "llama-rope-head_dim": ("Llama", dict(rope_parameters=LLAMA3, head_dim=24)),
    "mistral": ("Mistral", dict(sliding_window=None)),
    "mistral-head_dim": ("Mistral", dict(sliding_window=512, head_dim=32)),
    "mistral-window": ("Mistral", dict(sliding_window=13)),
    "qwen2": ("Qwen2", dict(rope_parameters=dict(rope_type="default", rope_theta=1e6))),
    "qwen2-window": (
        "Qwen2",
        dict(use_sliding_window=True, sliding_window=9, max_window_layers=1),
    ),
    "qwen2-mha-tied": ("Qwen2", dict(num_key_value_heads=4, tie_word_embeddings=True)),
    "qwen3": ("Qwen3", dict(head_dim=32)),
    "qwen3-mqa-tied-bias": (
        "Qwen3",
        dict(
            num_key_value_heads=1,
            head_dim=16,
            tie_word_embeddings=True,
            attention_bias=True,
        ),
    ),
    "olmo2": ("Olmo2", {}),
    "phi3": ("Phi3", dict(pad_token_id=0)),
    "phi3-partial": (
        "Phi3",
        dict(pad_token_id=0, rope_parameters=dict(partial_rotary_factor=0.5)),
    ),
    "phi3-longrope": (
        "Phi3",
        dict(
            pad_token_id=0, rope_parameters=LONGROPE, original_max_position_embeddings=8
        ),
    ),
    "phi3-window": ("Phi3", dict(pad_token_id=0, sliding_window=13)),
    "smollm3": ("SmolLM3", dict(num_hidden_layers=4, pad_token_id=0)),
    "granite": (
        "Granite",
        dict(
            embedding_multiplier=3.0,
            attention_multiplier=0.2,
            residual_multiplier=0.7,
            logits_scaling=0.4,
        ),
    ),
    "granite-plain": (
        "Granite",
        dict(attention_bias=True, tie_word_embeddings=True),
    ),
    "seed-oss": ("SeedOss", dict(head_dim=24, attention_out_bias=True)),
    "seed-oss-bias": ("SeedOss", dict(head_dim=16)),
    "glm": ("Glm", dict(head_dim=16, pad_token_id=0)),
    "glm4": ("Glm4", dict(head_dim=16, pad_token_id=0)),
    "glm4-whole": (
        "Glm4",
        dict(
            head_dim=16,
            pad_token_id=0,
            attention_bias=False,
            rope_parameters=dict(YARN, partial_rotary_factor=1.0),
        ),
    ),
    "helium": ("Helium", dict(head_dim=16, pad_token_id=0)),
    "smollm3-list": ("SmolLM3", dict(no_rope_layers=[0, 1], pad_token_id=0)),
    "olmo2-mha-tied-bias": (
        "Olmo2",
        dict(num_key_value_heads=4, tie_word_embeddings=True, attention_bias=True),
    ),
    "llama-linear": (
        "Llama",
        dict(rope_parameters=dict(rope_type="linear", rope_theta=500.0, factor=2.5)),
    ),
    "llama-dynamic": (
        "Llama",
        dict(rope_parameters=dict(rope_type="dynamic", rope_theta=500.0, factor=2.5)),
    ),
    "qwen3-yarn": ("Qwen3", dict(head_dim=16, rope_parameters=YARN)),
    "llama-yarn-attention": (
        "Llama",
        dict(rope_parameters=YARN | dict(attention_factor=0.8, beta_fast=8)),
    ),
    "qwen3-rope": ("Qwen3", dict(head_dim=16, rope_parameters=LLAMA3)),
    "olmoe": ("Olmoe", dict(num_experts=8, num_experts_per_tok=3)),
    "olmoe-normalized": (
        "Olmoe",
        dict(num_experts=4, num_experts_per_tok=2, norm_topk_prob=True),
    ),
    "mixtral-window": ("Mixtral", dict(num_local_experts=4, sliding_window=20)),
    "mixtral": ("Mixtral", dict(num_local_experts=4, num_experts_per_tok=2)),
    "qwen3-moe": ("Qwen3Moe", dict(**EXPERTS, norm_topk_prob=True, head_dim=16)),
    "qwen3-moe-dense-layer": (
        "Qwen3Moe",
        dict(**EXPERTS, head_dim=16, mlp_only_layers=[0], tie_word_embeddings=True),
    ),
}

# What GGUF files do not say: none of these architectures has windows there, or other
# layers without rotation than every fourth, and all layers have experts, whose shares
# add up to one or, of olmoe, do not. Of seed-oss and what follows we read none.
HUB_ONLY = (
    *("mistral-window", "qwen2-window", "mixtral-window"),
    *("qwen3-moe-dense-layer", "olmoe-normalized", "smollm3-list"),
    *("seed-oss", "seed-oss-bias", "glm", "glm4", "glm4-whole", "helium"),
    *(case for case in WINDOWED if not case.endswith("gguf")),
)
