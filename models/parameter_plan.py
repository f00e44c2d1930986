"""Which tensors of a checkpoint make up each parameter of the network."""

from collections.abc import Container
from typing import Any

import numpy as np

from jaxkv.models import rope
from jaxkv.models.config import Config, Experts

EMBEDDING = "model.embed_tokens.weight"
HEAD = "lm_head.weight"

# The tensors that make up one parameter, in the order they are joined, with shapes
# `[out, in]` or `[size]`; by the parameter's path.
Parts = dict[str, tuple[int, ...]]
Plan = dict[tuple[str, ...], Parts]


def plan_of(config: Config, stored: Container[str] = ()) -> Plan:
    """Map the path of every parameter to the checkpoint's tensors that make it up.

    Args:
      config: the network.
      stored: names of tensors that the checkpoint has. Where families name the same
        parameter otherwise, it tells whose names they are.
    """
    c = config
    hidden, inner = c.hidden_size, c.intermediate_size
    queries, keys, _ = c.qkv_sizes
    plan: Plan = {
        ("embedding",): {EMBEDDING: (c.vocab_size, hidden)},
        ("final_norm",): {"model.norm.weight": (hidden,)},
    }
    if not c.tied:
        plan["head",] = {HEAD: (c.vocab_size, hidden)}
    for i in range(c.num_layers):
        prefix = f"model.layers.{i}."
        attention, mlp = f"{prefix}self_attn.", f"{prefix}mlp."
        rows = {"q_proj": queries, "k_proj": keys, "v_proj": keys}
        layer: dict[str, Parts] = {
            "qkv": {f"{attention}{p}.weight": (n, hidden) for p, n in rows.items()},
            "output": {f"{attention}o_proj.weight": (hidden, queries)},
        }
        if c.has_experts(i):
            layer |= _expert_parts(c, prefix, stored)
        else:
            layer["gate_up"] = {
                f"{mlp}gate_proj.weight": (inner, hidden),
                f"{mlp}up_proj.weight": (inner, hidden),
            }
            layer["down"] = {f"{mlp}down_proj.weight": (hidden, inner)}
        for name, fused in (
            ("qkv", f"{attention}qkv_proj.weight"),
            ("gate_up", f"{mlp}gate_up_proj.weight"),
        ):
            if fused in stored:  # Phi-3
                rows_of_parts = (size for size, _ in layer[name].values())
                layer[name] = {fused: (sum(rows_of_parts), hidden)}
        if c.qkv_bias:
            layer["qkv_bias"] = {f"{attention}{p}.bias": (n,) for p, n in rows.items()}
        if c.output_bias:
            layer["output_bias"] = {f"{attention}o_proj.bias": (hidden,)}
        if c.qk_norm:
            for name, size in (("q_norm", queries), ("k_norm", keys)):
                size = c.head_dim if c.qk_norm_per_head else size
                layer[name] = {f"{attention}{name}.weight": (size,)}
        if c.sinks:
            layer["sink"] = {f"{attention}sinks": (c.num_heads,)}
        for name, module in _norms(c, prefix, stored).items():
            layer[name] = {f"{prefix}{module}.weight": (hidden,)}
        plan |= {(f"layer_{i}", name): parts for name, parts in layer.items()}
    return plan


def row_orders(
    config: Config, *, interleaved: bool = False
) -> dict[tuple[str, ...], np.ndarray]:
    """Return where each row of a parameter belongs once its parts are joined, int.

    Args:
      config: the network.
      interleaved: of the checkpoint; see `rope.head_order`.

    Returns:
      The orders by the parameter's path; of those whose rows stay in place, none.
    """
    c = config
    orders: dict[tuple[str, ...], np.ndarray] = {}
    for i, kind in enumerate(c.layer_kinds):
        head = rope.head_order(kind.rope, c.head_dim, interleaved=interleaved)
        if head is None:
            continue

        def of_heads(count: int, head: np.ndarray = head) -> np.ndarray:
            first = np.arange(count)[:, None] * c.head_dim
            return (first + head[None]).ravel()

        both = of_heads(c.num_heads + c.num_kv_heads)
        found = {"qkv": np.concatenate([both, np.arange(len(both), c.qkv_size)])}
        if c.qkv_bias:
            found["qkv_bias"] = found["qkv"]
        if c.qk_norm:
            per_head = c.qk_norm_per_head
            found["q_norm"] = of_heads(1 if per_head else c.num_heads)
            found["k_norm"] = of_heads(1 if per_head else c.num_kv_heads)
        orders |= {(f"layer_{i}", name): order for name, order in found.items()}
    return orders


