"""The decoder-only transformer of Llama, Mistral, Qwen, Phi-3, Gemma and others.

The families differ in switches (bias on the projections, norm on queries and keys,
where norms stand, tied embeddings, experts) and in the rotary scaling, so one network
serves them all, and their distillations. It knows nothing of caches: each layer hands
its queries, keys, values and its own state to one `attend` callable and gets the output
and the new state back.

Axis letters: `B` batch, `T` tokens, `D` hidden, `N` query heads, `K` key/value heads,
`H` head size, `F` feed-forward, `V` vocabulary.
"""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxkv.kernels import block, pointwise, project
from jaxkv.kernels.per_shard import no_mesh
from jaxkv.models import rope
from jaxkv.models.config import Config, Experts
from jaxkv.models.layer import (
    FROM_COLUMNS,
    TO_COLUMNS,
    Attend,
    Layer,
    matrix,
    ones,
    scale_of_norm,
)
from jaxkv.models.layout import check_shards


def layer_frequencies(config: Config) -> tuple[jax.Array, ...]:
    """Return each layer's rotary frequencies, float32 `[H / 2]`, in radians a position.

    A frequency of 0 turns nothing.
    """
    found = {
        how: rope.frequencies(how, config.head_dim, config.max_positions)
        for how in dict.fromkeys(kind.rope for kind in config.layer_kinds)
    }
    return tuple(found[kind.rope] for kind in config.layer_kinds)


class Decoder(nn.Module):
    """Token ids and one state per layer in, hidden states and new states out.

    The output layer is a method of its own (`unembed`), because prefill needs logits
    at one position only and the others would cost `T x V` memory.

    Attributes:
      config: sizes and switches.
      implementation: of the operations in `kernels.block`; None is the best one here.
      shards: over how many devices of a mesh the parameters are laid out: their heads,
        and their feed-forward columns (`layout`).
    """

    config: Config
    implementation: block.Implementation | None = None
    shards: tuple[int, int] = (1, 1)

    def setup(self):
        """Declare the embedding, the layers and the output layer."""
        c = self.config
        shape = c.vocab_size, c.hidden_size
        self.embedding = self.param("embedding", matrix(*FROM_COLUMNS), shape)
        self.layers = [
            Layer(c, kind, self._experts(i), self.implementation, name=f"layer_{i}")
            for i, kind in enumerate(c.layer_kinds)
        ]
        self.final_norm = self.param("final_norm", ones(None), (c.hidden_size,))
        if not c.tied:
            self.head = self.param("head", matrix(*TO_COLUMNS), shape[::-1])

    def __call__(
        self,
        tokens: jax.Array,
        positions: jax.Array,
        cache: tuple[Any, ...],
        attend: Attend,
        carried: Any = None,
        first: int = 0,
    ) -> tuple[Any, tuple[Any, ...]]:
        """Run all layers, or as many as there are states.

        Args:
          tokens: integer ids `[B, T]`.
          positions: integer positions `[B, T]` of the tokens in their sequences.
          cache: one state per layer, whatever `attend` expects.
          attend: the attention, bound to a phase and a policy; see `Attend`.
          carried: what the layers before have returned; None for the first one.
          first: index of the first of these layers.

        Returns:
          The normalised hidden states `[B, T, D]`, or what the next layer takes if one
          is left; and the new states of these layers.

        Raises:
          ValueError: the parameters are laid out for another mesh than the one set.
        """
        c = self.config
        check_shards(self.shards)
        tables = {
            how: rope.table(how, positions, c.head_dim, c.max_positions)
            for how in dict.fromkeys(kind.rope for kind in c.layer_kinds)
        }
        x, delta = carried or (self._embedded(tokens), None)
        new_cache = []

        def run(kind, experts, variables, x, delta, cos, sin, state):
            layer = Layer(c, kind, experts, self.implementation, parent=None)
            return layer.apply(variables, x, delta, cos, sin, state, attend)

        if isinstance(x, jax.core.Tracer):
            # One trace serves all layers of a kind: it is most of what compiling costs
            # in Python.
            run = jax.jit(run, static_argnums=(0, 1))
        some = slice(first, first + len(cache))
        kinds = c.layer_kinds[some]
        for layer, kind, state in zip(self.layers[some], kinds, cache, strict=True):
            cos, sin = tables[kind.rope]
            if self.is_initializing():
                x, delta, state = layer(x, delta, cos, sin, state, attend)
            else:
                x, delta, state = run(
                    *(kind, layer.experts, layer.variables),
                    *(x, delta, cos, sin, state),
                )
            new_cache.append(state)
        if some.stop < c.num_layers:
            return (x, delta), tuple(new_cache)
        _, normed = pointwise.add_rms_norm(
            *(x, delta, scale_of_norm(self.final_norm, c)),
            eps=c.rms_norm_eps,
            implementation=block.apart(self.implementation),
        )
        return normed, tuple(new_cache)

    def _experts(self, layer: int) -> Experts | None:
        return self.config.experts if self.config.has_experts(layer) else None

    def _embedded(self, tokens):
        x, scale = project.embed(tokens, self.embedding), self.config.embedding_scale
        return x if scale is None else x * jnp.asarray(scale, x.dtype)

    def frequencies(self) -> tuple[jax.Array, ...]:
        """Return each layer's rotary frequencies, as `layer_frequencies` does."""
        return layer_frequencies(self.config)

    def outputs(self) -> tuple[jax.Array, ...]:
        """Return each layer's projection of the heads' outputs, `[N, H, D]`."""
        c = self.config
        shape = c.num_heads, c.head_dim, c.hidden_size
        return tuple(
            layer.variables["params"]["output"].reshape(shape) for layer in self.layers
        )

    def unembed(self, hidden: jax.Array) -> jax.Array:
        """Return float32 logits `[..., V]` of normalised hidden states `[..., D]`."""
        tied = self.config.tied
        logits = project.unembed(
            hidden if hidden.ndim == 3 else hidden.reshape(-1, 1, hidden.shape[-1]),
            self.embedding if tied else self.head,
            tied=tied,
            implementation=block.apart(self.implementation),
        )
        logits = logits.reshape(*hidden.shape[:-1], -1).astype(jnp.float32)
        if self.config.logit_scale is not None:
            logits = self.config.logit_scale * logits
        cap = self.config.logit_cap
        return logits if cap is None else cap * jnp.tanh(logits / cap)


