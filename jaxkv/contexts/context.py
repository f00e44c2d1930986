"""Documents that were read once and cut to a budget, to be asked any number of times.

`read_documents` fills a `Context`; `asking.py` puts questions behind it. It is a pure
function of arrays, and may be used inside a larger jitted program; the door is
`jaxkv.compress`.

Axis letters: `D` documents, `P` padded document, `L` layers, `V` vocabulary.
"""

import dataclasses
import operator
from collections.abc import Mapping, Sequence, Set
from typing import Any, NamedTuple, Self

import jax
import jax.numpy as jnp
import numpy as np

from jaxkv import soundness
from jaxkv import state as kv
from jaxkv.attention import Network, begin_layers
from jaxkv.expected import brief, check_kind
from jaxkv.forward import logits_at_end, read
from jaxkv.identity import Identity
from jaxkv.options import Options
from jaxkv.policies.base import DecodePolicy
from jaxkv.runtime.programs import bounded_jit
from jaxkv.speculation.likeliest import likeliest_tokens
from jaxkv.state import Cache


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Context:
    """What is left of documents; using it changes nothing.

    Attributes:
      cache: one state per layer, a row per document. No decode policy has seen it.
      tokens: int32 `[D, P]`, the documents, right-padded.
      lengths: int32 `[D]`, tokens of them, and so the position that follows each.
      kept: int32 `[D]`, tokens that the layer and head with the most of them holds;
        of layers without a window, if there are any.
      logits: float32 `[D, V]`, of the token after each document.
      likeliest: int32 `[D, P, 3]`, see `speculation.matching.Context`; None if no
        drafter has asked for it.
      identity: of the model that has read them.
      policy: the prefill policy as text, for reports.
      chat: whether the documents begin a user's message of the chat template.
    """

    cache: Cache
    tokens: jax.Array
    lengths: jax.Array
    kept: jax.Array
    logits: jax.Array
    likeliest: jax.Array | None
    identity: Identity = dataclasses.field(metadata=dict(static=True))
    policy: str = dataclasses.field(metadata=dict(static=True))
    chat: bool = dataclasses.field(default=False, metadata=dict(static=True))

    def __len__(self) -> int:
        """Return the number of documents."""
        return len(self.tokens)

    def __repr__(self) -> str:
        """Return a line of sizes, and no arrays."""
        seen, kept = (jax.device_get(x).tolist() for x in (self.lengths, self.kept))
        return (
            f"Context({len(self)} document{'s' * (len(self) != 1)} read by "
            f"{self.identity.name}: {_few(kept)} of {_few(seen)} tokens kept by "
            f"{self.policy}, {kv.num_bytes(self.cache) / 1e6:,.1f} MB "
            f"{self.identity.dtype})"
        )

    def take(self, documents: Sequence[int]) -> Self:
        """Return a context of these documents, by their index; some may come twice.

        Raises:
          ValueError: there is none, or none of such an index.
        """
        if isinstance(documents, str | Mapping | Set) or not _is_list(documents):
            raise ValueError(
                "Context.take: documents= takes a list of indices, such as [0], got "
                f"{brief(documents)}."
            )
        rows = jnp.asarray([self._row(document) for document in documents], jnp.int32)
        if not len(rows):
            raise ValueError("Context: got no documents to take; name at least one.")
        return jax.tree.map(lambda x: x[rows], self)

    def join(self, *others: Self) -> Self:
        """Return a context of these documents and those of others, behind them.

        Raises:
          ValueError: another model has read them, or a chat template is in some; or one
            of them is no context.
        """
        for other in others:
            check_context("Context.join", "others", other)
        together = (self, *others)
        for other in others:
            self.identity.check(other.identity)
            if other.chat != self.chat:
                raise ValueError(
                    "Context: documents of a chat template cannot be joined with "
                    "others; compress all of them with chat=True, or none."
                )
        width = max(context.tokens.shape[1] for context in together)
        slots = tuple(
            max(state.slots for state in layer)
            for layer in zip(*(context.cache for context in together), strict=True)
        )
        noted = all(context.likeliest is not None for context in together)
        policies = dict.fromkeys(context.policy for context in together)
        rows = [_padded(c, width, slots, noted, "; ".join(policies)) for c in together]
        return jax.tree.map(lambda *x: jnp.concatenate(x), *rows)

    def kept_positions(self, document: int = 0) -> tuple[tuple[np.ndarray, ...], ...]:
        """Return which tokens of a document are left: in order, by layer and head."""
        row = self._row(document)
        layers = jax.device_get([state.positions[row] for state in self.cache])
        return tuple(
            tuple(np.sort(head[head >= 0]) for head in layer) for layer in layers
        )

    def _row(self, document: Any) -> int:
        """Return the index of a document; for a wrong one, JAX would take another."""
        whole = hasattr(document, "__index__") and not isinstance(document, bool)
        whole = whole and not getattr(document, "ndim", 0)
        if not whole or not 0 <= operator.index(document) < len(self):
            raise ValueError(
                f"Context: a document is a whole number from 0 to {len(self) - 1}, got "
                f"{brief(document)}."
            )
        return operator.index(document)


