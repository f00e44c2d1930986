"""Finds `kernels/` and `models/` where this folder is imported from a clone.

They are the packages `jaxkv.kernels` and `jaxkv.models` once they are installed. In a
clone they lie beside this folder, and Python prefers a clone that it is started in to
what is installed.
"""

import importlib.util
import sys
from pathlib import Path

if importlib.util.find_spec("jaxkv.kernels") is None:
    _root = Path(__file__).parents[1]
    if not (_root / "kernels").is_dir():
        raise ImportError(
            f"{_root} holds a folder jaxkv of sources without kernels and models "
            "beside it; start Python in another folder, or in a whole clone."
        )
    sys.modules["jaxkv"].__path__.append(str(_root))
