"""Reads prompts under kvpress' presses, and decodes: a part of `kvpress_scores.py`.

A press acts behind each layer of a prompt's reading and changes nothing of the reading
itself, so that all of them act on one. What each returns is decoded from by itself, a
block of prompts at a time. Where a press masks tokens instead of dropping them, what
fills up shorter prompts is masked by kvpress in the same way.
"""

import contextlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import kvpress
import numpy as np
import torch
from kvpress.presses import kvzip_press
from transformers import AutoTokenizer, DynamicCache


class Cut(NamedTuple):
    """What a press leaves of one prompt: of each layer, keys, values and a mask."""

    keys: list[torch.Tensor]
    values: list[torch.Tensor]
    masks: list[Any]
    whole: list[torch.Tensor]
    first: int
    length: int

    def kept(self, longest: int) -> np.ndarray:
        """Return which tokens are kept, bool `[layer, head, token]`."""
        marks = []
        for keys, mask, whole in zip(self.keys, self.masks, self.whole, strict=True):
            found = same(whole[0], keys[0])
            if mask is not None:
                found[mask[1], mask[2]] = False
            marks.append(found)
        found = torch.stack(marks).cpu().numpy()
        return np.pad(found, ((0, 0), (0, 0), (0, longest - self.length)))


def same(whole: torch.Tensor, cut: torch.Tensor) -> torch.Tensor:
    """Return which tokens of `whole` are in `cut`, bit by bit; both `[K, T, H]`."""
    generator = torch.Generator().manual_seed(0)
    factors = torch.randint(-(2**62), 2**62, whole.shape[-1:], generator=generator)
    factors = 2 * factors.to(whole.device) + 1

    def digest(x: torch.Tensor) -> torch.Tensor:
        bits = x.contiguous().view(torch.int32).to(torch.int64)
        return (bits * factors).sum(-1)

    pairs = zip(digest(whole), digest(cut), strict=True)
    return torch.stack([torch.isin(a, b) for a, b in pairs])


class Every(kvpress.BasePress):
    """Lets several presses act on one reading, and keeps everything itself."""

    def __init__(self, presses: dict[Any, Any]):
        self.presses = presses
        self.found: dict[Any, list] = {name: [] for name in presses}
        self.whole: list[tuple[torch.Tensor, torch.Tensor]] = []

    def post_init_from_model(self, model: Any) -> None:
        """Let each press look at the network, as kvpress does."""
        for press in self.presses.values():
            press.post_init_from_model(model)

    def compress(
        self, module: Any, hidden_states: Any, keys: Any, values: Any, *rest: Any
    ) -> tuple[Any, Any]:
        """Note what each press would keep of a layer, and keep all of it."""
        for name, press in self.presses.items():
            module.masked_key_indices = None
            cut = press.compress(module, hidden_states, keys, values, *rest)
            self.found[name].append((*cut, module.masked_key_indices))
        module.masked_key_indices = None
        self.whole.append((keys, values))
        return keys, values


def read_tokenizer_once(folder: str, texts: Sequence[str]) -> list[int]:
    """Let KVzip have its tokenizer without reading it anew; return its ids of texts."""
    tokenizer = AutoTokenizer.from_pretrained(folder)

    class Known:
        @staticmethod
        def from_pretrained(name: str) -> Any:
            assert name == folder, (name, folder)
            return tokenizer

    kvzip_press.AutoTokenizer = Known
    return [x for t in texts for x in tokenizer.encode(t, add_special_tokens=False)]


class Zip(kvpress.KVzipPress):
    """KVzip, for several budgets of one repetition."""

    def over(self, budgets: Sequence[int], length: int) -> "Zip":
        """Set it for budgets of each layer, and a prompt that is repeated whole."""
        # A little less, since it is the number of those removed that is rounded.
        self.ratios = {budget: 1 - (budget - 0.1) / length for budget in budgets}
        self.found: dict[int, list] = {}
        self.compression_ratio = 0.5  # 0 would not repeat
        self.chunk_size = length
        self.layerwise = True
        return self

    def compress_post(self, model: Any) -> None:
        """Note what is masked at each budget."""
        for budget, ratio in self.ratios.items():
            self.compression_ratio = ratio
            super().compress_post(model)
            modules = [layer.self_attn for layer in model.model.layers]
            self.found[budget] = [module.masked_key_indices for module in modules]
            for module in modules:
                module.masked_key_indices = None


