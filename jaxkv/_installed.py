"""Fails with advice where this folder is imported from a clone, not as installed.

`kernels/` and `models/` are the packages `jaxkv.kernels` and `jaxkv.models` only once
they are installed, and Python prefers a folder `jaxkv` where it is started.
"""

import importlib.util

if importlib.util.find_spec("jaxkv.kernels") is None:
    raise ImportError(
        "jaxkv was found as a folder of its source, which lacks jaxkv.kernels and "
        "jaxkv.models; start Python in another folder, or install with "
        "`pip install -e .`"
    )
