"""Sizes and switches of one network, and what tells its layers apart."""

import dataclasses

from jaxkv.kernels.experts import SILU, Gate
from jaxkv.kernels.project import Activation
from jaxkv.models.rope import PLAIN, Rope


@dataclasses.dataclass(frozen=True, kw_only=True)
class LayerKind:
    """What one layer's attention does.

    Attributes:
      rope: how its queries and keys are rotated; None rotates nothing.
      window: how many tokens each token attends to, itself the last; None is all.
    """

    rope: Rope | None = PLAIN
    window: int | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Experts:
    """The feed-forward of a mixture of experts.

    Attributes:
      count: experts of a layer.
      per_token: how many of them a token uses.
      size: inner columns of one.
      normalize: whether the shares of a token's experts add up to one; else they are
        their probabilities among all experts.
      bias: whether router and experts have biases (gpt-oss).
      gate: their activation.
      dense_layers: indices of the layers that have a plain feed-forward instead.
    """

    count: int
    per_token: int
    size: int
    normalize: bool = True
    bias: bool = False
    gate: Gate = SILU
    dense_layers: tuple[int, ...] = ()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Sizes and switches of one network; nothing about caches, devices or sampling.

    Attributes:
      vocab_size: rows of the embedding.
      hidden_size: width of the residual stream.
      intermediate_size: width of the gated feed-forward, where it is not of experts.
      num_layers: decoder layers.
      num_heads: query heads.
      num_kv_heads: key/value heads; divides `num_heads`.
      head_dim: size of one head.
      rms_norm_eps: epsilon of every RMS norm.
      rope: rotation of the layers that `kinds` does not tell apart.
      kinds: of each layer; empty where all are alike, with `rope`.
      max_positions: longest sequence the checkpoint was made for, in tokens; a rotary
        scaling may depend on it, see `rope.LongRopeScaling`.
      qkv_bias: whether the query, key and value projections have a bias (Qwen2).
      output_bias: whether the attention's output projection has a bias.
      qk_norm: whether queries and keys are normalised (Qwen3).
      qk_norm_per_head: whether each head is, or all heads of a token at once (OLMo 2).
      pre_norm: whether attention and feed-forward read the normalised stream.
      post_norm: whether what they add to the stream is normalised (OLMo 2).
      norm_offset: whether norms multiply by one more than their weight (Gemma).
      activation: of the gated feed-forward.
      embedding_scale: what embeddings are multiplied by, in their dtype; None is 1.
      query_scale: what the attention's logits are multiplied by; None is
        `head_dim**-0.5`.
      residual_scale: what attention and feed-forward add to the stream is multiplied by
        it (Granite); None is 1.
      attention_cap: bound of the attention's logits, as `logit_cap` (Gemma 2).
      sinks: whether each head has a learned logit beside those of the tokens, whose
        weight goes nowhere (gpt-oss).
      logit_scale: what the network's logits are multiplied by (Granite); None is 1.
      logit_cap: the network's logits are `logit_cap * tanh(logits / logit_cap)`
        (Gemma 2); None leaves them.
      tied: whether the output layer is the transposed embedding.
      experts: the feed-forward of layers that have experts; None has none.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float = 1e-6
    rope: Rope = PLAIN
    kinds: tuple[LayerKind, ...] = ()
    max_positions: int = 4096
    qkv_bias: bool = False
    output_bias: bool = False
    qk_norm: bool = False
    qk_norm_per_head: bool = True
    pre_norm: bool = True
    post_norm: bool = False
    norm_offset: bool = False
    activation: Activation = "silu"
    embedding_scale: float | None = None
    query_scale: float | None = None
    residual_scale: float | None = None
    attention_cap: float | None = None
    sinks: bool = False
    logit_scale: float | None = None
    logit_cap: float | None = None
    tied: bool = False
    experts: Experts | None = None

    def __repr__(self) -> str:
        """Leave out what is as in most networks."""
        said = [
            f"{field.name}={getattr(self, field.name)!r}"
            for field in dataclasses.fields(self)
            if getattr(self, field.name) != field.default
        ]
        return f"Config({', '.join(said)})"

    @property
    def family(self) -> str:
        """Name of the family that has these switches; Mistral's are those of Llama."""
        if not self.pre_norm:
            return "OLMo 2"
        if self.norm_offset:
            return "Gemma 3" if self.qk_norm else "Gemma 2"
        if self.residual_scale is not None:
            return "Granite"
        if self.experts is not None:
            if self.sinks:
                return "gpt-oss"
            if not self.qk_norm:
                return "Mixtral"
            return "Qwen3-MoE" if self.qk_norm_per_head else "OLMoE"
        if self.qk_norm:
            return "Qwen3"
        return "Qwen2" if self.qkv_bias and not self.output_bias else "Llama"

    def has_experts(self, layer: int) -> bool:
        """Whether the feed-forward of a layer, by its index, is of experts."""
        return self.experts is not None and layer not in self.experts.dense_layers

    @property
    def qkv_size(self) -> int:
        """Columns of the fused query-key-value projection."""
        return sum(self.qkv_sizes)

    @property
    def qkv_sizes(self) -> tuple[int, int, int]:
        """Columns of the query, key and value projections."""
        keys = self.num_kv_heads * self.head_dim
        return self.num_heads * self.head_dim, keys, keys

    @property
    def layer_kinds(self) -> tuple[LayerKind, ...]:
        """The kind of each layer."""
        return self.kinds or (LayerKind(rope=self.rope),) * self.num_layers

    @property
    def windows(self) -> tuple[int | None, ...]:
        """How many tokens each layer attends to, in tokens; None is all."""
        return tuple(kind.window for kind in self.layer_kinds)
