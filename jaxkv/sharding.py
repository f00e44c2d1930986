"""Weights and cache over several devices: which axis of which array is cut how.

```python
mesh = sharding.make_mesh(data=2, model=4)  # rows over 2, heads over 4
with jax.set_mesh(mesh):
    lm = dataclasses.replace(lm, params=sharding.shard_parameters(lm.params, mesh))
    jaxkv.generate(lm, prompts)
```

Tensor parallelism as usual: the matrices that make heads and feed-forward columns are
cut along their columns, those that lead back along their rows, and XLA adds the parts
up. The cache is cut along rows of the batch (`data`) and key/value heads (`model`);
attention runs on each device's own part (`jaxkv.kernels.per_shard`).

Supported: every attention implementation and every policy. Where the heads of a row
lie on several devices and share a victim, LongFlow's kernels leave each slot's
importance to be exchanged, and on GPUs read the keys once more. The sizes must divide:
rows by `data`; key/value heads, feed-forward columns and vocabulary by `model`. Fused
projections are cut without regard to what was fused, so XLA moves activations (never
weights) between devices where a projection is split up again.
Not supported: cutting the slots or the layers, and heads shared by several devices.
"""

import dataclasses
from typing import Any

import jax
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxkv.kernels.per_shard import partition_spec
from jaxkv.models.config import Config
from jaxkv.models.decoder import parameter_axes
from jaxkv.state import KVState


def make_mesh(*, data: int = 1, model: int = 1, devices: Any = None) -> Mesh:
    """Return a mesh of `data` x `model` devices.

    Args:
      data: devices that share out the rows of a batch.
      model: devices that share out the heads of one row.
      devices: to use; None takes the default ones.
    """
    return jax.make_mesh(
        (data, model),
        ("data", "model"),
        axis_types=(AxisType.Auto,) * 2,  # XLA finds the shardings in between
        devices=devices,
    )


def check(config: Config, mesh: Mesh, *, batch: int) -> None:
    """Raise ValueError if the mesh does not divide the network and the batch.

    Args:
      config: of the network.
      mesh: from `make_mesh`.
      batch: rows.
    """
    for what, size, axis in (
        ("rows", batch, "data"),
        ("key/value heads", config.num_kv_heads, "model"),
        ("feed-forward columns", config.intermediate_size, "model"),
        ("entries of the vocabulary", config.vocab_size, "model"),
    ):
        if size % mesh.shape[axis]:
            raise ValueError(
                f"sharding: {size} {what} do not divide over {mesh.shape[axis]} "
                f"devices of the mesh axis {axis!r}; use another mesh."
            )


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


def shard_parameters(params: Any, mesh: Mesh) -> Any:
    """Return the parameters, each device with its part of them."""
    return jax.device_put(
        params,
        jax.tree.map(
            lambda spec: NamedSharding(mesh, spec),
            parameter_specs(params),
            is_leaf=lambda x: isinstance(x, P),
        ),
    )
