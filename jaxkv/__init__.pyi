"""The public names of jaxkv, for type checkers, and for `__init__.py`."""

from jaxkv._version import __version__ as __version__
from jaxkv.contexts.context import Context
from jaxkv.contexts.files import load_context, save_context
from jaxkv.evaluation.comparison import Evaluation, evaluate
from jaxkv.forward import decode_step, prefill
from jaxkv.generation import generate_tokens
from jaxkv.language_model import LanguageModel, load, save
from jaxkv.models.checkpoint import CheckpointError
from jaxkv.options import Options
from jaxkv.policies.adakv import AdaKV
from jaxkv.policies.base import DecodePolicy, PrefillPolicy
from jaxkv.policies.chance import Random, RandomDecode
from jaxkv.policies.chunkkv import ChunkKV
from jaxkv.policies.criticalkv import CriticalKV
from jaxkv.policies.dapq import DapQ
from jaxkv.policies.defensivekv import DefensiveKV
from jaxkv.policies.dropkv import DropKV
from jaxkv.policies.expected_attention import ExpectedAttention
from jaxkv.policies.full import Full
from jaxkv.policies.h2o import H2O, H2ODecode
from jaxkv.policies.keydiff import KeyDiff
from jaxkv.policies.knorm import KNorm
from jaxkv.policies.kvzip import KVzip
from jaxkv.policies.lagkv import LagKV
from jaxkv.policies.laq import LAQ
from jaxkv.policies.lazyeviction import LazyEviction
from jaxkv.policies.longflow import LongFlow
from jaxkv.policies.pyramidkv import PyramidKV
from jaxkv.policies.rkv import RKV
from jaxkv.policies.snapkv import SnapKV
from jaxkv.policies.streaming_llm import StreamingLLM
from jaxkv.policies.tova import TOVA, TOVADecode
from jaxkv.policies.triattention import TriAttention
from jaxkv.policies.vatp import VATP
from jaxkv.runtime.compilation_cache import enable_compilation_cache
from jaxkv.sampling import Categorical, Greedy
from jaxkv.serving.engine import Engine
from jaxkv.soundness import LogitsError
from jaxkv.speculation.counts import DraftStats
from jaxkv.speculation.drafters import Aligned, Drafter, PromptLookup, Tree
from jaxkv.speculation.rules import Conditional, Exact, FixedThreshold, TopK, Typical
from jaxkv.state import KVState
from jaxkv.text.completion import Completion, Stats
from jaxkv.text.conversation import Chat
from jaxkv.text.documents import compress
from jaxkv.text.inference import generate
from jaxkv.text.scores import Scores, score

__all__ = [
    "H2O",
    "LAQ",
    "RKV",
    "TOVA",
    "VATP",
    "AdaKV",
    "Aligned",
    "Categorical",
    "Chat",
    "CheckpointError",
    "ChunkKV",
    "Completion",
    "Conditional",
    "Context",
    "CriticalKV",
    "DapQ",
    "DecodePolicy",
    "DefensiveKV",
    "DraftStats",
    "Drafter",
    "DropKV",
    "Engine",
    "Evaluation",
    "Exact",
    "ExpectedAttention",
    "FixedThreshold",
    "Full",
    "Greedy",
    "H2ODecode",
    "KNorm",
    "KVState",
    "KVzip",
    "KeyDiff",
    "LagKV",
    "LanguageModel",
    "LazyEviction",
    "LogitsError",
    "LongFlow",
    "Options",
    "PrefillPolicy",
    "PromptLookup",
    "PyramidKV",
    "Random",
    "RandomDecode",
    "Scores",
    "SnapKV",
    "Stats",
    "StreamingLLM",
    "TOVADecode",
    "TopK",
    "Tree",
    "TriAttention",
    "Typical",
    "__version__",
    "compress",
    "decode_step",
    "enable_compilation_cache",
    "evaluate",
    "generate",
    "generate_tokens",
    "load",
    "load_context",
    "prefill",
    "save",
    "save_context",
    "score",
]
