"""One layer of the network: attention and feed-forward, each with its norms.

Axis letters: `B` batch, `T` tokens, `D` hidden, `N` query heads, `K` key/value heads,
`H` head size.
"""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxkv.kernels import block, pointwise, project
from jaxkv.kernels.per_shard import COLUMNS, MODEL
from jaxkv.kernels.weighing import Weighing
from jaxkv.models import experts
from jaxkv.models.config import Config, Experts, LayerKind

# (q [B,T,N,H], k [B,T,K,H], v [B,T,K,H], state, weighing) -> (out [B,T,N,H], state)
Attend = Callable[
    [jax.Array, jax.Array, jax.Array, Any, Weighing], tuple[jax.Array, Any]
]


# How matrices are cut over the devices that share out a row (`kernels.per_shard`). What
# leads to heads and feed-forward columns is cut along its columns, what leads back
# along its rows, so that the parts of a layer meet in two sums.
TO_HEADS = (None, MODEL)
TO_COLUMNS = (None, COLUMNS)
FROM_COLUMNS = (COLUMNS, None)


def matrix(*axes: Any):
    """Return how a matrix is drawn and cut."""
    return nn.with_partitioning(nn.initializers.normal(0.02), axes)


def ones(*axes: str | None):
    """Return how ones are made and cut."""
    return nn.with_partitioning(nn.initializers.ones, axes)


def zeros(*axes: str | None):
    """Return how zeros are made and cut."""
    return nn.with_partitioning(nn.initializers.zeros, axes)


def scale_of_norm(weight: jax.Array, config: Config) -> jax.Array:
    """Return what a norm multiplies by; 16 bits hold no small weight beside one."""
    return weight.astype(jnp.float32) + 1 if config.norm_offset else weight


