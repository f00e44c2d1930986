"""How the columns of fused matrices lie where several devices share them out.

Queries, keys and values are one matrix, and so are gate and up. Cut into equal runs of
columns, the first device would get queries only. So the columns are laid in another
order first, each device's queries, keys and values together, and its gates beside its
ups. Shapes stay as they are, and so does everything that adds up over columns.

`shards` is a pair: over how many devices the heads are spread, and over how many the
feed-forward columns are; (1, 1) is the order of the checkpoint.
"""

import itertools

import numpy as np

from jaxkv.kernels.per_shard import columns_per_row, devices_per_row

Spans = tuple[tuple[int, int], ...]  # first column, and the one behind the last


def check_shards(shards: tuple[int, int]) -> None:
    """Raise ValueError unless the mesh that is set has so many devices a row."""
    here = devices_per_row(), columns_per_row()
    if shards != here:
        raise ValueError(
            f"decoder: the parameters are laid out for heads over {shards[0]} and "
            f"columns over {shards[1]} devices, but the mesh that is set has {here[0]} "
            f"and {here[1]}; lay them out with jaxkv.sharding.spread, and call under "
            "jax.set_mesh of that mesh."
        )


def fused_sizes(config, name: str) -> tuple[int, ...]:
    """Return how many columns each of the matrices has that a parameter fuses.

    Args:
      config: of the network, a `decoder.Config`.
      name: of the parameter, such as "qkv"; one that fuses nothing gives ().
    """
    if name in ("qkv", "qkv_bias"):
        queries, keys = config.num_heads, config.num_kv_heads
        return tuple(heads * config.head_dim for heads in (queries, keys, keys))
    if name == "gate_up":
        return (config.intermediate_size,) * 2
    return ()


def shard_spans(config, name: str, shards: tuple[int, int]) -> tuple[Spans, ...]:
    """Return the columns of each device, as spans of those of the checkpoint.

    Args:
      config: of the network; its heads and columns must divide.
      name: of a parameter that fuses something.
      shards: see the module.
    """
    sizes = fused_sizes(config, name)
    count = shards[1] if name == "gate_up" else shards[0]
    starts = [0, *itertools.accumulate(sizes)]
    return tuple(
        tuple(
            (start + shard * (size // count), start + (shard + 1) * (size // count))
            for start, size in zip(starts, sizes, strict=False)
        )
        for shard in range(count)
    )


def checkpoint_spans(
    config, name: str, shards: tuple[int, int], first: int, last: int
) -> Spans:
    """Return which columns of the checkpoint lie from `first` on, before `last`.

    Args:
      config: of the network.
      name: of a parameter.
      shards: see the module.
      first: column of the laid out parameter.
      last: the one behind the last.
    """
    if not fused_sizes(config, name) or shards == (1, 1):
        return ((first, last),)
    found, begin = [], 0
    for start, stop in itertools.chain(*shard_spans(config, name, shards)):
        low, high = max(first, begin), min(last, begin + stop - start)
        if low < high:
            found.append((start + low - begin, start + high - begin))
        begin += stop - start
    return tuple(found)


def order(config, name: str, shards: tuple[int, int]) -> np.ndarray | None:
    """Return which column of the checkpoint lies in each place, int32 `[F]`.

    None stands for the order of the checkpoint. `numpy.argsort` of it leads back.
    """
    if not fused_sizes(config, name) or shards == (1, 1):
        return None
    spans = itertools.chain(*shard_spans(config, name, shards))
    return np.concatenate([np.arange(*span, dtype=np.int32) for span in spans])
