"""Temporaries of generation on TPUs that are not there, from their real compiler.

It comes with libtpu (`pip install "jaxkv[tpu]"`). Nothing is run, and no array is made.
Two layers are compiled for all: a layer's temporaries make room for the next one's.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.topologies import get_topology_desc
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from jaxkv import generation, sharding
from jaxkv.models.config import Config
from jaxkv.models.decoder import Decoder, parameter_shapes
from jaxkv.options import Options
from jaxkv.runtime.seeds import row_keys

_LAYERS = 2


def temporaries(
    config: Config,
    topology: str,
    mesh: AbstractMesh,
    options: Options,
    *,
    batch: int,
    prompt: int,
    new: int,
    dtype: str,
) -> int:
    """Return the bytes of temporaries of one device, the larger of both programs'.

    Args:
      config: the network.
      topology: of the devices, as "v5e:2x2"; JAX knows which there are.
      mesh: from `fit.mesh_for`.
      options: the policies, and the budget.
      batch: rows.
      prompt: tokens of each row.
      new: tokens of each output.
      dtype: of weights and cache.

    Raises:
      ValueError: libtpu is not installed, or knows no such topology.
    """
    try:
        devices = get_topology_desc(platform="tpu", topology_name=topology).devices
    except Exception as error:  # of several classes, with and without libtpu
        said = " ".join(str(error).split())[:200]
        raise ValueError(
            f"plan: --compile needs libtpu, and a topology that it knows, got "
            f'{topology!r} ({said}); pip install "jaxkv[tpu]", or leave --compile out.'
        ) from error
    layers = min(_LAYERS, config.num_layers)
    config = dataclasses.replace(config, num_layers=layers, kinds=config.kinds[:layers])
    real = Mesh(
        np.array(devices).reshape(mesh.axis_sizes),
        mesh.axis_names,
        axis_types=(AxisType.Auto,) * len(mesh.axis_names),
    )
    network = Decoder(config, shards=sharding.shards_of(real))
    shapes = parameter_shapes(config)
    params = jax.tree.map(
        lambda x, where: jax.ShapeDtypeStruct(x.shape, dtype, sharding=where),
        shapes,
        sharding.parameter_shardings(shapes, real),
    )

    def whole(shape: Any) -> jax.ShapeDtypeStruct:
        where = NamedSharding(real, PartitionSpec())
        return jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=where)

    integers = [(batch, prompt), (batch,), (1,), ()]
    tokens, lengths, stops, until = (
        whole(jax.ShapeDtypeStruct(shape, jnp.int32)) for shape in integers
    )
    keys = whole(jax.eval_shape(lambda: row_keys(0, batch)))
    options_of_start: dict[str, Any] = dict(
        options=options,
        slots=options.layer_slots(prompt, new, config.windows),
        max_out=new,
    )
    first = generation.start_jit.lower(
        *(network, params, tokens, lengths, keys, stops), **options_of_start
    )
    prefill = first.compile()
    state = jax.tree.map(
        lambda x, where: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where),
        *(first.out_info, prefill.output_shardings),
    )
    second = generation.advance_jit.lower(
        *(network, params, state, until, stops), options=options
    )
    memory: list[Any] = [
        program.memory_analysis() for program in (prefill, second.compile())
    ]
    return max(found.temp_size_in_bytes for found in memory)