def check_context(call: str, name: str, value: Any) -> None:
    """Raise ValueError for what is no context.

    Args:
      call: the function that was called.
      name: of its argument.
      value: what was given.
    """
    check_kind(call, name, value, Context, "what jaxkv.compress returns")


def _is_list(values: Any) -> bool:
    return hasattr(values, "__iter__") and getattr(values, "ndim", 1) > 0


def _padded(
    context: Context, width: int, slots: tuple[int, ...], noted: bool, policy: str
) -> Context:
    """Return a context whose arrays go with those of others, but for their rows."""
    room = ((0, 0), (0, width - context.tokens.shape[1]))
    likeliest = None
    if noted and context.likeliest is not None:
        likeliest = jnp.pad(context.likeliest, (*room, (0, 0)))
    return dataclasses.replace(
        context,
        cache=tuple(map(kv.resize, context.cache, slots)),
        tokens=jnp.pad(context.tokens, room),
        likeliest=likeliest,
        policy=policy,
    )


class Documents(NamedTuple):
    """What comes of reading documents.

    Attributes:
      cache: one state per layer.
      logits: float32 `[D, V]`, of the token after each document.
      likeliest: int32 `[D, P, 3]` or None, as in `Context`.
      kept: int32 `[L, D]`, tokens that the head with the most of them holds.
      spoilt: bool `[L, 2, D]`, what is wrong with what is kept; see
        `soundness.spoilt_prompts`.
    """

    cache: Cache
    logits: jax.Array
    likeliest: jax.Array | None
    kept: jax.Array
    spoilt: jax.Array


def read_documents(
    network: Network,
    params: Any,
    tokens: jax.Array,
    lengths: jax.Array,
    asked: jax.Array,
    keep: jax.Array | None,
    *,
    options: Options,
    slots: tuple[int, ...],
    likeliest: bool = False,
) -> Documents:
    """Read documents, and keep of them what the prefill policy keeps.

    Args:
      network: static.
      params: its parameters.
      tokens: int32 `[D, P]`, documents and the question behind each, right-padded.
      lengths: int32 `[D]`, tokens of the documents.
      asked: int32 `[D]`, tokens of the questions. They are looked at by the policy, as
        the end of a prompt is, and are not kept.
      keep: int32 `[D]`, tokens of each document that may be kept; None is all.
      options: static; `budget` bounds `keep`, and `decode` keeps everything.
      slots: of each layer's state, static.
      likeliest: static; whether to look for the tokens held likeliest.
    """
    hidden, cache = read(
        *(network, params, tokens, lengths + asked),
        options=options,
        slots=slots,
        keep=keep,
        held=lengths,
    )
    found = None
    if likeliest:
        found = likeliest_tokens(network, params, hidden[:, : tokens.shape[1]])
    logits = logits_at_end(network, params, hidden, lengths)
    return counted(cache, lengths, logits, found)


