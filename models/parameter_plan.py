"""Which tensors of a checkpoint make up each parameter of the network."""

from typing import Any

from jaxkv.models.config import Config

EMBEDDING = "model.embed_tokens.weight"
HEAD = "lm_head.weight"

# The tensors that make up one parameter, in the order they are joined, with shapes
# `[out, in]` or `[size]`; by the parameter's path.
Parts = dict[str, tuple[int, ...]]
Plan = dict[tuple[str, ...], Parts]


def plan_of(config: Config) -> Plan:
    """Map the path of every parameter to the checkpoint's tensors that make it up."""
    c = config
    hidden, inner = c.hidden_size, c.intermediate_size
    queries, keys = c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim
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
            "attention_norm": {f"{prefix}input_layernorm.weight": (hidden,)},
            "qkv": {f"{attention}{p}.weight": (n, hidden) for p, n in rows.items()},
            "output": {f"{attention}o_proj.weight": (hidden, queries)},
            "mlp_norm": {f"{prefix}post_attention_layernorm.weight": (hidden,)},
            "gate_up": {
                f"{mlp}gate_proj.weight": (inner, hidden),
                f"{mlp}up_proj.weight": (inner, hidden),
            },
            "down": {f"{mlp}down_proj.weight": (hidden, inner)},
        }
        if c.qkv_bias:
            layer["qkv_bias"] = {f"{attention}{p}.bias": (n,) for p, n in rows.items()}
        if c.output_bias:
            layer["output_bias"] = {f"{attention}o_proj.bias": (hidden,)}
        if c.qk_norm:
            layer["q_norm"] = {f"{attention}q_norm.weight": (c.head_dim,)}
            layer["k_norm"] = {f"{attention}k_norm.weight": (c.head_dim,)}
        plan |= {(f"layer_{i}", name): parts for name, parts in layer.items()}
    return plan


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