def _norms(config: Config, prefix: str, stored: Container[str]) -> dict[str, str]:
    """Return the checkpoint's name of each norm on the way of the stream."""
    if f"{prefix}post_self_attn_layernorm.weight" in stored:  # GLM-4
        return {
            "attention_norm": "input_layernorm",
            "attention_post_norm": "post_self_attn_layernorm",
            "mlp_norm": "post_attention_layernorm",
            "mlp_post_norm": "post_mlp_layernorm",
        }
    # Where a norm follows the attention, it has the name of the one before the MLP.
    mlp = "pre_feedforward" if config.post_norm else "post_attention"
    before = {"attention_norm": "input_layernorm", "mlp_norm": f"{mlp}_layernorm"}
    after = {
        "attention_post_norm": "post_attention_layernorm",
        "mlp_post_norm": "post_feedforward_layernorm",
    }
    return (before if config.pre_norm else {}) | (after if config.post_norm else {})


def _expert_parts(
    config: Config, prefix: str, stored: Container[str]
) -> dict[str, Parts]:
    """Return the parts of a layer of experts, one expert after the other.

    Some checkpoints hold each matrix of all experts as one tensor.
    """
    assert config.experts is not None
    e, hidden = config.experts, config.hidden_size
    if e.bias:
        return _gpt_oss_parts(e, hidden, f"{prefix}mlp.")
    mlp, gate, up, down = f"{prefix}mlp.", "gate_proj", "up_proj", "down_proj"
    if f"{prefix}block_sparse_moe.gate.weight" in stored:  # Mixtral's names
        mlp, gate, up, down = f"{prefix}block_sparse_moe.", "w1", "w3", "w2"
    parts: dict[str, Parts] = {"router": {f"{mlp}gate.weight": (e.count, hidden)}}
    if f"{mlp}experts.gate_up_proj" in stored:
        shapes = (e.count, 2 * e.size, hidden), (e.count, hidden, e.size)
        parts["experts_gate_up"] = {f"{mlp}experts.gate_up_proj": shapes[0]}
        parts["experts_down"] = {f"{mlp}experts.down_proj": shapes[1]}
        return parts
    if f"{mlp}experts.gate_proj.weight" in stored:
        shape = e.count, e.size, hidden
        parts["experts_gate_up"] = {
            f"{mlp}experts.gate_proj.weight": shape,
            f"{mlp}experts.up_proj.weight": shape,
        }
        shape = e.count, hidden, e.size
        parts["experts_down"] = {f"{mlp}experts.down_proj.weight": shape}
        return parts
    each = [f"{mlp}experts.{index}." for index in range(e.count)]
    parts["experts_gate_up"] = {
        f"{name}{kind}.weight": (e.size, hidden) for name in each for kind in (gate, up)
    }
    parts["experts_down"] = {f"{name}{down}.weight": (hidden, e.size) for name in each}
    return parts


def _gpt_oss_parts(experts: Experts, hidden: int, mlp: str) -> dict[str, Parts]:
    """Return the parts of a layer of gpt-oss, whose matrices are `[in, out]`."""
    e = experts
    shapes = {
        "experts.gate_up_proj": (e.count, hidden, 2 * e.size),
        "experts.gate_up_proj_bias": (e.count, 2 * e.size),
        "experts.down_proj": (e.count, e.size, hidden),
        "experts.down_proj_bias": (e.count, hidden),
    }
    parts: dict[str, Parts] = {
        name.replace(".", "_").replace("_proj", ""): {mlp + name: shape}
        for name, shape in shapes.items()
    }
    parts["router"] = {f"{mlp}router.weight": (e.count, hidden)}
    parts["router_bias"] = {f"{mlp}router.bias": (e.count,)}
    return parts


def arranged(path: tuple[str, ...], array: np.ndarray, config: Config) -> np.ndarray:
    """Return a parameter as the network has it, of its parts joined along their rows.

    Matrices are turned from `[out, in]` to `[in, out]`, those of experts each.
    """
    name, e = path[-1], config.experts
    if e is not None and e.bias and name.startswith("experts_"):
        if not name.startswith("experts_gate_up"):
            return array
        # gpt-oss lays each gate beside its up.
        return np.concatenate([array[..., ::2], array[..., 1::2]], axis=-1)
    if name in ("experts_gate_up", "experts_down"):
        assert config.experts is not None
        count, columns = config.experts.count, array.shape[-1]
        if len(array) == 2 * count and array.ndim == 3:  # all gates, then all ups
            array = array.reshape(2, count, -1, columns).swapaxes(0, 1)
        return array.reshape(count, -1, columns).swapaxes(1, 2)
    return array.T if array.ndim == 2 and path != ("embedding",) else array


def at(tree: Any, path: tuple[str, ...]) -> Any:
    """Return the leaf of a nested dict, or None of None."""
    for key in path:
        tree = None if tree is None else tree[key]
    return tree


def some(names: Any) -> str:
    """List a few names in order, and how many more there are."""
    names = sorted(names)
    if not names:
        return "nothing"
    more = f" and {len(names) - 4} more" if len(names) > 4 else ""
    return ", ".join(names[:4]) + more
