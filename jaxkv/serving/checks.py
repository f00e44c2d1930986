"""What engines and their requests are checked for, before anything costs time."""

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from jaxkv import state as kv
from jaxkv.contexts.context import Context
from jaxkv.expected import check_truth
from jaxkv.fields import MOST_SEED
from jaxkv.language_model import LanguageModel
from jaxkv.options import Options
from jaxkv.sampling import Categorical, Greedy
from jaxkv.serving.requests import Request
from jaxkv.serving.rows import Shape
from jaxkv.text import arguments, questions
from jaxkv.text.documents import encode_questions, speaking_of
from jaxkv.text.planning import bucket
from jaxkv.text.prompts import encode

_MAY_BE_NONE = ("budget", "stall")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Limits:
    """The most that a request may want; see `Engine`."""

    max_prompt: int
    max_new_tokens: int
    budget: int | None
    most_stop_ids: int
    repetition_penalties: bool


def shape(
    lm: LanguageModel, options: Options, limits: Limits, **numbers: int | None
) -> Shape:
    """Return the shape of an engine's rows.

    Args:
      lm: the model.
      options: of the engine, without a budget.
      limits: of its requests.
      **numbers: other arguments of `Engine`; its `stall` may be None.

    Raises:
      ValueError: they are no numbers above 0, or at odds with each other.
    """
    check_truth("Engine", repetition_penalties=limits.repetition_penalties)
    with speaking_of("Engine", "prompt"):
        sizes = {"max_prompt": limits.max_prompt, "budget": limits.budget}
        sizes |= {"max_new_tokens": limits.max_new_tokens} | numbers
        sizes |= {"most_stop_ids": limits.most_stop_ids}
        for name, number in sizes.items():
            if number is None and name in _MAY_BE_NONE:
                continue
            if arguments.integer(name, number) < 1:
                raise ValueError(f"generate: {name} must be >= 1, got {number}.")
        options.check(None if limits.budget is None else [limits.budget])
        most = lm.config.max_positions
        if limits.max_prompt + limits.max_new_tokens > most:
            raise ValueError(
                f"generate: max_prompt={limits.max_prompt} and max_new_tokens="
                f"{limits.max_new_tokens} need more than the {most} positions that "
                f"{lm.name} was made for; lower one of them."
            )
    bound = limits.budget
    if bound is not None and not options.decode.evicts:
        bound = bucket(bound)
    options = dataclasses.replace(options, budget=bound)
    prompt, new = bucket(limits.max_prompt), bucket(limits.max_new_tokens)
    slots = options.layer_slots(prompt, new, lm.config.windows)
    return Shape(slots=slots, prompt=prompt, max_out=new, options=options)


def request(
    lm: LanguageModel,
    shape: Shape,
    limits: Limits,
    prompt: Any,
    *,
    sampler: Any,
    stop_ids: Sequence[int] | None,
    max_new_tokens: int | None,
    seed: int,
    budget: int | None,
    context: Context | None,
    document: int,
) -> Request:
    """Return a request, checked; arguments are those of `Engine.submit`.

    Raises:
      ValueError: it is bad, or wants more than a row of the engine holds.
    """
    with speaking_of("submit", "prompt"):
        new = limits.max_new_tokens if max_new_tokens is None else max_new_tokens
        new, _ = arguments.limits(new, 1, None)
        if new > limits.max_new_tokens:
            raise ValueError(
                f"generate: max_new_tokens={new}, but the engine was made for "
                f"{limits.max_new_tokens}; ask for less, or make it for more."
            )
        _check_sampler(sampler, shape.options, limits)
        stops = tuple(s for s in arguments.stop_ids(lm, stop_ids).tolist() if s >= 0)
        if len(stops) > limits.most_stop_ids:
            raise ValueError(
                f"generate: got {len(stops)} stop_ids, but the engine was made for "
                f"{limits.most_stop_ids}; make it with most_stop_ids={len(stops)}."
            )
        keep = _budget(shape.options, limits, budget, context)
        given: dict[str, Any] = dict(budget=keep, new=new, limits=limits)
        if context is None:
            if arguments.integer("document", document) != 0:
                raise ValueError(
                    f"generate: {document=} goes with context=, which holds documents, "
                    "but there is none; pass the context, or leave the document out."
                )
            ids = _prompt(lm, shape, prompt, **given)
        else:
            ids = _question(lm, shape, prompt, context, document, **given)
        return Request(
            ids=np.asarray(ids, np.int32),
            sampler=sampler,
            stop_ids=stops,
            max_new_tokens=new,
            seed=arguments.integer("seed", seed, most=MOST_SEED),
            budget=keep,
            context=context,
            document=document,
        )


def alternatives(lm: LanguageModel, number: int | None) -> int | None:
    """Return how many alternatives to each token are noted, None for nothing.

    Raises:
      ValueError: there are no so many tokens.
    """
    with speaking_of("Engine", "prompt"):
        return None if number is None else arguments.alternatives(lm, True, number)


