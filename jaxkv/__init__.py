"""Long-context and long-reasoning inference with a key/value cache of fixed size.

`load` a checkpoint, `generate` text; `prefill`, `decode_step` and `generate_tokens` are
the pure functions underneath. Policies say what the cache keeps.
"""

import jaxkv._installed  # noqa: F401
from jaxkv._version import __version__
from jaxkv.forward import decode_step, prefill
from jaxkv.generation import generate_tokens
from jaxkv.inference import Completion, Stats, generate
from jaxkv.language_model import LanguageModel, load, save
from jaxkv.models.checkpoint import CheckpointError
from jaxkv.options import Options
from jaxkv.policies.base import DecodePolicy, PrefillPolicy
from jaxkv.policies.basic_policies import Full, StreamingLLM
from jaxkv.policies.dapq import LAQ, DapQ
from jaxkv.policies.decode_policies import (
    VATP,
    H2ODecode,
    LongFlow,
    RandomDecode,
    TOVADecode,
)
from jaxkv.policies.expected_attention import ExpectedAttention
from jaxkv.policies.prompt_policies import H2O, TOVA, KNorm, PyramidKV, Random, SnapKV
from jaxkv.policies.rkv import RKV
from jaxkv.sampling import Categorical, Greedy
from jaxkv.speculation.counts import DraftStats
from jaxkv.speculation.drafters import Aligned, Drafter, PromptLookup, Tree
from jaxkv.speculation.rules import Conditional, Exact, FixedThreshold, TopK, Typical
from jaxkv.state import KVState

__all__ = [
    "H2O",
    "LAQ",
    "RKV",
    "TOVA",
    "VATP",
    "Aligned",
    "Categorical",
    "CheckpointError",
    "Completion",
    "Conditional",
    "DapQ",
    "DecodePolicy",
    "DraftStats",
    "Drafter",
    "Exact",
    "ExpectedAttention",
    "FixedThreshold",
    "Full",
    "Greedy",
    "H2ODecode",
    "KNorm",
    "KVState",
    "LanguageModel",
    "LongFlow",
    "Options",
    "PrefillPolicy",
    "PromptLookup",
    "PyramidKV",
    "Random",
    "RandomDecode",
    "SnapKV",
    "Stats",
    "StreamingLLM",
    "TOVADecode",
    "TopK",
    "Tree",
    "Typical",
    "__version__",
    "decode_step",
    "generate",
    "generate_tokens",
    "load",
    "prefill",
    "save",
]
