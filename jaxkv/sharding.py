"""Weights and cache over several devices: which axis of which array is cut how.

```python
lm = jaxkv.load("Qwen/Qwen3-8B", mesh="data=2,model=4")  # rows over 2, heads over 4
jaxkv.generate(lm, prompts)
```

Tensor parallelism as Megatron-LM has it (arXiv 1909.08053, section 3): the matrices
that make heads and feed-forward columns are cut along their columns, those that lead
back along their rows, and the devices of a row add up the parts, twice a layer. Fused
matrices are laid out so that each device has whole groups of heads, and its gates
beside its ups (`jaxkv.models.layout`). Embedding and output layer are cut over the
vocabulary, the cache along rows of the batch (`data`) and key/value heads (`model`).
All kernels run on each device's own part (`jaxkv.kernels.per_shard`).

Where there are more devices than key/value heads, several hold copies of the same heads
and compute the same attention (`copies`); all else is still shared out among them.

Supported: every attention implementation and every policy. Where the heads of a row
lie on several devices and share a victim, they exchange each slot's importance.
Not supported: cutting the slots or the layers.
"""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxkv.expected import brief
from jaxkv.kernels.per_shard import AXES, COPIES, DATA, MODEL, partition_spec
from jaxkv.models import layout, placing
from jaxkv.models.config import Config
from jaxkv.models.decoder import Decoder, parameter_axes, parameter_shapes
from jaxkv.state import KVState


def make_mesh(*, data: int = 1, model: int = 1, devices: Any = None) -> Mesh:
    """Return a mesh of `data` x `model` devices.

    Args:
      data: devices that share out the rows of a batch.
      model: devices that share out the heads of one row.
      devices: to use; None takes the default ones.
    """
    return jax.make_mesh(
        (data, model, 1),
        AXES,
        axis_types=(AxisType.Auto,) * 3,  # XLA finds the shardings in between
        devices=devices,
    )


def resolve(mesh: Mesh | str, config: Config) -> Mesh:
    """Return the mesh that is named, for this network.

    Args:
      mesh: from `make_mesh`, or in words: "data=2,model=4", or "auto", which is all
        devices, as many of them for a row as divide the network.
      config: of the network.

    Raises:
      ValueError: it is no mesh of `make_mesh` and no words for one, there are too few
        devices, or it does not divide the network.
    """
    if isinstance(mesh, str):
        mesh = make_mesh(**sizes_of(mesh, config, jax.device_count()))
    if not isinstance(mesh, Mesh) or mesh.axis_names != AXES:
        raise ValueError(
            "mesh: expected a mesh from jaxkv.sharding.make_mesh, or words such as "
            f"data=2,model=4 or auto, got {brief(mesh)}."
        )
    return for_network(mesh, config)


