"""Questions about one document: its slots shared, against a copy for each question.

    python benchmarks/shared_context.py shared.json  # on a GPU
    python benchmarks/shared_context.py small.json --shape qwen3-0.6b --layers 2 \
      --lengths 256 --questions 4 --dtype float32 --steps 3  # on a CPU

Weights and slots are random, and all of the document's slots are occupied, as are 32 of
a question's own 128. A step is the whole network's, in a compiled loop that writes the
same slot again and again; reading is that of 32 tokens of each question. Bytes are
those of keys, values and bookkeeping; a copy that does not fit beside the weights is
not timed. First the operation is checked: against the reference, and rows in company
against rows alone, bit for bit where that is promised.
"""

import dataclasses
import functools
import statistics
import time
from pathlib import Path
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np
import typer

from jaxkv import Options
from jaxkv import state as kv
from jaxkv.bench.clock import device_memory, time_loop
from jaxkv.bench.decode_step import full_cache
from jaxkv.forward import decode_step, read_behind
from jaxkv.kernels import shared_slots
from jaxkv.kernels.cache import SharedSlots, Slots, Token
from jaxkv.models.decoder import Decoder, random_parameters
from jaxkv.models.public_shapes import SHAPES
from jaxkv.provenance import provenance, write_json
from jaxkv.runtime.seeds import key_of

OWN, ASKED = 128, 32  # slots of a question, and its tokens
# rows, heads, KV heads, documents, slots of each, head size, dtype
CHECKS = [
    (64, 16, 8, 1, 2048, 128, "bfloat16"),
    (10, 9, 3, 3, 777, 64, "bfloat16"),
    (5, 8, 4, 2, 300, 256, "float16"),
    (3, 4, 2, 1, 100, 64, "float32"),
]
TOLERANCE = {"float32": 5e-6, "bfloat16": 1.6e-2, "float16": 2e-3}


def check(rows, heads, kv_heads, documents, slots, head_dim, dtype) -> dict[str, Any]:
    """Compare the operation with the reference, and rows with rows alone."""
    rng = np.random.default_rng(0)

    def draw(*shape):
        return jnp.asarray(rng.standard_normal(shape, np.float32), dtype)

    def held(batch, size, most):
        count = rng.integers(1, most, (batch, kv_heads, 1))
        order = np.broadcast_to(np.arange(size), (batch, kv_heads, size))
        positions = np.where(order < count, order, -1).astype(np.int32)
        nan = jnp.asarray(np.where(positions < 0, np.nan, 0)[..., None], dtype)
        keys, values = (draw(batch, kv_heads, size, head_dim) + nan for _ in "kv")
        return keys, values, jnp.asarray(positions)

    owner = jnp.asarray(rng.integers(0, documents, rows), jnp.int32)
    shared = SharedSlots._make((*held(documents, slots, slots), owner))
    own = held(rows, OWN, ASKED)
    target = jnp.asarray((own[2] >= 0).sum(-1), jnp.int32)
    query = draw(rows, heads, head_dim)
    position = jnp.full(rows, ASKED, jnp.int32)
    new = Token(
        draw(rows, kv_heads, head_dim), draw(rows, kv_heads, head_dim), position
    )
    held_by_rows = query, new, Slots._make((*own, target, None))

    def run(chosen, how):
        arrays = jax.tree.map(lambda x: x[chosen], held_by_rows)
        some = shared._replace(owner=owner[chosen])
        operation = functools.partial(
            shared_slots.attend_from_token,
            scale=head_dim**-0.5,
            most=len(chosen),
            implementation=how,
        )
        return np.asarray(jax.jit(operation)(*arrays, some)[0], np.float32)

    everyone = np.arange(rows)
    got, want = run(everyone, None), run(everyone, "reference")
    error = (np.abs(got - want) / np.maximum(1, np.abs(want))).max()
    ends = [0, rows - 1]
    alone = np.concatenate([run(everyone[row : row + 1], None) for row in ends])
    promised = jnp.dtype(dtype).itemsize == 2 and jax.default_backend() == "gpu"
    return dict(
        case=f"{rows} {heads}/{kv_heads} {documents}x{slots} {head_dim} {dtype}",
        error=float(error),
        close=bool(error <= TOLERANCE[dtype]),
        alone=bool((alone == got[ends]).all()) if promised else None,
    )


