"""Digests of everything that decides an output besides the flags.

A path or a name says nothing about what lies there today. The weights are digested as
they lie on the device, all bytes of them: that costs nothing to speak of beside loading
them (about 1 s per GB and core), is the same for every form of a checkpoint that gives
the same parameters, and cannot be out of date, as a cache of files' digests can.
"""

import concurrent.futures
import dataclasses
import hashlib
from collections.abc import Iterable
from typing import Any

import jax
import numpy as np

from jaxkv._version import __version__
from jaxkv.evaluation.questions import Question
from jaxkv.identity import digest, of_tokenizer
from jaxkv.language_model import LanguageModel

_THREADS = 4  # each holds a copy of one tensor where the weights are on a GPU


def of_model(lm: LanguageModel) -> dict[str, Any]:
    """Return what makes one model answer unlike another, by name, ready for YAML."""
    return {
        "jaxkv": __version__,
        "weights": of_weights(lm.params),
        "network": digest(repr(dataclasses.asdict(lm.config))),
        "tokenizer": of_tokenizer(lm.tokenizer),
        "stop_ids": list(lm.stop_ids),
    }


def of_weights(params: Any) -> str:
    """Return the digest of a tree of arrays: their names, shapes, dtypes and bytes."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(params)
    with concurrent.futures.ThreadPoolExecutor(_THREADS) as pool:
        contents = list(pool.map(_of_array, [leaf for _, leaf in leaves]))
    return digest(
        *(
            f"{jax.tree_util.keystr(path)} {leaf.shape} {leaf.dtype} {content}\n"
            for (path, leaf), content in zip(leaves, contents, strict=True)
        )
    )


def _of_array(array: Any) -> str:
    content: Any = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
    return hashlib.sha256(content).hexdigest()


def of_questions(questions: Iterable[Question]) -> str:
    """Return the digest of what is asked, in token ids, and what is wanted."""
    whole = hashlib.sha256()
    for question in questions:
        what = repr((question.index, question.by_lines, question.sample))
        whole.update(what.encode("utf-8", "surrogatepass"))
        whole.update(question.ids.tobytes())
    return whole.hexdigest()[:32]
