"""One writer of a folder, or of a file, at a time.

A file beside the results (`writer.lock`, or `NAME.lock` for one file) is locked by the
system, which lets go of it when the process ends, however it ends; so the file of a
dead process is taken over. It says whose it is.
NFS locks files between machines. Where a file system locks none, what the file says is
all there is: then a process of this machine is looked for, and one of another machine
is taken to be alive.
"""

import contextlib
import datetime
import json
import os
import platform
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

NAME = "writer.lock"


class FolderInUse(ValueError):
    """Another process writes into a folder, or a file."""


@contextlib.contextmanager
def one_writer(folder: Path, *, name: str | None = None) -> Iterator[None]:
    """Keep all others from writing into a folder.

    A new folder is made; if nothing is in it at the end, it goes again.

    Args:
      folder: where results are written.
      name: of the one file there that is; None for the whole folder.

    Raises:
      FolderInUse: somebody else writes; the message says who.
      OSError: nothing can be written there.
    """
    new = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    what = folder if name is None else folder / name
    path = folder / (NAME if name is None else f"{name}.lock")
    file = _locked(what, path)
    try:
        whose = {
            "host": platform.node(),
            "pid": os.getpid(),
            "since": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "command": shlex.join(sys.orig_argv),
        }
        try:
            os.truncate(file, 0)
            os.write(file, json.dumps(whose).encode())
        except OSError as error:  # a full disk
            raise OSError(error.errno, error.strerror, str(path)) from error
        yield
    finally:
        with contextlib.suppress(OSError):
            path.unlink()
        os.close(file)
        if new:
            with contextlib.suppress(OSError):
                folder.rmdir()


def _locked(what: Path, path: Path) -> int:
    """Return the open file, locked."""
    while True:
        file = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            if not _lock(file) and _lives(_read(file)):
                raise _in_use(what, path, _read(file))
            # Whoever had it has removed it at the end, and we wait for a file that is
            # no longer there; then it is made anew.
            if _is_still(file, path):
                return file
        except BlockingIOError:
            error = _in_use(what, path, _read(file))
            os.close(file)
            raise error from None
        except BaseException:
            os.close(file)
            raise
        os.close(file)


def _lock(file: int) -> bool:
    """Lock an open file, and return whether its file system can.

    Raises:
      BlockingIOError: another process has locked it.
    """
    if fcntl is None:
        return False
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise
    except OSError:  # of the many errors that file systems without locks give
        return False
    return True


def _is_still(file: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file), path.stat())
    except FileNotFoundError:
        return False


def _read(file: int) -> dict[str, Any]:
    """Return what a lock says; nothing if it is empty, as before its first words."""
    try:
        whose = json.loads(os.pread(file, 1 << 16, 0))
    except ValueError:
        return {}
    return whose if isinstance(whose, dict) else {}


def _lives(whose: dict[str, Any]) -> bool:
    """Return whether the process that a lock names may still be at work."""
    if not whose or whose.get("host") != platform.node() or os.name == "nt":
        return bool(whose)  # on Windows `os.kill` would end it
    try:
        os.kill(int(whose.get("pid", 0)), 0)
    except (ProcessLookupError, ValueError, TypeError):
        return False
    except PermissionError:  # it is somebody else's
        return True
    return True


def _in_use(what: Path, path: Path, whose: dict[str, Any]) -> FolderInUse:
    who = f"process {whose.get('pid', '?')} on {whose.get('host', '?')}"
    return FolderInUse(
        f"{what} is being written by {who} since {whose.get('since', '?')} "
        f"({whose.get('command', '?')}); wait for it or write elsewhere. If that "
        f"process has ended, remove {path}."
    )
