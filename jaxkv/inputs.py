"""What prompts are read from: their tokens and positions, empty layers, an attention.

Axis letters: `B` batch, `P` padded prompt.
"""

from typing import Any

import jax

from jaxkv import state as kv
from jaxkv.attention import EmptyLayer, append_tokens, attend_prompt, empty_layers
from jaxkv.expected import brief, check_array, check_kind
from jaxkv.options import Options
from jaxkv.policies import contract
from jaxkv.policies.base import PrefillPolicy, Sketch
from jaxkv.policies.full import Full


def sketches(options: Options) -> bool:
    """Return whether prompts are evicted by what is decoded from them."""
    return options.budget is not None and options.prefill.sketches


def read_inputs(network, params, tokens, lengths, options, slots, keep, held):
    """Return what a network reads prompts from: tokens, positions, layers, attend.

    Arguments are those of `forward.read`. The policy is none that `sketches`.
    """
    policy = _policy(options)
    pseudo = contract.pseudo_tokens(
        policy,
        tokens,
        lengths,
        vocab_size=network.config.vocab_size,
        sketch=_no_sketch(policy),
    )
    tokens, positions = append_tokens(tokens, lengths, pseudo, offset=policy.offset)
    attend = attend_prompt(
        policy,
        lengths=lengths,
        held=held,
        implementation=options.prefill_implementation,
        scores_implementation=options.scores_implementation,
    )
    candidates = lengths if held is None else held
    empty = empty_for(network, params, candidates, options, slots, keep)
    return tokens, positions, empty, attend


def check_prompts(network, params, tokens, lengths, options, slots, keep) -> None:
    """Raise ValueError where `forward.read` cannot read prompts from these."""
    check_static("prefill", network, params, options)
    check_array("prefill", "tokens", tokens, "B P")
    check_array("prefill", "lengths", lengths, "B")
    layers = len(network.config.windows)
    each = (slots,) * layers if isinstance(slots, int) else slots
    if not isinstance(each, tuple) or len(each) != layers or not _sizes(each):
        raise ValueError(
            "prefill: slots= takes a number of at least 1, or a tuple of one for each "
            f"of the {layers} layers, got {brief(slots)}."
        )
    if keep is not None:
        check_array("prefill", "keep", keep, "B")
    if keep is not None and options.budget is None:
        raise ValueError(
            "prefill: keep= says how much of options.budget each row uses, but that "
            "is None; set Options(budget=), the most that any row may keep."
        )


def _policy(options: Options) -> PrefillPolicy:
    return Full() if options.budget is None else options.prefill


def _no_sketch(policy: PrefillPolicy) -> Sketch:
    def sketch(*_):
        raise ValueError(
            f"{type(policy).__name__}.pseudo_tokens asks for a sketch, but its "
            "sketches is False; set it to True."
        )

    return sketch


def check_sketch(policy: PrefillPolicy, other: Any, steps: Any) -> None:
    """Raise ValueError where a policy asks for a sketch that cannot be made.

    Args:
      policy: that asks.
      other: what it wants the prompt to be evicted by.
      steps: how many tokens.
    """
    lacks = isinstance(other, type) or contract.missing(other, PrefillPolicy)
    if lacks or not _sizes((steps,)):
        raise ValueError(
            f"{type(policy).__name__}.pseudo_tokens: sketch takes a policy of the "
            "prompt and a number of tokens, at least 1, as in sketch(SnapKV(), 32), "
            f"got {brief(other)} and {brief(steps)}."
        )


def empty_for(
    network, params, candidates, options, slots, keep
) -> tuple[EmptyLayer, ...]:
    """Return what layers fill, of prompts whose first `candidates` may be kept."""
    policy, bound = _policy(options), options.prompt_budget
    if isinstance(slots, int):
        slots = kv.all_slots(network.config.windows, slots)
    return empty_layers(
        policy,
        network.config,
        candidates,
        slots=slots,
        bound=max(slots) if bound is None else bound,
        keep=keep,
        dtype=params["embedding"].dtype,
        frequencies=network.apply({"params": params}, method="frequencies"),
        outputs=network.apply({"params": params}, method="outputs")
        if getattr(policy, "reads_output", False)
        else None,
    )


def check_static(call: str, network: Any, params: Any, options: Any) -> None:
    """Raise ValueError where what a program is traced for is of another kind.

    Args:
      call: the function that was called.
      network: has `config` and `apply`.
      params: its parameters.
      options: `Options`.
    """
    if not hasattr(network, "config") or not hasattr(network, "apply"):
        raise ValueError(
            f"{call}: network= takes a network, such as the model's lm.network, got "
            f"{brief(network)}."
        )
    # A network of one's own may have parameters of any structure.
    if not (leaves := jax.tree.leaves(params)) or not all(
        hasattr(leaf, "dtype") for leaf in leaves
    ):
        raise ValueError(
            f"{call}: params= takes the parameters of the network, such as lm.params, "
            f"got {brief(params)}."
        )
    check_kind(call, "options", options, Options, "jaxkv.Options()")


def _sizes(numbers: tuple[Any, ...]) -> bool:
    """Return whether all of these are numbers of at least 1."""
    return all(isinstance(x, int) and x >= 1 for x in numbers)