class Reader:
    """Reads prompts under methods and budgets."""

    def __init__(
        self,
        model: Any,
        wanted: Sequence[tuple[str, int]],
        presses: Callable[[int, int], dict[str, Any]],
    ):
        self.model, self.wanted, self.presses = model, wanted, presses

    def read(self, ids: Sequence[int]) -> dict[tuple[str, int], Cut]:
        """Return what each method leaves of a prompt at each budget."""
        length, model = len(ids), self.model
        by_budget = {b: self.presses(b, length) for _, b in self.wanted if b}
        every = Every({x: by_budget[x[1]][x[0]] for x in self.wanted if self.acts(x)})
        zips = [budget for method, budget in self.wanted if method == "kvzip"]
        zip_ = Zip().over(zips, length) if zips else None
        for layer in model.model.layers:
            layer.self_attn.masked_key_indices = None
        with zip_(model) if zip_ else contextlib.nullcontext(), every(model):
            logits = model(
                input_ids=torch.tensor([ids], device=model.device),
                past_key_values=DynamicCache(),
                logits_to_keep=1,
            ).logits
        first = int(logits[0, -1].argmax())
        whole = [keys for keys, _ in every.whole]
        plain = [(*both, None) for both in every.whole]
        cuts = {("full", 0): plain} | every.found
        for budget, masks in zip_.found.items() if zip_ else ():
            pairs = zip(every.whole, masks, strict=True)
            cuts["kvzip", budget] = [(*both, mask) for both, mask in pairs]
        parts = {name: map(list, zip(*cuts[name], strict=True)) for name in self.wanted}
        return {
            name: Cut(keys, values, masks, whole, first, length)
            for name, (keys, values, masks) in parts.items()
        }

    @staticmethod
    def acts(wanted: tuple[str, int]) -> bool:
        """Return whether a method acts behind each layer."""
        return wanted[0] not in ("full", "kvzip")


def decode(
    model: Any, cuts: Sequence[Cut], new: Sequence[int], stop: Sequence[int]
) -> list[list[int]]:
    """Return the greedy outputs, of at most `new` tokens each, a stop included."""
    cache, device = DynamicCache(), model.device
    for number, layer in enumerate(model.model.layers):
        keys = [cut.keys[number] for cut in cuts]
        values = [cut.values[number] for cut in cuts]
        masks = [cut.masks[number] for cut in cuts]
        longest = max(x.shape[2] for x in keys)
        gone = torch.zeros(len(cuts), keys[0].shape[1], longest, dtype=torch.bool)
        gone = gone.to(device)
        for row, (x, mask) in enumerate(zip(keys, masks, strict=True)):
            gone[row, :, x.shape[2] :] = True
            if mask is not None:
                gone[row, mask[1], mask[2]] = True
        indices = gone.nonzero(as_tuple=True)
        layer.self_attn.masked_key_indices = indices if len(indices[0]) else None
        cache.update(*(filled(x, longest) for x in (keys, values)), number)
    tokens = [[cut.first] for cut in cuts]
    positions = torch.tensor([[cut.length] for cut in cuts], device=device)

    def done(row: int) -> bool:
        return tokens[row][-1] in stop or len(tokens[row]) >= new[row]

    while not all(map(done, range(len(cuts)))):
        last = torch.tensor([row[-1:] for row in tokens], device=device)
        logits = model(
            input_ids=last, position_ids=positions, past_key_values=cache
        ).logits
        found = logits[:, -1].argmax(-1).tolist()
        for row, token in enumerate(found):
            if not done(row):
                tokens[row].append(token)
        positions = positions + 1
    return tokens


def filled(rows: Sequence[torch.Tensor], longest: int) -> torch.Tensor:
    """Return `[1, K, T, H]` of several lengths as one, with zeros behind."""
    pad = torch.nn.functional.pad
    return torch.cat([pad(x, (0, 0, 0, longest - x.shape[2])) for x in rows])
