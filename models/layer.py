"""One layer of the network: attention and feed-forward, each with its norms.

Axis letters: `B` batch, `T` tokens, `D` hidden, `N` query heads, `K` key/value heads,
`H` head size.
"""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxkv.kernels import pointwise, project
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
    implementation: pointwise.Implementation | None = None

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        delta: jax.Array | None,
        cos: jax.Array,
        sin: jax.Array,
        state: Any,
        attend: Attend,
    ) -> tuple[jax.Array, jax.Array, Any]:
        """Run one layer.

        Args:
          x: `[B, T, D]`, the residual stream.
          delta: `[P, B, T, D]`, whose sum over `P` the layer before adds to it; None
            for the first. It is left to this layer, which adds it and normalises the
            sum in one launch.
          cos: of `rotary.table`.
          sin: likewise.
          state: of this layer.
          attend: see `Attend`.

        Returns:
          The residual stream, what this layer adds to it in parts, and the new state.
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
        # What stands ready before a matrix is read names it, so that it may be fetched.
        x, normed = self._enter("attention_norm", x, delta, ahead=qkv)
        q, k, v = self._heads(normed, qkv, cos, sin, ahead=output)
        sink = None
        if c.sinks:
            sink = self.param("sink", zeros(MODEL), (c.num_heads,))
        weighing = Weighing(window=self.kind.window, sink=sink, cap=c.attention_cap)
        with jax.named_scope("attend"):
            out, state = attend(q, k, v, state, weighing)
        out = out.reshape(*x.shape[:2], heads)
        delta = self._times(out, output, "rows", c.output_bias and "output_bias")
        delta = self._leave("attention_post_norm", delta, x.dtype)
        x, normed = self._enter("mlp_norm", x, delta, ahead=gate_up)
        delta = self._feed_forward(normed, gate_up, down)
        return x, self._leave("mlp_post_norm", delta, x.dtype), state

    def _enter(self, name, x, delta, ahead):
        """Add to the residual stream; return the sum, and what a block reads of it."""
        if self.config.pre_norm:
            return self._norm(name, x, delta, ahead)
        x = x if delta is None else x + pointwise.join(delta, x.dtype)
        return x, x

    def _leave(self, name, delta, dtype):
        """Return what a block adds to the residual stream, in parts."""
        if self.config.post_norm:
            delta = self._norm(name, pointwise.join(delta, dtype))[1][None]
        scale = self.config.residual_scale
        if scale is None:
            return delta
        return (scale * delta.astype(jnp.float32)).astype(delta.dtype)

    def _heads(self, x, qkv, cos, sin, ahead):
        """Return rotated queries and keys, and values."""
        c = self.config
        qkv = self._times(x, qkv, "heads", c.qkv_bias and "qkv_bias")
        q_norm = k_norm = None
        if c.qk_norm and c.qk_norm_per_head:
            q_norm = self._norm_weight("q_norm", c.head_dim)
            k_norm = self._norm_weight("k_norm", c.head_dim)
        elif c.qk_norm:
            qkv = pointwise.norm_of_all_heads(
                pointwise.join(qkv, x.dtype),
                self._norm_weight("q_norm", c.num_heads * c.head_dim),
                self._norm_weight("k_norm", c.num_kv_heads * c.head_dim),
                num_heads=c.num_heads,
                num_kv_heads=c.num_kv_heads,
                eps=c.rms_norm_eps,
                implementation=self.implementation,
            )[None]
        q, k, v = pointwise.split_and_rotate(
            *(qkv, q_norm, k_norm, cos, sin, ahead),
            num_heads=c.num_heads,
            num_kv_heads=c.num_kv_heads,
            eps=c.rms_norm_eps,
            dtype=x.dtype,
            implementation=self.implementation,
        )
        if c.query_scale is not None:  # beside the attention's own
            factor = c.query_scale * c.head_dim**0.5
            q = (factor * q.astype(jnp.float32)).astype(q.dtype)
        return q, k, v

    def _feed_forward(self, x, gate_up, down):
        """Return what the feed-forward adds to the residual stream, in parts."""
        if self.experts is not None:
            return experts.feed_forward(self.experts, x, self._parameter)
        inner = project.project_gated(
            *(x, gate_up, down),
            activation=self.config.activation,
            implementation=self.implementation,
        )
        return self._times(inner, down, "rows")

    def _matrix(self, name, axes, *shape):
        return self.param(name, matrix(*axes), shape)

    def _times(self, x, weight, cut: project.Cut, bias=None):
        """Return a product with a matrix, in parts; add the bias of a name."""
        parts = project.project(x, weight, cut=cut, implementation=self.implementation)
        if bias:
            axis = MODEL if cut == "heads" else None
            bias = self.param(bias, zeros(axis), weight.shape[1:])
            parts = (pointwise.join(parts, x.dtype) + bias[None, None])[None]
        return parts

    def _norm(self, name, x, delta=None, ahead=None):
        """Return a sum, and the sum normalised."""
        return pointwise.add_rms_norm(
            *(x, delta, self._norm_weight(name, x.shape[-1]), ahead),
            eps=self.config.rms_norm_eps,
            implementation=self.implementation,
        )

    def _norm_weight(self, name, size):
        return scale_of_norm(self.param(name, ones(None), (size,)), self.config)

    def _parameter(self, name, axes, shape):
        made = zeros if name.endswith("bias") else matrix
        return self.param(name, made(*axes), shape)
