"""Text that is shown while its tokens are made.

The text of the first tokens need not be where the text of all tokens begins. A token
may be a part of a character; a run of bytes that is no valid UTF-8 becomes replacement
characters as a whole, even where it was a character before; a decoder may look at the
text's first character, or at any other. What may still change is held back.
"""

import json
from collections.abc import Callable
from typing import Any

_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
# Tokens before a new one that are decoded with it. A part of a character is 3 bytes at
# most, and each token is a byte or more: behind 8 of them it cannot be seen any more
# where decoding has begun.
_TAIL = 8
# What transformers' clean-up of spaces, and any other, would change.
_PROBE = "end . is n't ' it ? I 'm , they 're , we 've . It 's  a b !"


class TextStream:
    """Turns one row's new tokens into text as they come; an `on_tokens` of `generate`.

    The pieces that are written are the whole text, whatever the tokenizer. Of the
    decoders of the tokenizers library, those of byte-level and of byte-fallback
    vocabularies are known; with another one all text comes at the end. Each token is
    decoded a few times, however long the text is.
    """

    def __init__(self, tokenizer: Any, write: Callable[[str], Any]):
        """Write the text through `write`, without special tokens."""
        self._tokenizer = tokenizer
        self._write = write
        self._rules = _Rules.of(tokenizer)
        self._tokens: list[int] = []  # the last ones, special tokens left out
        self._open = 0  # of them, those at the end that a next one may change
        self._done = 0  # of them, those that have been looked at and are closed
        self._seen = 0  # characters of their text that are written
        self._pieces: list[str] = []

    def __call__(self, rows: list[list[int]]) -> None:
        """Take the new tokens of the only row."""
        (new,) = rows
        if self._rules is None:
            return
        for token in new:
            if self._rules.counts(token, behind=self._tokens[-1:]):
                self._tokens.append(token)
                self._open = self._open + 1 if self._rules.is_byte(token) else 0
        closed = len(self._tokens) - self._open
        if closed == self._done:
            return
        text = self._settled(self._tokens[:closed], self._rules)
        self._show(text[self._seen :])
        self._seen, self._done = len(text), closed
        self._forget(self._rules)

    def finish(self, text: str) -> None:
        """Write what is missing of the whole text."""
        shown = "".join(self._pieces)
        if not text.startswith(shown):
            # A decoder that is not what it says; nothing is lost.
            self._write("\n")
            shown = ""
        self._show(text[len(shown) :])

    def _settled(self, tokens: list[int], rules: "_Rules") -> str:
        text = self._tokenizer.decode(tokens, skip_special_tokens=True)
        # The last one may be a character that has begun; those before it are no more.
        return text.removesuffix(_REPLACEMENT) if rules.by_bytes else text

    def _forget(self, rules: "_Rules") -> None:
        """Keep the tokens that the text of the next ones may depend on."""
        # Behind what is taken off, where every other token may have no text.
        length = _TAIL + 2 * rules.cut
        first = self._done - length
        if first <= 0:
            return
        tail = self._settled(self._tokens[first : self._done], rules)
        if tail or not rules.cut:
            del self._tokens[:first]
            self._done, self._seen = length, len(tail)

    def _show(self, text: str) -> None:
        if text:
            self._write(text)
            self._pieces.append(text)


class _Rules:
    """What a decoder of the tokenizers library does where two tokens meet."""

    def __init__(self, backend: Any, *, by_bytes: bool, cut: int):
        self.by_bytes = by_bytes  # all tokens are bytes, put together and decoded
        self.cut = cut  # characters that may be taken off the text's beginning
        self._backend = backend
        added = backend.get_added_tokens_decoder().values()
        self._skipped = {None, *(token.content for token in added if token.special)}
        self._names: dict[int, str | None] = {}

    @classmethod
    def of(cls, tokenizer: Any) -> "_Rules | None":
        """Return the rules of a tokenizer; None where they are not known."""
        backend: Any = getattr(tokenizer, "backend_tokenizer", None)
        if backend is None or backend.decoder is None:
            return None
        probe = backend.encode(_PROBE, add_special_tokens=False).ids
        text = tokenizer.decode(probe, skip_special_tokens=True)
        if text != backend.decode(probe, skip_special_tokens=True):
            return None  # transformers changes what the decoder gives
        steps = _flat(json.loads(backend.decoder.__getstate__()))
        types = [step["type"] for step in steps]
        by_bytes = types == ["ByteLevel"]
        if not (by_bytes or _is_local(steps)):
            return None
        whole = steps[types.index("Fuse") :] if "Fuse" in types else []
        cut = sum(step["start"] for step in whole if step["type"] == "Strip")
        return cls(backend, by_bytes=by_bytes, cut=cut)

    def counts(self, token: int, *, behind: list[int]) -> bool:
        """Return whether decoding uses a token: it neither skips it nor lacks it.

        One without text may end a run of bytes, but a second such one does nothing.
        """
        name = self._name(token)
        if name == "" and (self.by_bytes or [self._name(t) for t in behind] == [""]):
            return False
        return name not in self._skipped

    def is_byte(self, token: int) -> bool:
        """Return whether a token may be a byte of a run that is decoded as a whole."""
        name = self._name(token) or ""
        return not self.by_bytes and name.startswith("<0x") and name.endswith(">")

    def _name(self, token: int) -> str | None:
        if token not in self._names:
            self._names[token] = self._backend.id_to_token(token)
        return self._names[token]


def _flat(decoder: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the steps of a decoder, as its JSON says them."""
    if decoder["type"] == "Sequence":
        return [step for part in decoder["decoders"] for step in _flat(part)]
    return [decoder]


def _is_local(steps: list[dict[str, Any]]) -> bool:
    """Return whether only runs of bytes and the text's beginning look at neighbours."""
    fused = False
    for step in steps:
        match step:
            case {"type": "Replace", "pattern": {"String": str(old)}, "content": new}:
                known = len(old) == 1 and new != "" and "<" not in new
            case {"type": "Strip", "stop": int(stop)}:
                known = not fused or stop == 0
            case {"type": "ByteFallback"}:
                known = not fused
            case {"type": "Fuse"}:
                known = fused = True
            case {"type": "Metaspace"}:
                known = True
            case _:
                known = False
        if not known:
            return False
    return bool(steps)
