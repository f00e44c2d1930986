"""Our models among those of lm-evaluation-harness, as `jaxkv`.

Needs the extra `lm-eval`, and imports it, so nothing imports this module unasked. Its
main branch finds the class by an entry point, release 0.4.13 once this module has been
imported, or as an instance: `lm_eval.simple_evaluate(model=JaxKV(...), tasks=[...])`.

What the harness asks for is felt by different policies. `generate_until` feels both.
`loglikelihood` reads a context, which the prefill policy cuts, and then a few tokens,
during which a decode policy hardly acts. `loglikelihood_rolling` has a context of one
token, so that the decode policy alone matters.
"""

import itertools
import json
import logging
from collections.abc import Iterator, Sequence
from typing import Any

import lm_eval.models  # noqa: F401, the harness' own register first, or never
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import model_registry
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from tqdm import tqdm

from jaxkv import registry
from jaxkv.evaluation.harness_requests import Wanted, above_0
from jaxkv.language_model import NEEDLE, LanguageModel, load
from jaxkv.models.hf import tokenizer as hf_tokenizer
from jaxkv.options import described
from jaxkv.policies.base import DecodePolicy, PrefillPolicy
from jaxkv.policies.full import Full
from jaxkv.text import arguments
from jaxkv.text.documents import compress
from jaxkv.text.inference import generate
from jaxkv.text.scores import score

NAME = "jaxkv"
_log = logging.getLogger(__name__)

Pair = tuple[Any, list[int], list[int]]  # as the harness has it: texts, context, rest


