"""The header of a GGUF file: its metadata, and where each tensor lies.

Every length is held against the size of the file before anything is read, so a damaged
file is an error that names a key or a tensor. The reader of package `gguf` checks no
length, and takes seconds to make an array of every token of a vocabulary.
"""

import dataclasses
import math
import os
from pathlib import Path
from typing import Any, BinaryIO, Literal

import numpy as np

from jaxkv.models.checkpoint import CheckpointError

_MAGIC = b"GGUF"
_VERSIONS = (2, 3)  # they differ for big-endian machines only
_ALIGNMENT = 32  # where `general.alignment` says nothing
_MOST_DIMENSIONS = 4

# The types of values in the metadata: NumPy's names, and two that are none.
_SCALARS = dict(enumerate("u1 i1 u2 i2 u4 i4 f4 ?".split())) | {
    10: "u8",
    11: "i8",
    12: "f8",
}
_STRING, _ARRAY = 8, 9


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tensor:
    """Where one tensor lies.

    Attributes:
      name: as in the file.
      shape: as NumPy orders it, `[out, in]` of a matrix.
      type: the name of the type of its numbers, such as "Q4_K".
      row_bytes: bytes of one row, along the last axis.
      offset: of its first byte in the file.
    """

    name: str
    shape: tuple[int, ...]
    type: str
    row_bytes: int
    offset: int

    @property
    def rows(self) -> int:
        """How many rows it has; a vector is one."""
        return math.prod(self.shape[:-1])


@dataclasses.dataclass(frozen=True, kw_only=True)
class Header:
    """What a GGUF file says of itself.

    Attributes:
      path: the file.
      metadata: value by key; arrays are lists.
      tensors: by name.
    """

    path: Path
    metadata: dict[str, Any]
    tensors: dict[str, Tensor]

    def error(self, problem: str) -> CheckpointError:
        """Return the error that says what is wrong with the file."""
        return CheckpointError(f"{self.path}: {problem}")


def read_header(path: str | os.PathLike[str]) -> Header:
    """Read and check the header of a GGUF file.

    Args:
      path: the file.

    Returns:
      Metadata and tensors; no number of a tensor has been read.

    Raises:
      CheckpointError: if package `gguf` is missing, or the file cannot be read, is no
        GGUF file, or is damaged; the message names the key or tensor.
    """
    path = Path(path)
    _need_gguf(path)
    try:
        with path.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(0)
            return _Reader(file, size, path).header()
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read ({error.strerror}).") from error


def _need_gguf(path: Path) -> None:
    try:
        import gguf  # noqa: F401
    except ImportError as error:
        raise CheckpointError(
            f"{path}: to read GGUF files, install gguf; pip install 'jaxkv[gguf]'."
        ) from error


