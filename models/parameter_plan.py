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
            for name, size in (("q_norm", queries), ("k_norm", keys)):
                size = c.head_dim if c.qk_norm_per_head else size
                layer[name] = {f"{attention}{name}.weight": (size,)}
        for name, module in _norms(c).items():
            layer[name] = {f"{prefix}{module}.weight": (hidden,)}
        plan |= {(f"layer_{i}", name): parts for name, parts in layer.items()}
    return plan


def _norms(config: Config) -> dict[str, str]:
    """Return the checkpoint's name of each norm on the way of the stream."""
    # Where a norm follows the attention, it has the name of the one before the MLP.
    mlp = "pre_feedforward" if config.post_norm else "post_attention"
    before = {"attention_norm": "input_layernorm", "mlp_norm": f"{mlp}_layernorm"}
    after = {
        "attention_post_norm": "post_attention_layernorm",
        "mlp_post_norm": "post_feedforward_layernorm",
    }
    return (before if config.pre_norm else {}) | (after if config.post_norm else {})


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
