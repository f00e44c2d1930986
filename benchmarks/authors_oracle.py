"""Which tokens the authors' code keeps, of methods that no release of kvpress has.

Needs an environment of its own, `pip install torch transformers==5.2 attrs numpy`, and
what it compares with: a checkout of FFY0/DefensiveKV at 9251b95, and the file
`kvpress/presses/dropkv_press.py` of NVIDIA/kvpress at 7fb8625 (pull request 285). Then
`python benchmarks/authors_oracle.py tests/oracle --defensivekv CHECKOUT --dropkv FILE`.

It reads the queries, keys, values and projections of `kvpress.npz`, which
`kvpress_oracle.py` writes, and gives them to the presses' scores: their networks are a
stand-in whose projection of queries is the identity and whose rotation is by nothing.
`authors.json` has what is kept; `tests/policies/test_oracle.py` holds ours to it.
"""

import argparse
import importlib.metadata
import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import torch

COMMITS = {
    "FFY0/DefensiveKV": "9251b95e7e282a6c18dd98ef6318dd489e639a58",
    "NVIDIA/kvpress": "7fb862554f556ef075dfac299509aa839cdca94c",
}
LENGTH, LAYERS, HEADS, KV_HEADS, HEAD_DIM = 64, 3, 4, 2, 8
NETWORKS = ("llama", "qwen3")
CASES = {  # the press, the share that goes, its options
    "defensivekv": ("defensivekv", 0.5, dict(window_size=6)),
    "defensivekv, 75 %": ("defensivekv", 0.75, dict(window_size=6)),
    "defensivekv, kernel": ("defensivekv", 0.375, dict(window_size=4, kernel_size=3)),
    "dropkv": ("dropkv", 0.5, dict(window_size=6)),
    "dropkv, 75 %": ("dropkv", 0.75, dict(window_size=6, kernel_size=3)),
}


def put_in_place(name: str, **content) -> None:
    """Make a module of that name, so that its own file is not read."""
    module = ModuleType(name)
    vars(module).update(content)
    sys.modules[name] = module


def presses(checkout: Path, file: Path) -> dict:
    """Return both classes, of files that import packages around them."""
    for name in ("kvpress", "kvpress.presses", "kvpress.ops"):
        put_in_place(name, __path__=[str(checkout / name.replace(".", "/"))])
    put_in_place("kvpress.ops.vw_norm", vw_l1norm=None)  # a GPU's
    put_in_place(
        "kvpress.utils",
        compute_n_kept=None,
        get_prerope_query_states=lambda module, hidden: module.queries_of(hidden),
    )
    from kvpress.presses import efficient_defensivekv_press as defensive

    spec = importlib.util.spec_from_file_location("dropkv_press", file)
    assert spec is not None and spec.loader is not None
    drop = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(drop)

    class Plain(defensive.EfficientDefensiveKVPress):
        """With the same norms in torch, as its authors wrote them beside."""

        vwl1norm_triton = defensive.EfficientDefensiveKVPress.vwl1norm

    return {"defensivekv": Plain, "dropkv": drop.DropKVPress}


def stand_in(output: torch.Tensor) -> SimpleNamespace:
    """Return an attention layer whose hidden states are its rotated queries."""
    config = SimpleNamespace(
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        hidden_size=output.shape[-1],
    )
    return SimpleNamespace(
        config=config,
        head_dim=HEAD_DIM,
        num_key_value_groups=HEADS // KV_HEADS,
        q_proj=lambda hidden: hidden,
        queries_of=lambda hidden: hidden.unflatten(-1, (HEADS, -1)).transpose(1, 2),
        o_proj=SimpleNamespace(weight=output.reshape(HEADS * HEAD_DIM, -1).T),
    )


def kept(press, layer: dict) -> list[list[int]]:
    """Return the positions that each head keeps, sorted."""
    keys, values = (
        layer[name][:LENGTH].transpose(0, 1)[None] for name in ("keys", "values")
    )
    still = torch.ones(1, LENGTH, HEAD_DIM)
    metadata = SimpleNamespace(
        bsz=1, num_key_value_heads=KV_HEADS, head_lens=[LENGTH] * KV_HEADS
    )
    scores = press.score(
        stand_in(layer["output"]),
        layer["queries"][:LENGTH].flatten(1)[None],
        keys.contiguous(),
        values.contiguous(),
        None,
        {"position_embeddings": (still, 0 * still), "metadata": metadata},
    )
    share = 1 - press.compression_ratio
    shared = scores.ndim == 2  # one budget for all heads of the layer
    count = int(LENGTH * share * KV_HEADS) if shared else int(LENGTH * share)
    best = scores.topk(count, dim=-1).indices[0]
    if not shared:
        return [sorted(head.tolist()) for head in best]
    return [
        sorted((best[best // LENGTH == head] % LENGTH).tolist())
        for head in range(KV_HEADS)
    ]


def main() -> None:
    """Score all layers, and write what is kept."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--defensivekv", type=Path, required=True)
    parser.add_argument("--dropkv", type=Path, required=True)
    arguments = parser.parse_args()
    classes = presses(arguments.defensivekv, arguments.dropkv)
    with np.load(arguments.folder / "kvpress.npz") as file:
        arrays = {name: torch.from_numpy(file[name]) for name in file.files}
    names, cases = ("queries", "keys", "values", "output"), []
    for kind in NETWORKS:
        layers = [
            {name: arrays[f"{kind}/{layer}/{name}"] for name in names}
            for layer in range(LAYERS)
        ]
        for case, (press, ratio, options) in CASES.items():
            found = [kept(classes[press](ratio, **options), layer) for layer in layers]
            cases.append({"network": kind, "press": case, "kept": found})
    head = {
        "made_by": "benchmarks/authors_oracle.py",
        "commits": COMMITS,
        "versions": {
            name: importlib.metadata.version(name) for name in ("torch", "transformers")
        },
    }
    lines = ",\n".join(json.dumps(case, separators=(",", ":")) for case in cases)
    top = json.dumps(head)[:-1]
    path = arguments.folder / "authors.json"
    path.write_text(f'{top}, "cases": [\n{lines}\n]}}\n')


if __name__ == "__main__":
    with torch.no_grad():
        main()
