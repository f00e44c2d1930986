"""The keys of one architecture in a GGUF file."""

import dataclasses
from typing import Any

import numpy as np

from jaxkv.models import checkpoint_values as values


@dataclasses.dataclass(frozen=True)
class Keys:
    """The keys of one architecture, read with their full names in the errors.

    Attributes:
      prefix: of their names.
      raw: values by names without the prefix.
    """

    prefix: str
    raw: dict[str, Any]

    def integer(self, key: str, default: int | None = None) -> int:
        """Return a positive integer; see `checkpoint_values.integer`."""
        return values.integer(
            {self.prefix + key: self.raw.get(key)}, self.prefix + key, default
        )

    def number(self, key: str, default: float | None = None) -> float:
        """Return the shortest decimal that float32 stores as the file's number."""
        value = values.number(
            {self.prefix + key: self.raw.get(key)}, self.prefix + key, default
        )
        return float(str(np.float32(value)))

    def refuse(self, key: str, *supported: Any) -> None:
        """Raise unless a key has a value that is supported, or is not there."""
        if self.raw.get(key, supported[0]) not in supported:
            values.unsupported(self.prefix + key, self.raw[key], *supported)