def sizes_of(words: str, config: Config, devices: int) -> dict[str, int]:
    """Return what `make_mesh` takes, for words as `resolve` takes them; both sizes.

    Args:
      words: see `resolve`.
      config: of the network.
      devices: how many there are.

    Raises:
      ValueError: the words are no mesh, or there are too few devices.
    """
    if words == "auto":
        model = max(n for n in _fitting(config, devices) if devices % n == 0)
        return dict(data=devices // model, model=model)
    pairs = [part.strip().partition("=") for part in words.split(",")]
    named = {name: int(size) for name, _, size in pairs if size.isdecimal()}
    sizes = {DATA: 1, MODEL: 1} | named
    if len(sizes) > 2 or not all(sizes.values()) or len(named) < len(pairs):
        raise ValueError(
            f"mesh: expected auto, or numbers of devices such as data=2,model=4, got "
            f"{words!r}."
        )
    count = math.prod(sizes.values())
    if count > devices:
        raise ValueError(
            f"mesh: {words} takes {count} devices, but there are {devices}; use fewer, "
            "or auto."
        )
    return sizes


def for_network(mesh: Mesh, config: Config) -> Mesh:
    """Return the mesh with as many copies of heads as a network makes necessary.

    Args:
      mesh: from `make_mesh`.
      config: of the network.

    Raises:
      ValueError: the mesh does not divide the network; the message says what would.
    """
    check(config, mesh)
    count = devices_of_a_row(mesh)
    heads = min(count, config.num_kv_heads)
    if mesh.shape[MODEL] == heads:
        return mesh
    shape = mesh.shape[DATA], heads, count // heads
    return Mesh(mesh.devices.reshape(shape), AXES, axis_types=mesh.axis_types)


def devices_of_a_row(mesh: Any) -> int:
    """Return how many devices share out one row."""
    return mesh.shape[MODEL] * mesh.shape[COPIES]


def shards_of(mesh: Any) -> tuple[int, int]:
    """Return over how many devices heads and columns lie; see `layout`."""
    return mesh.shape[MODEL], devices_of_a_row(mesh)


def check(config: Config, mesh: Any) -> None:
    """Raise ValueError if the mesh does not divide the network; say what would.

    Args:
      config: of the network.
      mesh: from `make_mesh`.
    """
    count, heads = devices_of_a_row(mesh), config.num_kv_heads
    others = _columns(config)
    fits = _fitting(config, count)
    if count in fits:
        return
    what, size = next(
        ((what, size) for what, size in others.items() if size % count),
        ("key/value heads", heads),
    )
    raise ValueError(
        f"sharding: {size} {what} do not divide over model={count} devices; this "
        f"network takes model={_list(fits)}."
    )


def _columns(config: Config) -> dict[str, int]:
    """Return by name what all devices of a row must divide."""
    return {
        "feed-forward columns": config.intermediate_size,
        "experts": config.experts.count if config.experts else 0,
        "columns of query heads": config.num_heads * config.head_dim,
        "entries of the vocabulary": config.vocab_size,
    }


def _fitting(config: Config, most: int) -> list[int]:
    """Return how many devices may share out a row of the network, up to `most`."""
    heads = config.num_kv_heads
    return [
        number
        for number in range(1, most + 1)
        if not (heads % number and number % heads)
        and not any(size % number for size in _columns(config).values())
    ]


def _list(numbers: list[int]) -> str:
    return " or ".join(map(str, numbers))


def parameter_specs(params: Any) -> Any:
    """Return the partition of every parameter, as a tree like `params`.

    Raises:
      ValueError: the network declares no mesh axes for a parameter of that name.
    """
    axes = parameter_axes()

    def spec(path, _):
        name = path[-1].key
        if name not in axes:
            raise ValueError(
                f"sharding: the network declares no mesh axes for the parameter "
                f"{name!r}; it does for {', '.join(sorted(axes))}."
            )
        return P(*axes[name])

    return jax.tree_util.tree_map_with_path(spec, params)


def parameter_shardings(params: Any, mesh: Mesh) -> Any:
    """Return where every parameter lies, as a tree like `params`."""
    return jax.tree.map(
        lambda spec: NamedSharding(mesh, spec),
        parameter_specs(params),
        is_leaf=lambda x: isinstance(x, P),
    )


def state_specs(state: KVState) -> KVState:
    """Return the partition of every array of a layer's state.

    What a policy remembers is cut along its first axis, the rows, and where it has an
    entry for every slot also along the heads.
    """

    def remembered(x):
        return (
            partition_spec("B K S") if x.shape == state.positions.shape else P("data")
        )

    specs: Any = dict(
        keys=partition_spec("B K S H"),
        values=partition_spec("B K S H"),
        positions=partition_spec("B K S"),
        target=partition_spec("B K"),
        memory=jax.tree.map(remembered, state.memory),
    )
    return dataclasses.replace(state, **specs)


def state_shardings(state: KVState, mesh: Mesh) -> KVState:
    """Return where every array of a layer's state lies, as a state like it."""
    return jax.tree.map(
        lambda spec: NamedSharding(mesh, spec),
        state_specs(state),
        is_leaf=lambda x: isinstance(x, P),
    )


def spread(network: Decoder, params: Any, mesh: Mesh) -> tuple[Decoder, Any]:
    """Lay a network's parameters out over a mesh, each device with its part of them.

    Args:
      network: whose parameters lie on one device.
      params: they; they stay as they are.
      mesh: from `make_mesh`.

    Returns:
      The network that knows the layout, and its parameters.

    Raises:
      ValueError: the mesh does not divide the network, or the network is laid out for
        one already.
    """
    if network.shards != (1, 1):
        raise ValueError(
            f"spread: the network is laid out for {network.shards} devices already; "
            "load it anew with jaxkv.load(name, mesh=mesh)."
        )
    mesh = for_network(mesh, network.config)
    network = network.clone(shards=shards_of(mesh))

    def place(path, leaf, sharding):
        columns = layout.order(network.config, path[-1].key, network.shards)
        return placing.distribute(np.asarray(leaf), sharding, columns)

    return network, jax.tree_util.tree_map_with_path(
        place, params, parameter_shardings(params, mesh)
    )


def random_parameters(
    config: Config, key: jax.Array, dtype: jax.typing.DTypeLike, mesh: Mesh
) -> tuple[Decoder, Any]:
    """Draw parameters over a mesh, each device its own part, for benchmarks.

    Args:
      config: the network.
      key: PRNG key; it is consumed.
      dtype: of every leaf.
      mesh: see `for_network`.

    Returns:
      The network that knows the layout, and its parameters.
    """
    mesh = for_network(mesh, config)
    shapes = parameter_shapes(config)
    keys = jax.random.split(key, len(jax.tree.leaves(shapes)))
    keys = jax.tree.unflatten(jax.tree.structure(shapes), list(keys))

    @functools.cache  # one program serves all layers
    def maker(shape, norm, where):
        def make(key):
            if norm:
                return jnp.ones(shape, dtype)
            return 0.02 * jax.random.normal(key, shape, dtype)

        return jax.jit(make, out_shardings=where)

    def draw(path, leaf, where, key):
        return maker(leaf.shape, path[-1].key.endswith("norm"), where)(key)

    params = jax.tree_util.tree_map_with_path(
        draw, shapes, parameter_shardings(shapes, mesh), keys
    )
    return Decoder(config, shards=shards_of(mesh)), params