def lengths(
    prompts: Iterable[int] | None, limits: Limits, *, draws: bool, idle: bool
) -> Sequence[int]:
    """Return the lengths of prompts to compile for; None is all that may come.

    Raises:
      ValueError: they are none, no numbers, or beyond those of the engine; or it has
        requests.
    """
    check_truth("Engine.warm_up", draws=draws)
    if not idle:
        raise ValueError("Engine.warm_up: there are requests; call it before them.")
    most = limits.max_prompt
    if prompts is None:
        return range(1, most + 1)
    with speaking_of("Engine.warm_up", "prompt"):
        found = arguments.integers("prompts", prompts)
        if not found or not 1 <= min(found) <= max(found) <= most:
            raise ValueError(
                f"generate: prompts= takes lengths between 1 and {most}, the engine's "
                f"max_prompt, at least one; got {arguments.brief(found)}."
            )
    return found


def prompt_tokens(request: Request) -> int:
    """Return the tokens of a prompt, a context's document included."""
    own = len(request.ids)
    if request.context is None:
        return own
    return own + int(np.asarray(request.context.lengths)[request.document])


def _check_sampler(sampler: Any, options: Options, limits: Limits) -> None:
    if not isinstance(sampler, Greedy | Categorical):
        raise ValueError(
            "generate: sampler= takes Greedy() or Categorical(), whose options are "
            f"arrays to an engine; got {arguments.brief(sampler)}."
        )
    arguments.static_options("generate", sampler=sampler).check()
    if sampler.repetition_penalty != 1 and not limits.repetition_penalties:
        raise ValueError(
            "generate: the engine was made without repetition penalties; make it with "
            "repetition_penalties=True."
        )
    if not options.accept.exact:
        dataclasses.replace(options, sampler=sampler).check()


def _budget(
    options: Options, limits: Limits, budget: Any, context: Context | None
) -> int | None:
    """Return what may be kept of a request's prompt; None where the shape says it."""
    most = limits.budget
    if budget is None:
        return None if options.decode.evicts else most
    wanted = arguments.integer("budget", budget)
    if context is not None or options.decode.evicts or most is None:
        raise ValueError(
            f"generate: {budget=} of a request goes with an engine that has a budget "
            "and whose decode policy does not evict, and with no context; leave it out."
        )
    if not 1 <= wanted <= most:
        raise ValueError(
            f"generate: a request's budget must be between 1 and {most}, that of the "
            f"engine; got {wanted}."
        )
    return wanted


def _prompt(
    lm: LanguageModel,
    shape: Shape,
    prompt: Any,
    *,
    budget: int | None,
    new: int,
    limits: Limits,
) -> Any:
    (ids,) = encode(lm, [prompt])
    if len(ids) > limits.max_prompt:
        raise _too_long(len(ids), limits)
    kept = limits.budget if budget is None else budget
    budgets = None if kept is None else (kept,)
    shape.options.check(budgets)
    arguments.check_fit(lm, [ids], new, shape.options, budgets)
    return ids


def _question(
    lm: LanguageModel,
    shape: Shape,
    prompt: Any,
    context: Context,
    document: int,
    *,
    budget: int | None,
    new: int,
    limits: Limits,
) -> Any:
    del budget  # the context has been cut
    options = shape.options.of_the_loop()
    room = limits.budget if options.decode.evicts else None
    questions.check(lm, context, options, room, None)
    (index,) = questions.rows_of(context, [document], 1)
    (ids,) = encode_questions(lm, [prompt], chat=context.chat)
    seen = int(np.asarray(context.lengths)[index])
    kept = int(np.asarray(context.kept)[index])
    if seen + len(ids) > limits.max_prompt:
        raise _too_long(seen + len(ids), limits)
    need = kept + len(ids) + (options.decode.spare if room else new)
    sizes = zip(shape.slots, lm.config.windows, strict=True)
    # A layer's window has room for any document.
    least = min((size for size, window in sizes if window is None), default=need)
    if need > least:
        raise ValueError(
            f"generate: document {index} with {kept} tokens kept, the prompt and what "
            f"follows need {need} slots, but a row has {least}; make the engine with "
            "a higher budget, or compress to a lower one."
        )
    heads = {state.target.shape[1] for state in kv.global_layers(context.cache)}
    wanted = shape.options.prefill.heads(lm.config.num_heads, lm.config.num_kv_heads)
    if heads != {wanted}:
        raise ValueError(
            f"generate: the context holds heads a layer: {sorted(heads)}, but the rows "
            f"hold {wanted}; make the engine with the prefill policy of the context."
        )
    return ids


def _too_long(tokens: int, limits: Limits) -> ValueError:
    return ValueError(
        f"generate: the prompt has {tokens} tokens, but the engine was made for "
        f"{limits.max_prompt}; shorten it, or make the engine with a higher max_prompt."
    )