class _Reader:
    """Reads a file from front to back, and knows what it is reading."""

    def __init__(self, file: BinaryIO, size: int, path: Path):
        self._file = file
        self._at, self._size = 0, size
        self._path = path
        self._what = "the first bytes"

    def header(self) -> Header:
        self._check_start()
        num_tensors, num_keys = self._number("u8"), self._number("u8")
        metadata: dict[str, Any] = {}
        for index in range(num_keys):
            self._what = f"the name of metadata key {index}"
            key = self._name()
            self._what = f"key {key[:80]!r}"
            if key in metadata:
                raise self._damaged("occurs twice")
            metadata[key] = self._value(self._number("u4"))
        entries: dict[str, tuple[list[int], int, int]] = {}
        for index in range(num_tensors):
            self._what = f"the name of tensor {index}"
            name = self._name()
            self._what = f"the entry of tensor {name[:80]!r}"
            if name in entries:
                raise self._damaged("occurs twice")
            entries[name] = self._entry()
        tensors = self._place(entries, self._alignment(metadata))
        return Header(path=self._path, metadata=metadata, tensors=tensors)

    def _check_start(self) -> None:
        magic = self._take(4)
        if magic != _MAGIC:
            raise CheckpointError(
                f"{self._path} is no GGUF file: it starts with {magic!r}, not with "
                f"{_MAGIC!r}."
            )
        version = self._number("u4")
        if version not in _VERSIONS:
            hint = "; it is big-endian" if version & 0xFFFF == 0 else ""
            raise CheckpointError(
                f"{self._path}: GGUF version {version} is not supported{hint}; "
                f"supported: {', '.join(map(str, _VERSIONS))}, little-endian."
            )

    def _entry(self) -> tuple[list[int], int, int]:
        """Return a tensor's lengths, innermost first, its type and its offset."""
        dimensions = self._number("u4")
        if not 1 <= dimensions <= _MOST_DIMENSIONS:
            raise self._damaged(
                f"has {dimensions} dimensions; 1 to {_MOST_DIMENSIONS} were expected"
            )
        lengths = [self._number("u8") for _ in range(dimensions)]
        return lengths, self._number("u4"), self._number("u8")

    def _alignment(self, metadata: dict[str, Any]) -> int:
        value = metadata.get("general.alignment", _ALIGNMENT)
        if type(value) is not int or value < 1 or value & (value - 1):
            self._what = "key 'general.alignment'"
            raise self._damaged(f"must be a power of two, found {value!r}")
        return value

    def _place(
        self, entries: dict[str, tuple[list[int], int, int]], alignment: int
    ) -> dict[str, Tensor]:
        """Check that the tensors fill the file from here to its end, in order."""
        from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

        start = _padded(self._at, alignment)
        tensors, end = {}, 0  # where the last tensor ends, counted from `start`
        for name, (lengths, number, offset) in entries.items():
            self._what = f"tensor {name[:80]!r}"
            try:
                kind = GGMLQuantizationType(number)
            except ValueError:
                raise self._damaged(
                    f"is of type {number}, which package gguf does not know"
                ) from None
            block, block_bytes = GGML_QUANT_SIZES[kind]
            if lengths[0] % block:
                raise self._damaged(
                    f"has rows of {lengths[0]} numbers, no multiple of the {block} of "
                    f"a block of type {kind.name}"
                )
            expected = _padded(end, alignment)
            if offset != expected:
                raise self._damaged(
                    f"lies at offset {offset}, but by sizes and alignment={alignment} "
                    f"at {expected}"
                )
            shape = tuple(reversed(lengths))
            row_bytes = lengths[0] // block * block_bytes
            tensors[name] = Tensor(
                name=name,
                shape=shape,
                type=kind.name,
                row_bytes=row_bytes,
                offset=start + offset,
            )
            end = offset + tensors[name].rows * row_bytes
            if start + end > self._size:
                raise self._damaged(
                    f"ends at byte {start + end}, but the file has {self._size}; it is "
                    "truncated or damaged"
                )
        if self._size > start + _padded(end, alignment):
            self._what = "the file"
            raise self._damaged(
                f"goes on after its last tensor, which ends at byte {start + end} by "
                f"{alignment=}, to byte {self._size}"
            )
        return tensors

    def _value(self, kind: int) -> Any:
        if kind == _STRING:
            return self._string()
        if kind == _ARRAY:
            inner, length = self._number("u4"), self._number("u8")
            if inner == _STRING:
                return [self._string() for _ in range(length)]
            return self._numbers(inner, length)
        return self._numbers(kind, 1)[0]

    def _numbers(self, kind: int, length: int) -> list[Any]:
        if kind not in _SCALARS:
            raise self._damaged(f"is of type {kind}, which is not supported")
        name = _SCALARS[kind]
        raw = self._take(length * np.dtype(name).itemsize)
        if name == "?":  # any byte but 0 is true
            return [byte != 0 for byte in raw]
        return np.frombuffer(raw, f"<{name}").tolist()

    def _number(self, kind: Literal["u4", "u8"]) -> int:
        # A vocabulary is a hundred thousand of these, for which NumPy is slow.
        return int.from_bytes(self._take(4 if kind == "u4" else 8), "little")

    def _name(self) -> str:
        name = self._string()
        if not name.isprintable():  # it would break the lines that name it
            raise self._damaged(f"is {name[:80]!r}")
        return name

    def _string(self) -> str:
        try:
            return self._take(self._number("u8")).decode("utf-8")
        except UnicodeDecodeError:
            raise self._damaged("is not UTF-8 text") from None

    def _take(self, length: int) -> bytes:
        left = self._size - self._at
        if length > left:
            raise self._damaged(
                f"takes {length} bytes, but {left} are left of the file's "
                f"{self._size}; it is truncated or damaged"
            )
        self._at += length
        return self._file.read(length)

    def _damaged(self, problem: str) -> CheckpointError:
        return CheckpointError(
            f"{self._path}: {self._what} {problem}; fetch the file again."
        )


def _padded(size: int, alignment: int) -> int:
    return -(-size // alignment) * alignment