class JaxKV(TemplateLM):
    """A model whose cache has a budget."""

    def __init__(
        self,
        pretrained: str | LanguageModel = NEEDLE,
        *,
        budget: int | None = None,
        compression_ratio: float | None = None,
        prefill: str | PrefillPolicy = "full",
        decode: str | DecodePolicy = "full",
        batch_size: int | str = 1,
        max_length: int | None = None,
        max_gen_toks: int = 256,
        dtype: str | None = None,
        follow_links: bool = False,
        seed: int = 0,
        tokenizer: str | None = None,
        device: str | None = None,
        max_batch_size: int | None = None,
    ):
        """Load a model, and check what is to be evicted.

        Args:
          pretrained: a name of `jaxkv.load`, or what it has returned.
          budget: see `jaxkv.generate`.
          compression_ratio: see `jaxkv.generate`.
          prefill: a policy, or its name with options. The harness cuts its arguments at
            commas: write `prefill=[snapkv:window_size=8 kernel_size=31]`.
          decode: likewise.
          batch_size: contexts that are read together.
          max_length: tokens of prompt and output; None is what the model was made for.
            What is longer loses its beginning, as in the harness' own models.
          max_gen_toks: longest output where the task does not say.
          dtype: see `jaxkv.load`.
          follow_links: see `jaxkv.load`.
          seed: of draws, where a task samples.
          tokenizer: read by tasks that make their own data, not here.
          device: not read; JAX chooses, or `JAX_PLATFORMS`.
          max_batch_size: not read; no batch size is found by trial.

        Raises:
          ValueError: they mean nothing, or do not go together.
        """
        super().__init__()
        del tokenizer, device, max_batch_size
        policies: dict[str, Any] = {
            name: registry.parse(registry.without_brackets(given), table, flag=name)
            if isinstance(given, str)
            else given
            for name, given, table in (
                ("prefill", prefill, registry.PREFILL),
                ("decode", decode, registry.DECODE),
            )
        }
        options = arguments.static_options("JaxKV", budget=budget, **policies)
        evicts = options.prefill != Full() or options.decode.evicts
        if evicts and budget is None and compression_ratio is None:
            raise ValueError(
                "these policies evict and need budget=, or compression_ratio=."
            )
        options.check(None if compression_ratio is None else ())
        self._spare = options.decode.spare if options.decode.evicts else 0
        kept = dict[str, Any](budget=budget, compression_ratio=compression_ratio)
        self._kept = kept
        self._policies = policies
        self._seed = arguments.integer("seed", seed)
        self._rows = above_0("batch_size", batch_size)
        self._new = above_0("max_gen_toks", max_gen_toks)
        if not isinstance(pretrained, LanguageModel):
            pretrained = load(pretrained, dtype=dtype, follow_links=follow_links)
        self.lm = pretrained
        self.tokenizer = self.lm.tokenizer
        if self.tokenizer is None:
            raise ValueError(f"{self.lm.name} has no tokenizer, and tasks are texts.")
        most = self.lm.config.max_positions
        self.max_length = most if max_length is None else max_length
        if not 2 <= above_0("max_length", self.max_length) <= most:
            raise ValueError(
                f"max_length={max_length} must be between 2 and {most}, what "
                f"{self.lm.name} was made for."
            )

    @property
    def batch_size(self) -> int:
        """Contexts that are read together."""
        return self._rows

    @property
    def eot_token_id(self) -> int:
        """The token that ends a text."""
        end = self.tokenizer.eos_token_id
        return int(self.lm.stop_ids[0] if end is None else end)

    @property
    def prefix_token_id(self) -> int:
        """The token before a text without context."""
        begin = self.tokenizer.bos_token_id
        return self.eot_token_id if begin is None else int(begin)

    @property
    def tokenizer_name(self) -> str:
        """Of the model, for the harness' cache of requests."""
        return self.lm.name.replace("/", "__")

    def get_model_info(self) -> dict[str, Any]:
        """Return what the harness writes beside its results."""
        return {"model_dtype": self.lm.dtype.name} | described(
            self._kept | self._policies
        )

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """Return a conversation as text."""
        return self.tokenizer.apply_chat_template(
            chat_history,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **_: Any
    ) -> list[int]:
        """Return token ids; None adds the special tokens of prompts, BOS once."""
        if add_special_tokens is None:
            return hf_tokenizer.encode(self.tokenizer, [string])[0]
        ids = self.tokenizer(string, add_special_tokens=add_special_tokens)
        return list(ids["input_ids"])

    def generate_until(self, requests: Any, disable_tqdm: bool = False) -> list[str]:
        """Return outputs up to a stop string, which is not part of them."""
        found: dict[int, str] = {}
        with tqdm(total=len(requests), disable=disable_tqdm) as bar:
            for asked, batch in self._alike(requests):
                tokens = self._outputs(asked, [ids for _, ids in batch])
                for (index, _), row in zip(batch, tokens, strict=True):
                    found[index] = text = asked.cut(self._text(row))
                    args = requests[index].args
                    self.cache_hook.add_partial("generate_until", args, text)
                bar.update(len(batch))
        return [found[index] for index in range(len(requests))]

    def _alike(
        self, requests: Any
    ) -> Iterator[tuple["Wanted", list[tuple[int, list[int]]]]]:
        """Yield batches of prompts that are asked in one way, the longest first."""
        ways: dict[str, list[int]] = {}
        for index, request in enumerate(requests):
            way = json.dumps(request.args[1], sort_keys=True, default=str)
            ways.setdefault(way, []).append(index)
        for indices in ways.values():
            asked = Wanted.read(requests[indices[0]].args[1], self._new)
            room = self.max_length - asked.new
            if room < 1:
                raise ValueError(
                    f"an output of {asked.new} tokens leaves no room for a prompt in "
                    f"max_length={self.max_length}; lower max_gen_toks."
                )
            texts = [requests[index].args[0] for index in indices]
            rows = hf_tokenizer.encode(self.tokenizer, texts)
            _say_cut(sum(len(row) > room for row in rows), self.max_length)
            pairs = [(i, row[-room:]) for i, row in zip(indices, rows, strict=True)]
            pairs.sort(key=lambda pair: -len(pair[1]))
            for batch in _batches(pairs, self._rows):
                yield asked, list(batch)

    def _outputs(self, asked: "Wanted", ids: list[list[int]]) -> list[list[int]]:
        """Return the tokens of a batch, up to where each row has a stop string."""
        rows: list[list[int]] = [[] for _ in ids]

        def listen(new: list[list[int]]) -> None:
            for row, more in zip(rows, new, strict=True):
                row.extend(more)
            if asked.until and all(asked.ended(self._text(row)) for row in rows):
                raise _Ended

        try:
            generate(
                self.lm,
                ids,
                max_new_tokens=asked.new,
                sampler=asked.sampler,
                seed=self._seed,
                on_tokens=listen,
                **self._kept,
                **self._policies,
            )
        except _Ended:
            pass
        return rows

    def _text(self, tokens: Sequence[int]) -> str:
        return self.tokenizer.decode(tokens, skip_special_tokens=True)

    def _loglikelihood_tokens(
        self, requests: list[Pair], disable_tqdm: bool = False, **unused: Any
    ) -> list[tuple[float, bool]]:
        """Return how likely continuations are; each context is read once."""
        del unused
        found: dict[int, tuple[float, bool]] = {}
        same: dict[tuple[int, ...], list[int]] = {}
        shortened = 0
        for index, (_, before, rest) in enumerate(requests):
            room = self.max_length - len(rest)
            if room < 1:
                raise ValueError(
                    f"a continuation of {len(rest)} tokens leaves no room for its "
                    f"context in max_length={self.max_length}."
                )
            shortened += len(before) > room
            same.setdefault(tuple(before[-room:]), []).append(index)
        _say_cut(shortened, self.max_length)
        contexts = sorted(same, key=lambda row: -len(row))
        short = [row for row in contexts if len(row) == 1]
        batches = itertools.chain(
            _batches(contexts[: len(contexts) - len(short)], self._rows),
            _batches(short, self._rows),
        )
        with tqdm(total=len(requests), disable=disable_tqdm) as bar:
            for batch in batches:
                asked = [
                    (n, index) for n, row in enumerate(batch) for index in same[row]
                ]
                texts = [requests[index][2] for _, index in asked]
                totals = self._weighed(batch, [n for n, _ in asked], texts)
                for (_, index), total in zip(asked, totals, strict=True):
                    found[index] = total
                    key = requests[index][0]
                    if key is not None:  # the harness asks for whole texts then
                        self.cache_hook.add_partial("loglikelihood", key, total)
                bar.update(len(asked))
        return [found[index] for index in range(len(requests))]

    def _weighed(
        self, contexts: Sequence[Sequence[int]], of: list[int], texts: list[list[int]]
    ) -> list[tuple[float, bool]]:
        """Return total and greediness of continuations of some of these contexts."""
        budget = self._kept["budget"]
        cut: dict[str, Any] = {}
        if len(contexts[0]) > 1:  # of one token, nothing can be removed
            cut = dict(
                budget=None if budget is None else budget - self._spare,
                compression_ratio=self._kept["compression_ratio"],
                prefill=self._policies["prefill"],
            )
        # Rows are filled up, so that another number of them compiles nothing.
        rows = [list(row) for row in _filled(contexts, self._rows)]
        read = compress(self.lm, rows, **cut)
        found: list[tuple[float, bool]] = []
        for part in _batches(list(zip(of, texts, strict=True)), self._rows):
            # A continuation without a token is certain.
            real = [pair for pair in part if pair[1]]
            rows = _filled(real, self._rows) if real else []
            weighed: Iterator[tuple[float, bool]] = iter(())
            if rows:
                scores = score(
                    *(self.lm, None, [text for _, text in rows]),
                    context=read,
                    documents=[document for document, _ in rows],
                    budget=budget if self._policies["decode"].evicts else None,
                    decode=self._policies["decode"],
                )
                weighed = zip(scores.totals, scores.greedy, strict=True)
            found += [next(weighed) if text else (0.0, True) for _, text in part]
        return found

    def loglikelihood_rolling(
        self, requests: Any, disable_tqdm: bool = False
    ) -> list[float]:
        """Return the log-likelihoods of whole texts, in windows of `max_length`."""
        if self._policies["prefill"] != Full() and not self._policies["decode"].evicts:
            _log.warning(
                "jaxkv: rolling log-likelihoods have no prompt, so that prefill evicts "
                "nothing of theirs; name a decode policy that does."
            )
        windows: list[Pair] = []
        owners: list[int] = []
        for index, request in enumerate(requests):
            (text,) = request.args
            cuts = get_rolling_token_windows(
                token_list=self.tok_encode(text, add_special_tokens=False),
                prefix_token=self.prefix_token_id,
                # The harness lets the last token stand beyond; here it has a position.
                max_seq_len=self.max_length - 1,
                context_len=1,
            )
            for before, rest in map(make_disjoint_window, cuts):
                windows.append((None, before, rest))
                owners.append(index)
        found = [0.0] * len(requests)
        weighed = self._loglikelihood_tokens(windows, disable_tqdm=disable_tqdm)
        for owner, (total, _) in zip(owners, weighed, strict=True):
            found[owner] += total
        for request, total in zip(requests, found, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return found


class _Ended(Exception):
    """Every row of a batch has a stop string."""


def _batches(rows: Sequence[Any], size: int) -> Iterator[Sequence[Any]]:
    return (rows[first : first + size] for first in range(0, len(rows), size))


def _filled(rows: Sequence[Any], size: int) -> list[Any]:
    """Return rows, the first of them repeated until there are so many."""
    return list(itertools.chain(rows, itertools.repeat(rows[0], size - len(rows))))


def _say_cut(number: int, most: int) -> None:
    if number:
        _log.warning(
            "jaxkv: %d texts are longer than %d tokens with what follows them, and "
            "have lost their beginning.",
            *(number, most),
        )


if NAME not in model_registry:  # an entry point may have been first
    model_registry.register(NAME)(JaxKV)
