"""Sizes of public networks by name, from their `config.json` on the Hugging Face Hub.

With `decoder.random_parameters` they stand for the real checkpoint wherever only time
and memory matter, and need no download.
"""

import math
from typing import Any

from jaxkv.kernels.experts import Gate
from jaxkv.models.config import Config, Experts, LayerKind
from jaxkv.models.rope import Llama3Scaling, LongRopeScaling, Rope, YarnScaling


def _qwen3(hidden: int, feed_forward: int, layers: int, heads: int, *, tied: bool):
    """Return a dense Qwen3; all sizes share eight key/value heads of 128."""
    return Config(
        vocab_size=151_936,
        hidden_size=hidden,
        intermediate_size=feed_forward,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=8,
        head_dim=128,
        rope=Rope(theta=1_000_000.0),
        max_positions=40_960,
        qk_norm=True,
        tied=tied,
    )


_GEMMA: dict[str, Any] = dict(
    pre_norm=True, post_norm=True, norm_offset=True, activation="gelu_tanh", tied=True
)
_GPT_OSS_ROPE = Rope(
    theta=150_000.0,
    scaling=YarnScaling(
        factor=32.0,
        original_max_positions=4096,
        truncate=False,
        attention_factor=0.1 * math.log(32) + 1,
    ),
)