def _declared(config: Config) -> dict[str, Any]:
    """Return the tree of parameters as declared: `nn.Partitioned` of shapes."""
    tokens = jax.ShapeDtypeStruct((1, 1), jnp.int32)

    def init(tokens):
        return Decoder(config).init(
            jax.random.key(0),
            tokens,
            tokens,
            (None,) * config.num_layers,
            lambda q, k, v, state, weighing: (q, state),
        )

    with no_mesh():  # these are whole shapes, whatever mesh is set
        return jax.eval_shape(init, tokens)["params"]


def parameter_shapes(config: Config) -> dict[str, Any]:
    """Return the tree of parameter shapes and float32 dtypes, without making arrays."""
    return nn.meta.unbox(_declared(config))


@functools.cache
def parameter_axes() -> dict[str, tuple[str | tuple[str, ...] | None, ...]]:
    """Return the mesh axes that each parameter declares, by its name.

    An entry is the axis of the mesh, or the axes, along which that axis of the
    parameter is cut, or None where every device has all of it.
    """
    config = Config(  # every switch is on, so that every parameter is there
        vocab_size=2,
        hidden_size=2,
        intermediate_size=2,
        num_layers=2,
        num_heads=1,
        num_kv_heads=1,
        head_dim=2,
        tied=False,
        qkv_bias=True,
        output_bias=True,
        qk_norm=True,
        post_norm=True,
        experts=Experts(count=1, per_token=1, size=1, bias=True, dense_layers=(0,)),
        sinks=True,
    )
    leaves, _ = jax.tree_util.tree_flatten_with_path(
        _declared(config), is_leaf=lambda x: isinstance(x, nn.Partitioned)
    )
    return {path[-1].key: leaf.names for path, leaf in leaves}


def random_parameters(config: Config, key: jax.Array, dtype=jnp.bfloat16):
    """Draw parameters (normal, 0.02; norms one, biases zero) for benchmarks and tests.

    Args:
      config: the network.
      key: PRNG key; it is consumed.
      dtype: of every leaf.

    Returns:
      The parameter tree. Leaf by leaf, so that the peak is one copy of the weights.
    """
    shapes = parameter_shapes(config)
    leaves, tree = jax.tree_util.tree_flatten_with_path(shapes)
    keys = jax.random.split(key, len(leaves))
    out = []
    for (path, leaf), leaf_key in zip(leaves, keys, strict=True):
        name = path[-1].key
        if name.endswith("norm"):
            out.append(jnp.ones(leaf.shape, dtype))
        elif name.endswith("bias"):
            out.append(jnp.zeros(leaf.shape, dtype))
        else:
            out.append(0.02 * jax.random.normal(leaf_key, leaf.shape, dtype))
    return jax.tree.unflatten(tree, out)
