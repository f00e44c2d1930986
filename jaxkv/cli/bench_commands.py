"""All commands of `jaxkv bench`: each module adds its own to one app."""

from jaxkv.cli import bench_attention, bench_speculate, bench_throughput  # noqa: F401
from jaxkv.cli.bench import app  # noqa: F401