SHAPES = {
    "qwen3-0.6b": _qwen3(1024, 3072, 28, 16, tied=True),
    "qwen3-1.7b": _qwen3(2048, 6144, 28, 16, tied=True),
    "qwen3-4b": _qwen3(2560, 9728, 36, 32, tied=True),
    "qwen3-8b": _qwen3(4096, 12_288, 36, 32, tied=False),
    "qwen3-32b": _qwen3(5120, 25_600, 64, 64, tied=False),
    "llama-3.1-8b": Config(
        vocab_size=128_256,
        hidden_size=4096,
        intermediate_size=14_336,
        num_layers=32,
        num_heads=32,
        num_kv_heads=8,
        head_dim=128,
        rms_norm_eps=1e-5,
        rope=Rope(
            theta=500_000.0,
            scaling=Llama3Scaling(
                factor=8.0,
                low_freq_factor=1.0,
                high_freq_factor=4.0,
                original_max_positions=8192,
            ),
        ),
        max_positions=131_072,
    ),
    "llama-3.3-70b": Config(
        vocab_size=128_256,
        hidden_size=8192,
        intermediate_size=28_672,
        num_layers=80,
        num_heads=64,
        num_kv_heads=8,
        head_dim=128,
        rms_norm_eps=1e-5,
        rope=Rope(
            theta=500_000.0,
            scaling=Llama3Scaling(
                factor=8.0,
                low_freq_factor=1.0,
                high_freq_factor=4.0,
                original_max_positions=8192,
            ),
        ),
        max_positions=131_072,
    ),
    "mistral-7b-v0.3": Config(
        vocab_size=32_768,
        hidden_size=4096,
        intermediate_size=14_336,
        num_layers=32,
        num_heads=32,
        num_kv_heads=8,
        head_dim=128,
        rms_norm_eps=1e-5,
        rope=Rope(theta=1_000_000.0),
        max_positions=32_768,
    ),
    "glm-4-9b": Config(
        vocab_size=151_552,
        hidden_size=4096,
        intermediate_size=13_696,
        num_layers=40,
        num_heads=32,
        num_kv_heads=2,
        head_dim=128,
        rms_norm_eps=1e-5,
        rope=Rope(rotary_dim=64),
        max_positions=32_768,
        qkv_bias=True,
        post_norm=True,
    ),
    "seed-oss-36b": Config(
        vocab_size=155_136,
        hidden_size=5120,
        intermediate_size=27_648,
        num_layers=64,
        num_heads=80,
        num_kv_heads=8,
        head_dim=128,
        rope=Rope(theta=10_000_000.0),
        max_positions=524_288,
        qkv_bias=True,
    ),
    "granite-3.1-8b": Config(
        vocab_size=49_155,
        hidden_size=4096,
        intermediate_size=12_800,
        num_layers=40,
        num_heads=32,
        num_kv_heads=8,
        head_dim=128,
        rms_norm_eps=1e-5,
        rope=Rope(theta=10_000_000.0),
        max_positions=131_072,
        embedding_scale=12.0,
        query_scale=0.007_812_5,
        residual_scale=0.22,
        logit_scale=1 / 16,
        tied=True,
    ),
    "smollm3-3b": Config(
        vocab_size=128_256,
        hidden_size=2048,
        intermediate_size=11_008,
        num_layers=36,
        num_heads=16,
        num_kv_heads=4,
        head_dim=128,
        rope=Rope(theta=5_000_000.0),
        kinds=tuple(
            LayerKind(rope=Rope(theta=5_000_000.0) if layer % 4 else None)
            for layer in range(1, 37)
        ),
        max_positions=65_536,
        tied=True,
    ),
    "phi-4-mini": Config(
        vocab_size=200_064,
        hidden_size=3072,
        intermediate_size=8192,
        num_layers=32,
        num_heads=24,
        num_kv_heads=8,
        head_dim=128,
        rms_norm_eps=1e-5,
        rope=Rope(
            rotary_dim=96,
            scaling=LongRopeScaling(  # no time depends on the factors themselves
                short_factors=(1.0,) * 48,
                long_factors=(1.0,) * 48,
                original_max_positions=4096,
                attention_factor=math.sqrt(1 + math.log(32) / math.log(4096)),
            ),
        ),
        max_positions=131_072,
        tied=True,
    ),
    "olmo-2-7b": Config(
        vocab_size=100_352,
        hidden_size=4096,
        intermediate_size=11_008,
        num_layers=32,
        num_heads=32,
        num_kv_heads=32,
        head_dim=128,
        rope=Rope(theta=500_000.0),
        max_positions=4096,
        qk_norm=True,
        qk_norm_per_head=False,
        pre_norm=False,
        post_norm=True,
    ),
    "gemma-2-2b": Config(
        **_GEMMA,
        vocab_size=256_000,
        hidden_size=2304,
        intermediate_size=9216,
        num_layers=26,
        num_heads=8,
        num_kv_heads=4,
        head_dim=256,
        kinds=(LayerKind(window=4096), LayerKind()) * 13,
        max_positions=8192,
        embedding_scale=2304**0.5,
        query_scale=256**-0.5,
        attention_cap=50.0,
        logit_cap=30.0,
    ),
    "gemma-3-1b": Config(
        **_GEMMA,
        vocab_size=262_144,
        hidden_size=1152,
        intermediate_size=6912,
        num_layers=26,
        num_heads=4,
        num_kv_heads=1,
        head_dim=256,
        rope=Rope(theta=1_000_000.0),
        kinds=tuple(
            LayerKind(rope=Rope(theta=1_000_000.0))
            if layer % 6 == 5
            else LayerKind(window=512)
            for layer in range(26)
        ),
        max_positions=32_768,
        qk_norm=True,
        embedding_scale=1152**0.5,
        query_scale=256**-0.5,
    ),
    "qwen3-30b-a3b": Config(
        vocab_size=151_936,
        hidden_size=2048,
        intermediate_size=6144,
        num_layers=48,
        num_heads=32,
        num_kv_heads=4,
        head_dim=128,
        rope=Rope(theta=1_000_000.0),
        max_positions=40_960,
        qk_norm=True,
        experts=Experts(count=128, per_token=8, size=768),
    ),
    "mixtral-8x7b": Config(
        vocab_size=32_000,
        hidden_size=4096,
        intermediate_size=14_336,
        num_layers=32,
        num_heads=32,
        num_kv_heads=8,
        head_dim=128,
        rms_norm_eps=1e-5,
        rope=Rope(theta=1_000_000.0),
        max_positions=32_768,
        experts=Experts(count=8, per_token=2, size=14_336),
    ),
    "gpt-oss-20b": Config(
        vocab_size=201_088,
        hidden_size=2880,
        intermediate_size=2880,
        num_layers=24,
        num_heads=64,
        num_kv_heads=8,
        head_dim=64,
        rms_norm_eps=1e-5,
        rope=_GPT_OSS_ROPE,
        kinds=(LayerKind(rope=_GPT_OSS_ROPE, window=128), LayerKind(rope=_GPT_OSS_ROPE))
        * 12,
        max_positions=131_072,
        qkv_bias=True,
        output_bias=True,
        sinks=True,
        experts=Experts(
            count=32,
            per_token=4,
            size=2880,
            bias=True,
            gate=Gate(alpha=1.702, limit=7.0, shift=1.0),
        ),
    ),
    "olmoe-1b-7b": Config(
        vocab_size=50_304,
        hidden_size=2048,
        intermediate_size=1024,
        num_layers=16,
        num_heads=16,
        num_kv_heads=16,
        head_dim=128,
        rms_norm_eps=1e-5,
        qk_norm=True,
        qk_norm_per_head=False,
        experts=Experts(count=64, per_token=8, size=1024, normalize=False),
    ),
}