def states(config, *, rows: int, slots: int, dtype: str, shared: bool) -> kv.Cache:
    """Return what `rows` questions about a document of so many slots hold."""
    documents = full_cache(config, batch=1, slots=slots, dtype=dtype, key=key_of(1))
    own = full_cache(config, batch=rows, slots=OWN, dtype=dtype, key=key_of(2))

    def asked(state: kv.KVState) -> kv.KVState:
        order = jnp.arange(OWN, dtype=jnp.int32)[None, None]
        positions = jnp.where(order < ASKED, slots + state.positions, kv.FREE)
        target = jnp.full_like(state.target, ASKED)
        return dataclasses.replace(state, positions=positions, target=target)

    def owner() -> jax.Array:  # of each layer its own, since buffers are taken
        return jnp.zeros(rows, jnp.int32)

    whole = kv.beside(
        tuple(map(asked, own)),
        [kv.share(state, owner(), most=rows) for state in documents],
    )
    if shared:
        return whole
    copied = jax.jit(lambda cache: tuple(map(kv.own_all, cache)))
    return jax.block_until_ready(copied(whole))


def measure(
    network: Decoder, params: Any, cache: kv.Cache, *, position: int, steps: int
) -> tuple[Any, dict[str, float]]:
    """Time a step, and the reading of questions, from states that stay as they are.

    Buffers are taken; the parameters come back.
    """
    rows = cache[0].target.shape[0]
    at = jnp.full(rows, position, jnp.int32)

    def rewound(after: kv.Cache, before: kv.Cache) -> kv.Cache:
        pairs = zip(after, before, strict=True)
        return tuple(
            dataclasses.replace(new, target=old.target, positions=old.positions)
            for new, old in pairs
        )

    def step(state):
        params, token, cache = state
        logits, after = decode_step(
            network, params, token, at, cache, options=Options()
        )
        return params, logits.argmax(-1).astype(jnp.int32), rewound(after, cache)

    def read(state):
        params, token, cache = state
        tokens = jnp.broadcast_to(token[:, None], (rows, ASKED))
        counts = jnp.full(rows, ASKED, jnp.int32)
        hidden, after = read_behind(network, params, tokens, counts, at, cache)
        token = token + (hidden[:, -1, 0] > 1e9).astype(jnp.int32)
        return params, token, rewound(after, cache)

    state = (params, jnp.zeros(rows, jnp.int32), cache)
    seconds, state, temporaries = time_loop(step, state, steps, 5)
    reading, (params, _, _), more = time_loop(read, state, 2, 3)
    return params, dict(
        step_ms=1e3 * statistics.median(seconds),
        reading_ms=1e3 * statistics.median(reading),
        step_temporaries_mb=temporaries / 1e6,
        reading_temporaries_mb=more / 1e6,
    )


def main(
    out: Path,
    shape: str = "qwen3-1.7b",
    dtype: str = "bfloat16",
    lengths: Annotated[
        str, typer.Option(help="Tokens of the document.")
    ] = "4096,16384",
    questions: Annotated[str, typer.Option(help="About it.")] = "64,16,1",
    layers: int | None = None,
    steps: int = 20,
    seconds: float = 55.0,
) -> None:
    """Check, then time as many cases as there is time for."""
    deadline = time.perf_counter() + seconds
    report: dict[str, Any] = dict(provenance=provenance(), checks=[], timings=[])
    for case in CHECKS:
        report["checks"].append(check(*case))
        print(*report["checks"][-1].values(), flush=True)
    config = SHAPES[shape]
    if layers is not None:
        config = dataclasses.replace(config, num_layers=layers)
    network = Decoder(config)
    params = random_parameters(config, key_of(0), dtype)
    weights = sum(x.nbytes for x in jax.tree.leaves(params))
    limit = device_memory("bytes_limit") or 2**34
    print("questions, document, share kept, shared, MB; ms of a step and of reading")
    for rows, length, share in [
        (rows, length, share)
        for rows in map(int, questions.split(","))
        for length in map(int, lengths.split(","))
        for share in (1.0, 0.1)
    ]:
        for shared in (True, False):
            if time.perf_counter() > deadline:
                continue
            slots = max(1, round(share * length))
            sizes: dict[str, Any] = dict(rows=rows, slots=slots, dtype=dtype)
            make = functools.partial(states, config, **sizes, shared=shared)
            taken = kv.num_bytes(jax.eval_shape(make))
            record: dict[str, Any] = dict(
                questions=rows,
                document=length,
                kept=share,
                shared=shared,
                cache_mb=taken / 1e6,
            )
            if 1.25 * taken + 2 * weights < limit:
                params, found = measure(
                    network, params, make(), position=length + ASKED, steps=steps
                )
                record |= found
            report["timings"].append(record)
            print(*(f"{x:.6g}" for x in record.values()), flush=True)
            write_json(out, report)
    if any(x is False for record in report["checks"] for x in record.values()):
        raise SystemExit("FAILED")


if __name__ == "__main__":
    typer.run(main)
