"""Keeps what transformers says to users of transformers from users of jaxkv."""

import contextlib
import importlib
import logging
import sys
import threading
from collections.abc import Iterator
from types import ModuleType

# There is one log level.
_ALONE = threading.RLock()


@contextlib.contextmanager
def quiet_transformers() -> Iterator[ModuleType]:
    """Import transformers and drop its warnings within; errors are let through.

    It warns that torch is missing, which jaxkv does not need, and about the classes
    of tokenizers, which jaxkv checks itself. Its log level is as before afterwards.
    One thread at a time is within.

    Yields:
      The package `transformers`.
    """
    logger = logging.getLogger("transformers")

    def is_error(record: logging.LogRecord) -> bool:
        return record.levelno >= logging.ERROR

    with _ALONE:
        # The import sets the level, so that only a filter can hold back what it says.
        logger.addFilter(is_error)
        try:
            importlib.import_module("transformers")
            # It puts another module in its place while it is imported. A thread that
            # waits for one which imports it is handed the first.
            transformers = sys.modules["transformers"]
            level = logger.level
            logger.setLevel(max(level, logging.ERROR))  # of the loggers below it, too
            try:
                yield transformers
            finally:
                logger.setLevel(level)
        finally:
            logger.removeFilter(is_error)
