"""Families whose layers mostly have a window: cases of parity with transformers."""

# Gemma 3 changes layers every sixth time in a GGUF file, whatever its configuration.
CASES = {
    "gemma2-gguf": (
        "Gemma2",
        dict(head_dim=24, sliding_window=9, query_pre_attn_scalar=24),
    ),
    "gemma3-gguf": (
        "Gemma3Text",
        dict(
            head_dim=24,
            num_hidden_layers=7,
            sliding_window=9,
            query_pre_attn_scalar=24,
            rope_parameters=dict(
                sliding_attention=dict(rope_type="default", rope_theta=100.0),
                full_attention=dict(rope_type="linear", rope_theta=5e3, factor=4.0),
            ),
        ),
    ),
    "gpt-oss": (
        "GptOss",
        dict(
            head_dim=24,
            sliding_window=9,
            num_local_experts=6,
            num_experts_per_tok=2,
            swiglu_limit=1.5,  # so low that it acts
            rope_parameters=dict(
                rope_type="yarn",
                rope_theta=500.0,
                factor=4.0,
                beta_fast=8.0,
                truncate=False,
                original_max_position_embeddings=64,
            ),
        ),
    ),
    "olmo3": ("Olmo3", dict(sliding_window=11, num_hidden_layers=4)),
    "gemma2": (
        "Gemma2",
        dict(
            head_dim=24,
            sliding_window=9,
            query_pre_attn_scalar=20,
            tie_word_embeddings=False,  # else it repeats a token
            attn_logit_softcapping=3.0,
            final_logit_softcapping=5.0,
        ),
    ),
    "gemma3": (
        "Gemma3Text",
        dict(
            head_dim=24,
            sliding_window=9,
            query_pre_attn_scalar=20,
            tie_word_embeddings=False,  # else it repeats a token
            layer_types=["sliding_attention", "full_attention"],
            rope_parameters=dict(
                sliding_attention=dict(rope_type="default", rope_theta=100.0),
                full_attention=dict(rope_type="linear", rope_theta=5e3, factor=4.0),
            ),
        ),
    ),
}
