"""`jaxkv bench decode-attention`: one layer's decode step, version by version."""

from typing import Annotated, Any

import jax
import rich.box
import typer
from rich.table import Table

from jaxkv.bench import attention, clock
from jaxkv.bench.attention import VERSIONS, Shape
from jaxkv.cli import bench_flags, flags, parsing
from jaxkv.cli.bench_flags import Output
from jaxkv.cli.groups import grouped
from jaxkv.cli.terminal import right_aligned
from jaxkv.kernels import decode as decode_kernels
from jaxkv.provenance import provenance


@grouped
def decode_attention(
    *,
    shapes: Annotated[
        str, typer.Option(help="Batch and slots, as in 128x3200, with commas.")
    ] = "128x3200,64x16384,8x3200,1x3200",
    heads: Annotated[int, typer.Option(min=1, help="Query heads.")] = 32,
    kv_heads: Annotated[int, typer.Option(min=1, help="Key/value heads.")] = 8,
    head_dim: Annotated[int, typer.Option(min=2, help="Size of a head.")] = 128,
    dtype: bench_flags.Dtype = None,
    versions: Annotated[
        str | None,
        typer.Option(
            help=f"Of {', '.join(VERSIONS)}, with commas; default: all that run here."
        ),
    ] = None,
    decode_implementation: flags.DecodeImplementation = None,
    layers: Annotated[
        int | None,
        typer.Option(
            min=1, help="Caches gone through; default: more than the L2 cache holds."
        ),
    ] = None,
    repeats: Annotated[int, typer.Option(min=1, help="Timed calls.")] = 9,
    profile: Annotated[
        bool, typer.Option("--profile", help="Add each kernel's time; compiles more.")
    ] = False,
    copy_gib: bench_flags.CopyGib = None,
    output: Output,
) -> None:
    """Time one layer's decode attention on the device, against the bytes it reads.

    Compiled loops go through as many layers' caches as leave the second-level cache,
    and one layer's output is the next one's query. All ratios are of one run.
    """
    sizes = _shapes(
        shapes,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        dtype=bench_flags.random_dtype(dtype).name,
    )
    wanted, skipped = _versions(versions, sizes[0].dtype)
    bandwidth = clock.copy_bandwidth(bench_flags.copy_bytes(copy_gib))
    kernel = decode_implementation or decode_kernels.choose(jax.default_backend())
    result: dict[str, Any] = {"benchmark": "decode-attention"}
    result |= {"decode_implementation": kernel}
    result |= {"dtype": sizes[0].dtype, "heads": heads, "kv_heads": kv_heads}
    result |= {"head_dim": head_dim, "repeats": repeats, "skipped": skipped}
    result |= provenance() | {"copy_bytes_per_second": bandwidth, "rows": []}
    for shape in sizes:
        with output.console.status(f"{shape.batch}x{shape.slots}"):
            row = attention.time_shape(
                shape,
                wanted,
                decode_implementation,
                bandwidth=bandwidth,
                layers=layers,
                repeats=repeats,
                profile=profile,
            )
        result["rows"].append(row)
        output.save(result)  # a crash must not lose what was timed before it
    output.finish(result, _table(result))


def _shapes(text: str, **sizes: Any) -> list[Shape]:
    def read(part: str) -> Shape:
        batch, slots = map(int, part.split("x"))
        return Shape(batch=batch, slots=slots, **sizes)

    takes = "--shapes takes batch and slots such as 128x3200,8x3200;"
    shapes = parsing.values(text, read, takes)
    if min(min(shape.batch, shape.slots) for shape in shapes) < 1:
        raise ValueError(f"--shapes: sizes must be at least 1, got {text!r}.")
    if sizes["heads"] % sizes["kv_heads"]:
        raise ValueError(
            f"--heads {sizes['heads']} must be a multiple of --kv-heads "
            f"{sizes['kv_heads']}."
        )
    return shapes


def _versions(text: str | None, dtype: str) -> tuple[list[str], dict[str, str]]:
    """Return what is timed, and why the rest is not."""
    unknown = "--versions: unknown {!r}; choose from {}."
    wanted = parsing.names(text, VERSIONS, unknown)
    reason = attention.cudnn_unavailable(dtype)
    if not reason or "cudnn" not in wanted:
        return wanted, {}
    if text is not None:
        raise NotImplementedError(f"--versions: cudnn {reason}")
    return [name for name in wanted if name != "cudnn"], {"cudnn": reason}


def _table(result: dict[str, Any]) -> Table:
    notes = [
        f"floor: keys and values at the copy bandwidth of "
        f"{result['copy_bytes_per_second'] / 1e9:.1f} GB/s"
    ]
    notes += [f"{name} {reason}" for name, reason in result["skipped"].items()]
    table = Table(
        *right_aligned(
            "shape", "version", "ms", "quartiles", "x floor", "x cuDNN", "score"
        ),
        title=f"{result['heads']} heads, {result['kv_heads']} KV heads of "
        f"{result['head_dim']}, {result['dtype']}, {result['decode_implementation']}, "
        f"on {result['device']}",
        caption="; ".join(notes),
        box=rich.box.SIMPLE,
    )
    for row in result["rows"]:
        shape = f"{row['batch']}x{row['slots']}"
        table.add_row(shape, "floor", f"{row['floor_ms']:.4f}", "", "1.000", "", "")
        for name, version in row["versions"].items():
            low, high = version["quartiles_ms"]
            score = row.get("score_percent") if name == "longflow" else None
            ratio = version.get("ratio_to_cudnn")
            table.add_row(
                shape,
                name,
                f"{version['ms']:.4f}",
                f"{low:.4f}-{high:.4f}",
                f"{version['ratio_to_floor']:.3f}",
                "-" if ratio is None else f"{ratio:.3f}",
                "" if score is None else f"{score:+.1f} %",
            )
    return table
