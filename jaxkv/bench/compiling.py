"""How long programs take to compile."""

import functools
import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxkv import generation
from jaxkv.attention import Network
from jaxkv.models.decoder import parameter_shapes
from jaxkv.options import Options
from jaxkv.runtime.seeds import row_keys


class Seconds(NamedTuple):
    """How long a program took to become runnable.

    Attributes:
      trace: Python to jaxpr to StableHLO.
      compile: StableHLO to machine code, or out of the compilation cache.
    """

    trace: float
    compile: float

    @property
    def total(self) -> float:
        """Both together."""
        return self.trace + self.compile


def compile_stage(stage: Any) -> tuple[Any, Seconds]:
    """Compile what `jit(f).lower` of a thunk returns, and time both halves.

    Args:
      stage: a function of no arguments that lowers.
    """
    begin = time.perf_counter()
    lowered = stage()
    traced = time.perf_counter()
    compiled = lowered.compile()
    end = time.perf_counter()
    return compiled, Seconds(traced - begin, end - traced)


def compile_generate(
    network: Network,
    *,
    dtype: jax.typing.DTypeLike,
    batch: int,
    prompt: int,
    max_out: int,
    options: Options,
) -> dict[str, Seconds]:
    """Compile both halves of `jaxkv.generate` without making a single weight.

    Args:
      network: static.
      dtype: of parameters and cache.
      batch: rows.
      prompt: padded tokens.
      max_out: size of the output buffer.
      options: static.

    Returns:
      Seconds of "start" (prefill and the first token) and "advance" (the loop).
    """
    params = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, dtype),
        parameter_shapes(network.config),
    )
    tokens, lengths, stop_ids, until = (
        jax.ShapeDtypeStruct(shape, jnp.int32)
        for shape in ((batch, prompt), (batch,), (1,), ())
    )
    keys = jax.eval_shape(lambda: row_keys(0, batch))
    start = functools.partial(
        generation.start_jit,
        network,
        options=options,
        slots=options.num_slots(prompt, max_out),
        max_out=max_out,
    )
    arguments = (params, tokens, lengths, keys, stop_ids)
    _, first = compile_stage(
        lambda: generation.start_jit.lower(network, *arguments, **start.keywords)
    )
    state = jax.eval_shape(start, *arguments)
    _, loop = compile_stage(
        lambda: generation.advance_jit.lower(
            network, params, state, until, stop_ids, options=options
        )
    )
    return {"start": first, "advance": loop}
