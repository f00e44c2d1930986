"""Rows that share the slots of their documents: what of a context nobody copies.

Where the decode policy keeps everything, nothing of a document is overwritten, and all
rows about it attend to the context's own arrays, each beside slots of its own for its
question and output. A row has a copy before it must:

* a decode policy that evicts overwrites tokens of the document for one row alone, and
  so does the ring of a layer with a window;
* rows that several devices share out (`data` of a mesh) would need all documents on
  each of them;
* a kernel that was named may know no shared slots (`pallas_tpu`);
* a conversation goes on behind its first answer, and an engine's rows come and go.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxkv import generation
from jaxkv import state as kv
from jaxkv.attention import Network
from jaxkv.contexts.context import Context
from jaxkv.generation import Running
from jaxkv.options import Options
from jaxkv.runtime.meshes import mesh_of
from jaxkv.runtime.programs import bounded_jit
from jaxkv.state import Shared

Layers = tuple[Shared | None, ...]  # what is shared of each layer


def shared_of(
    context: Context,
    documents: np.ndarray,
    options: Options,
    params: Any,
    *,
    goes_on: bool = False,
) -> Layers:
    """Return what the rows of a batch share of each layer; None is nothing.

    Args:
      context: whose arrays these are, uncopied if so many of its documents are asked
        that the next power of two has all of them.
      documents: int32 `[B]`, which one each row is about.
      options: the decode policy's, and its kernel's name.
      params: of the network, for the mesh that they are laid out over.
      goes_on: whether more follows behind an output; then nothing is shared.
    """
    mesh = mesh_of(params)
    rows_are_spread = mesh is not None and mesh.shape["data"] > 1
    able = getattr(options.decode, "attends_shared", lambda _: False)
    if goes_on or rows_are_spread or not able(options.decode_implementation):
        return (None,) * len(context.cache)
    asked, index, counts = np.unique(documents, return_inverse=True, return_counts=True)
    # Powers of two, so that few programs serve all shares of questions.
    number, most = (1 << (int(x) - 1).bit_length() for x in (len(asked), counts.max()))
    most = min(len(documents), most)
    with jax.transfer_guard("allow"):
        if number < len(context):
            fill = [asked[0]] * (number - len(asked))  # which no row asks about
            context = context.take([*asked, *fill])
        else:
            index = documents
        owner = jnp.asarray(index, jnp.int32)

    def layer(state: kv.KVState) -> Shared | None:
        if state.window is not None:
            return None
        return kv.share(state, owner, most=most)

    return tuple(map(layer, context.cache))


def advance(
    network: Network,
    params: Any,
    running: Running,
    shared: Layers,
    until: jax.Array,
    stop_ids: jax.Array,
    prices: jax.Array | None = None,
    *,
    options: Options,
) -> Running:
    """Do `generation.advance`, where the cache comes without what rows share.

    Arguments are its own, but for these:

    Args:
      running: as there, its cache as `state.apart` leaves it. A compiled program takes
        these buffers for its own.
      shared: of each layer. These buffers stay the context's.
    """
    begun = dataclasses.replace(running, cache=kv.beside(running.cache, shared))
    ended = generation.advance(
        *(network, params, begun, until, stop_ids, prices), options=options
    )
    return dataclasses.replace(ended, cache=kv.apart(ended.cache)[0])


advance_jit = bounded_jit(
    implied=("params",),
    static_argnames=("network", "options"),
    donate_argnames="running",
)(advance)


def advance_any(
    network: Network,
    params: Any,
    running: Running,
    until: Any,
    stop_ids: Any,
    prices: Any,
    *,
    options: Options,
) -> Running:
    """Do `generation.advance` by a compiled program, which takes each row's buffers.

    Arguments are its own; they may be NumPy's arrays.
    """
    own, shared = kv.apart(running.cache)
    rest = until, stop_ids, prices
    if not any(shared):
        return generation.advance_jit(
            *(network, params, running, *rest), options=options
        )
    alone = dataclasses.replace(running, cache=own)
    after = advance_jit(*(network, params, alone, shared, *rest), options=options)
    return dataclasses.replace(after, cache=kv.beside(after.cache, shared))
