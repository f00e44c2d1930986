"""Where and how a measurement was made, and its safe arrival on disk."""

import contextlib
import datetime
import importlib.metadata
import json
import os
import platform
import secrets
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax

PACKAGES = (
    "jaxkv",
    "jax",
    "jaxlib",
    "libtpu",
    "flax",
    "jax-triton",
    "triton",
    "torch",
    "transformers",
)


def provenance() -> dict[str, Any]:
    """Return command, date, commit, device and versions, ready for JSON."""
    device = jax.devices()[0]
    return {
        "command": shlex.join(sys.orig_argv),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": _commit(),
        "device": device.device_kind,
        "platform": device.platform,
        "devices": jax.device_count(),
        "driver": device.client.platform_version,
        "cores": len(os.sched_getaffinity(0))
        if hasattr(os, "sched_getaffinity")
        else os.cpu_count(),
        "machine": platform.machine(),
        "versions": {"python": platform.python_version()}
        | {name: version for name in PACKAGES if (version := _version(name))},
    }


def write_whole(path: str | os.PathLike[str], content: str | bytes) -> None:
    """Write a file in a folder that may be new, text as UTF-8.

    The content goes to a file beside it, onto the disk, and is then renamed. A crash
    before that leaves the old file as it was; no half a file ever bears its name. Of
    two processes that write at once, one wins.

    Raises:
      OSError: it cannot be written; nothing is left but what was there.
    """
    path = Path(path)
    content = content.encode() if isinstance(content, str) else content
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f"{path.name}.{os.getpid()}-{secrets.token_hex(4)}.partial")
    try:
        with open(beside, "xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        beside.replace(path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            beside.unlink()
        if isinstance(error, OSError):  # a full disk does not say where
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise


def write_json(path: str | os.PathLike[str], content: dict[str, Any]) -> None:
    """Write indented JSON by `write_whole`."""
    write_whole(path, json.dumps(content, indent=2) + "\n")


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _commit() -> str | None:
    """Return the commit of the source tree, "+" appended if it has changes."""
    # A wheel installed below somebody else's repository must not report their commit.
    file = Path(__file__)
    if _git(file.parent, "ls-files", "--error-unmatch", file.name) is None:
        return None
    commit = _git(file.parent, "rev-parse", "HEAD")
    if commit is None:
        return None
    return commit + ("+" if _git(file.parent, "status", "--porcelain") else "")


def _git(folder: Path, *arguments: str) -> str | None:
    try:
        run = subprocess.run(
            ["git", "-C", str(folder), *arguments],
            capture_output=True,
            text=True,
            check=False,
        )
    except OSError:
        return None
    return run.stdout.strip() if run.returncode == 0 else None