class Layer(nn.Module):
    """One layer; weights that are read together are stored together.

    Attributes:
      config: sizes and switches.
      kind: of this layer.
      experts: `config.experts` if this layer has them, else None.
      implementation: as in `Decoder`.
    """

    config: Config
    kind: LayerKind
    experts: Experts | None
    implementation: block.Implementation | None = None

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        delta: jax.Array | None,
        cos: jax.Array,
        sin: jax.Array,
        state: Any,
        attend: Attend,
    ) -> tuple[jax.Array, jax.Array | None, Any]:
        """Run one layer.

        Args:
          x: `[B, T, D]`, the residual stream.
          delta: `[P, B, T, D]`, whose sum over `P` the layer before adds to it; None
            for the first, or where it has been added. Else it is left to this layer,
            which adds it and normalises the sum in one launch.
          cos: of `rotary.table`.
          sin: likewise.
          state: of this layer.
          attend: see `Attend`.

        Returns:
          The residual stream, what is still to be added to it in parts, and the new
          state.
        """
        c = self.config
        heads = c.num_heads * c.head_dim
        qkv = self._matrix("qkv", TO_HEADS, c.hidden_size, c.qkv_size)
        output = self._matrix("output", FROM_COLUMNS, heads, c.hidden_size)
        gate_up = down = None
        if self.experts is None:
            inner = c.intermediate_size
            gate_up = self._matrix("gate_up", TO_COLUMNS, c.hidden_size, 2 * inner)
            down = self._matrix("down", FROM_COLUMNS, inner, c.hidden_size)
        x, (q, k, v) = self._heads(x, delta, qkv, cos, sin)
        sink = None
        if c.sinks:
            sink = self.param("sink", zeros(MODEL), (c.num_heads,))
        weighing = Weighing(window=self.kind.window, sink=sink, cap=c.attention_cap)
        with jax.named_scope("attend"):
            out, state = attend(q, k, v, state, weighing)
        out = out.reshape(*x.shape[:2], heads)
        bias = "output_bias" if c.output_bias else None
        x, delta = self._add("attention_post_norm", x, out, output, bias)
        x, delta = self._feed_forward(x, delta, gate_up, down)
        return x, delta, state

    def _heads(self, x, delta, qkv, cos, sin):
        """Return the residual stream; rotated queries and keys, and values."""
        c = self.config
        q_norm = k_norm = None
        if c.qk_norm and c.qk_norm_per_head:
            q_norm = self._norm_weight("q_norm", c.head_dim)
            k_norm = self._norm_weight("k_norm", c.head_dim)
        how: dict[str, Any] = dict(
            num_heads=c.num_heads, num_kv_heads=c.num_kv_heads, eps=c.rms_norm_eps
        )
        if c.pre_norm and not c.qkv_bias and (q_norm is not None or not c.qk_norm):
            norm = self._norm_weight("attention_norm", c.hidden_size)
            x, heads = block.read_heads(
                *(x, delta, norm, qkv, q_norm, k_norm, cos, sin),
                **how,
                implementation=self.implementation,
            )
        else:
            x, normed = self._enter("attention_norm", x, delta)
            heads = pointwise.split_and_rotate(
                *(self._biased_heads(normed, qkv), q_norm, k_norm, cos, sin),
                **how,
                dtype=x.dtype,
                implementation=block.apart(self.implementation),
            )
        q, k, v = heads
        if c.query_scale is not None:  # beside the attention's own
            factor = c.query_scale * c.head_dim**0.5
            q = (factor * q.astype(jnp.float32)).astype(q.dtype)
        return x, (q, k, v)

    def _biased_heads(self, normed, qkv):
        """Return a fused projection with its bias, normalised across heads (OLMo 2)."""
        c = self.config
        qkv = self._times(normed, qkv, "heads", "qkv_bias" if c.qkv_bias else None)
        if not c.qk_norm or c.qk_norm_per_head:
            return qkv
        return pointwise.norm_of_all_heads(
            pointwise.join(qkv, normed.dtype),
            self._norm_weight("q_norm", c.num_heads * c.head_dim),
            self._norm_weight("k_norm", c.num_kv_heads * c.head_dim),
            num_heads=c.num_heads,
            num_kv_heads=c.num_kv_heads,
            eps=c.rms_norm_eps,
            implementation=block.apart(self.implementation),
        )[None]

    def _feed_forward(self, x, delta, gate_up, down):
        """Return the residual stream, and what is still to be added to it, in parts."""
        c, name = self.config, "mlp_post_norm"
        if self.experts is not None:
            x, normed = self._enter("mlp_norm", x, delta)
            delta = experts.feed_forward(self.experts, normed, self._parameter)
            return x, self._leave(name, delta, x.dtype)
        if not c.pre_norm:
            x = block.added(x, delta)
            inner = project.project_gated(
                *(x, gate_up),
                activation=c.activation,
                implementation=block.apart(self.implementation),
            )
            return self._add(name, x, inner, down)
        x, inner = block.read_gated(
            *(x, delta, self._norm_weight("mlp_norm", c.hidden_size), gate_up),
            activation=c.activation,
            eps=c.rms_norm_eps,
            implementation=self.implementation,
        )
        return self._add(name, x, inner, down)

    def _enter(self, name, x, delta):
        """Add to the residual stream; return the sum, and what a block reads of it."""
        if self.config.pre_norm:
            return self._norm(name, x, delta)
        x = block.added(x, delta)
        return x, x

    def _add(self, name, x, inner, weight, bias=None):
        """Return the residual stream, and what is still to be added to it, in parts."""
        c = self.config
        if bias is None and not c.post_norm and c.residual_scale is None:
            return block.add_product(
                x, inner, weight, implementation=self.implementation
            )
        delta = self._times(inner, weight, "rows", bias)
        return x, self._leave(name, delta, x.dtype)

    def _leave(self, name, delta, dtype):
        """Return what a block adds to the residual stream, in parts."""
        if self.config.post_norm:
            delta = self._norm(name, pointwise.join(delta, dtype))[1][None]
        scale = self.config.residual_scale
        if scale is None:
            return delta
        return (scale * delta.astype(jnp.float32)).astype(delta.dtype)

    def _matrix(self, name, axes, *shape):
        return self.param(name, matrix(*axes), shape)

    def _times(self, x, weight, cut: project.Cut, bias=None):
        """Return a product with a matrix, in parts; add the bias of a name."""
        how = block.apart(self.implementation)
        parts = project.project(x, weight, cut=cut, implementation=how)
        if bias:
            axis = MODEL if cut == "heads" else None
            bias = self.param(bias, zeros(axis), weight.shape[1:])
            parts = (pointwise.join(parts, x.dtype) + bias[None, None])[None]
        return parts

    def _norm(self, name, x, delta=None):
        """Return a sum, and the sum normalised."""
        return pointwise.add_rms_norm(
            *(x, delta, self._norm_weight(name, x.shape[-1])),
            eps=self.config.rms_norm_eps,
            implementation=block.apart(self.implementation),
        )

    def _norm_weight(self, name, size):
        return scale_of_norm(self.param(name, ones(None), (size,)), self.config)

    def _parameter(self, name, axes, shape):
        made = zeros if name.endswith("bias") else matrix
        return self.param(name, made(*axes), shape)