def read_copies(
    network: Network,
    params: Any,
    tokens: jax.Array,
    lengths: jax.Array,
    asked: jax.Array,
    keep: jax.Array,
    *,
    options: Options,
    slots: tuple[int, ...],
) -> Documents:
    """Read each document once, and cut it to as many budgets as it has.

    Arguments are those of `read_documents`, but for this one:

    Args:
      keep: int32 `[C, D]`.

    Returns:
      What comes of `C * D` documents: all with their first budget, then all of them
      with the second, and so on.
    """

    def cut(keep):
        return read_documents(
            *(network, params, tokens, lengths, asked, keep),
            options=options,
            slots=slots,
        )

    # What does not depend on the budget is not repeated: all but the evictions, and
    # the sketches of a policy that does so.
    found = jax.vmap(cut)(keep)
    cache, logits = jax.tree.map(
        lambda x: x.reshape(-1, *x.shape[2:]), (found.cache, found.logits)
    )
    return counted(cache, jnp.tile(lengths, len(keep)), logits)


def counted(
    cache: Cache,
    lengths: jax.Array,
    logits: jax.Array,
    likeliest: jax.Array | None = None,
) -> Documents:
    """Return what has been read, with what is counted of it."""
    spoilt = [jnp.stack(soundness.spoilt_prompts(s, lengths)) for s in cache]
    return Documents(
        cache=cache,
        logits=logits,
        likeliest=likeliest,
        kept=jnp.stack([kv.occupancy(state).max(-1) for state in cache]),
        spoilt=jnp.stack(spoilt),
    )


def most_kept(found: Documents) -> jax.Array:
    """Return `Context.kept` of what has been read."""
    chosen = [i for i, state in enumerate(found.cache) if state.window is None]
    kept = found.kept[np.array(chosen)] if chosen else found.kept
    return kept.max(0)


def drawn(
    context: Context,
    documents: jax.Array,
    slots: tuple[int, ...],
    shared: Sequence[kv.Shared | None] | None = None,
) -> Context:
    """Return the context of these documents, in states of these sizes.

    Args:
      context: of all documents.
      documents: int32 `[B]`.
      slots: of each layer's state, static. Rows that share a document have their own
        behind it.
      shared: of each layer, if rows do not copy the document; see `sharing`.
    """

    def layer(state: kv.KVState, size: int, found: kv.Shared | None) -> kv.KVState:
        if found is None:
            return kv.resize(jax.tree.map(lambda x: x[documents], state), size)
        empty = kv.init(
            batch=len(documents),
            kv_heads=state.keys.shape[1],
            slots=size,
            head_dim=state.keys.shape[3],
            dtype=state.keys.dtype,
        )
        return dataclasses.replace(empty, shared=found)

    each = zip(context.cache, slots, shared or (None,) * len(slots), strict=True)
    rest = dataclasses.replace(context, cache=())
    chosen = jax.tree.map(lambda x: x[documents], rest)
    return dataclasses.replace(chosen, cache=tuple(layer(*one) for one in each))


def begun(
    policy: DecodePolicy, network: Network, params: Any, cache: Cache, lengths
) -> Cache:
    """Return the cache as a policy meets it behind whole prompts of these lengths."""
    aimed = tuple(dataclasses.replace(s, target=kv.first_free(s)) for s in cache)
    return begin_layers(policy, network, params, aimed, lengths)


_PARAMS = ("params",)
read_copies_jit = bounded_jit(
    implied=_PARAMS, static_argnames=("network", "options", "slots")
)(read_copies)
read_documents_jit = bounded_jit(
    implied=_PARAMS, static_argnames=("network", "options", "slots", "likeliest")
)(read_documents)


def _few(numbers: Sequence[int]) -> str:
    """Return numbers as text, the first ones if they are many."""
    shown = ", ".join(f"{number:,}" for number in numbers[:3])
    return f"{shown}, ..." if len(numbers) > 3 else shown
