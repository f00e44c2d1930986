"""The flags that the commands of `jaxkv bench` share, and what they come to."""

import dataclasses
import json
from pathlib import Path
from typing import Annotated, Any, Literal

import jax
import jax.numpy as jnp
import typer
from rich.console import Console

from jaxkv import registry, sharding
from jaxkv.cli import flags, parsing
from jaxkv.kernels.decode import Implementation
from jaxkv.language_model import NEEDLE, LanguageModel, load
from jaxkv.models.config import Config
from jaxkv.models.decoder import Decoder, random_parameters
from jaxkv.models.public_shapes import SHAPES
from jaxkv.options import Options
from jaxkv.provenance import provenance, write_json
from jaxkv.runtime.meshes import mesh_of

Dtype = Annotated[
    Literal["float32", "bfloat16", "float16"] | None,
    typer.Option(help="Default: the checkpoint's; float32 on CPU, else bfloat16."),
]
CopyGib = Annotated[
    float | None,
    typer.Option(help="Size of the copied array; default 4, on CPU 0.25."),
]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Source:
    """Which network is measured; needle if nothing is said."""

    model: Annotated[
        str | None, typer.Option(help="Checkpoint: needle, a folder, or a hub id.")
    ] = None
    shape: Annotated[
        Literal[tuple(SHAPES)] | None,  # type: ignore[valid-type]
        typer.Option(help="Random weights of this shape instead; downloads nothing."),
    ] = None
    follow_links: flags.FollowLinks = False

    def load(
        self, dtype: str | None, *, mesh: str | None = None
    ) -> tuple[str, Decoder, Any]:
        """Return a name, a network and its parameters, over a mesh if one is named."""
        if self.shape is None:
            lm = self._model(dtype, mesh)
            return lm.name, lm.network, lm.params
        name, config, dtype_ = self.sizes(dtype)
        key = jax.random.key(0)
        if mesh is None:
            return name, Decoder(config), random_parameters(config, key, dtype_)
        found = sharding.resolve(mesh, config)
        return name, *sharding.random_parameters(config, key, dtype_, found)

    def sizes(self, dtype: str | None) -> tuple[str, Config, jnp.dtype]:
        """Return a name, the sizes and the dtype of parameters.

        Raises:
          ValueError: both a checkpoint and a shape are named.
        """
        if self.shape is None:
            lm = self._model(dtype)
            return lm.name, lm.config, lm.dtype
        if self.model is not None:
            raise ValueError(
                "--model and --shape exclude each other; pass one of them."
            )
        return self.shape, SHAPES[self.shape], random_dtype(dtype)

    def _model(self, dtype: str | None, mesh: str | None = None) -> LanguageModel:
        name = self.model or NEEDLE
        return load(name, dtype=dtype, follow_links=self.follow_links, mesh=mesh)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Decoding:
    """How it decodes."""

    budget: flags.Budget = None
    decode: flags.Decode = "full"
    dtype: Dtype = None
    decode_implementation: flags.DecodeImplementation = None

    @property
    def options(self) -> Options:
        """The options of the flags; ValueError if they contradict each other."""
        return options_of(self.budget, self.decode, self.decode_implementation)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Output:
    """Where the result goes."""

    as_json: flags.Json = False
    out: Annotated[
        Path | None, typer.Option(help="Write the same JSON to this file.")
    ] = None

    @property
    def console(self) -> Console:
        """Where progress goes: not to the output that a machine reads."""
        return Console(stderr=self.as_json)

    def save(self, result: dict[str, Any]) -> None:
        """Write the result to the file, if there is one."""
        if self.out is not None:
            write_json(self.out, result)

    def finish(self, result: dict[str, Any], *tables: Any) -> None:
        """Print the result, as JSON or as tables, and save it."""
        if self.as_json:
            print(json.dumps(result, indent=2))
        else:
            for table in tables:
                self.console.print(table)
        self.save(result)


def batches_of(text: str, flag: str = "--batch") -> list[int]:
    """Return the batch sizes of a flag, or raise ValueError."""
    return parsing.numbers(
        text,
        f"{flag} takes numbers such as 1,8,32;",
        outside=f"{flag} must be at least 1,",
    )


def options_of(
    budget: int | None, policy: str, kernel: Implementation | None
) -> Options:
    """Return the options of the flags, or raise ValueError."""
    decode = registry.parse(policy, registry.DECODE, flag="--decode")
    if budget is None and decode.evicts:
        raise ValueError(f"--decode {policy} evicts and needs --budget.")
    options = Options(budget=budget, decode=decode, decode_implementation=kernel)
    options.check()
    return options


def copy_bytes(gib: float | None) -> int:
    """Return the bytes of the array that is copied for the floor."""
    if gib is None:
        gib = 0.25 if jax.default_backend() == "cpu" else 4
    if not 2**-10 <= gib <= 2**10:
        raise ValueError(
            f"--copy-gib must lie between {2**-10:.4f} (a MiB) and {2**10}, got {gib}."
        )
    return int(gib * 2**30)


def random_dtype(dtype: str | None) -> jnp.dtype:
    """Return the dtype of random weights: the flag's, or what suits the device."""
    on_cpu = jax.default_backend() == "cpu"
    return jnp.dtype(dtype or ("float32" if on_cpu else "bfloat16"))


def header_of(
    what: str, name: str, options: Options, dtype: jax.typing.DTypeLike
) -> dict[str, Any]:
    """Return what every result begins with."""
    return (
        {
            "benchmark": what,
            "model": name,
            "dtype": jnp.dtype(dtype).name,
            "budget": options.budget,
        }
        | decoding_of(options)
        | provenance()
    )


def mesh_sizes(params: Any) -> dict[str, int] | None:
    """Return the mesh that parameters are laid out over, ready for JSON, or None."""
    mesh = mesh_of(params)
    return None if mesh is None else dict(mesh.shape)


def decoding_of(options: Options) -> dict[str, str]:
    """Return how a result is decoded: the policy, and the attention that ran."""
    kernel = options.decode_implementation
    return {
        "decode": repr(options.decode),
        "decode_implementation": kernel
        or options.decode.default_implementation(jax.default_backend()),
    }
