"""Which tokens kvpress keeps, of prompts that are written as queries, keys and values.

Needs an environment of its own:
`pip install kvpress==0.5.5 "transformers<5.3" torch numpy`, then
`python benchmarks/kvpress_oracle.py tests/oracle`.

Networks are tiny and random: a Llama, and a Qwen3 (which normalises queries and keys).
Each press cuts their prompts; what a head keeps is read from its cache, or from the
mask by which kvpress lets heads of a layer keep different numbers. `kvpress.npz` has
the arrays of each layer, `kvpress.json` what was kept. `tests/policies/test_oracle.py`
holds our policies to it.
"""

import importlib.metadata
import json
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
import transformers
from kvpress import (
    AdaKVPress,
    ChunkKVPress,
    CriticalAdaKVPress,
    CriticalKVPress,
    ExpectedAttentionPress,
    KeyDiffPress,
    KnormPress,
    KVzipPress,
    LagKVPress,
    PyramidKVPress,
    SnapKVPress,
    StreamingLLMPress,
    TOVAPress,
)
from kvpress.utils import get_prerope_query_states
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import DynamicCache, LlamaConfig, Qwen3Config
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

LENGTH, LAYERS, HEADS, KV_HEADS, HEAD_DIM, HIDDEN = 64, 3, 4, 2, 8, 32
SIZES = dict(
    vocab_size=128,
    hidden_size=HIDDEN,
    intermediate_size=48,
    num_hidden_layers=LAYERS,
    num_attention_heads=HEADS,
    num_key_value_heads=KV_HEADS,
    head_dim=HEAD_DIM,
    max_position_embeddings=512,
    initializer_range=0.25,  # so that attention is far from even
)
NETWORKS = {"llama": LlamaConfig, "qwen3": Qwen3Config}


def snap(ratio):
    """Return SnapKV with a window for short prompts."""
    return SnapKVPress(ratio, window_size=6, kernel_size=5)


def expected(ratio, **options):
    """Return expected attention that looks ahead as far as short prompts need."""
    return ExpectedAttentionPress(ratio, n_future_positions=32, **options)


PRESSES = {
    "snapkv": snap(0.5),
    "snapkv, 87.5 %": snap(0.875),
    "pyramidkv": PyramidKVPress(0.5, window_size=6, kernel_size=5, beta=4),
    "pyramidkv, capped": PyramidKVPress(0.3, window_size=6, kernel_size=5),
    "pyramidkv, flat": PyramidKVPress(0.75, window_size=6, kernel_size=5, beta=20),
    "tova": TOVAPress(0.75),
    "knorm": KnormPress(0.75),
    "streaming-llm": StreamingLLMPress(0.75),
    "expected-attention": expected(0.75),
    "expected-attention, epsilon": expected(0.75, epsilon=1e-2),
    "expected-attention, mean only": expected(0.75, use_covariance=False),
    "keydiff": KeyDiffPress(0.75),
    # 4 sinks, the last 12, and of 6 partitions the 5 best: no rank is kept in part.
    "lagkv": LagKVPress(1 - 46.5 / LENGTH, n_sink=4, lag_size=8),
    "lagkv, short": LagKVPress(0.5, n_sink=4, lag_size=40),
    "lagkv, cross": LagKVPress(0.5, n_sink=4, lag_size=8, cross_scoring=True),
    "chunkkv": ChunkKVPress(snap(0.5), chunk_length=7),
    "chunkkv of keydiff": ChunkKVPress(KeyDiffPress(0.6), chunk_length=5),
    "adakv": AdaKVPress(snap(0.6)),
    "adakv of expected-attention": AdaKVPress(expected(0.7, epsilon=1e-2)),
    "criticalkv": CriticalKVPress(snap(0.5)),
    "criticalkv of expected-attention": CriticalKVPress(expected(0.6, use_vnorm=False)),
    "criticalkv of adakv": CriticalAdaKVPress(snap(0.5)),
    "kvzip": KVzipPress(0.5, layerwise=True),
}


def network(kind, folder):
    """Return a random network; KVzip reads the tokenizer in `folder`."""
    torch.manual_seed(0)
    config = NETWORKS[kind](**SIZES, attn_implementation="sdpa")
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    model.config.name_or_path = str(folder)
    for name, weight in model.named_parameters():
        if "norm" in name:  # or all of Qwen3's keys had one norm
            torch.nn.init.uniform_(weight, 0.5, 1.5)
    return model


def write_tokenizer(folder):
    """Write one that knows a few of the words by which KVzip asks for a repetition."""
    words = ["?", "Repeat", "the", "previous", "context", "exactly", "."]
    vocabulary = {word: 3 * i + 1 for i, word in enumerate(words)}
    plain = Tokenizer(models.WordLevel(vocabulary, unk_token="?"))
    plain.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=plain, unk_token="?")
    fast.save_pretrained(folder)


@torch.no_grad()
def run(model, ids):
    """Return each layer's rotated queries, keys and values, `[T, heads, H]`."""
    taken = []

    def hook(module, args, kwargs, output):
        queries = get_prerope_query_states(module, kwargs["hidden_states"])
        queries, _ = apply_rotary_pos_emb(
            queries, queries, *kwargs["position_embeddings"]
        )
        layer = kwargs["past_key_values"].layers[module.layer_idx]
        arrays = [x[0].transpose(0, 1) for x in (queries, layer.keys, layer.values)]
        taken.append([x.numpy().copy() for x in arrays])

    hooks = [
        layer.self_attn.register_forward_hook(hook, with_kwargs=True)
        for layer in model.model.layers
    ]
    model.model(input_ids=ids, past_key_values=DynamicCache())
    for one in hooks:
        one.remove()
    return taken


@torch.no_grad()
def kept(model, press, ids, whole):
    """Return the positions that each head of each layer keeps, sorted."""
    cache = DynamicCache()
    for layer in model.model.layers:
        layer.self_attn.masked_key_indices = None
    with press(model):
        model.model(input_ids=ids, past_key_values=cache)
    found = []
    for layer, arrays in zip(model.model.layers, whole, strict=True):
        heads = []
        masked = layer.self_attn.masked_key_indices
        keys = cache.layers[layer.self_attn.layer_idx].keys[0].numpy()
        for head in range(KV_HEADS):
            if masked is not None:
                gone = masked[2][masked[1] == head].tolist()
                heads.append(sorted(set(range(ids.shape[1])) - set(gone)))
                continue
            own = arrays[1][:, head]
            apart = np.abs(keys[head][:, None] - own[None]).max(-1)
            assert (apart.min(1) < 1e-5).all()
            heads.append(sorted(apart.argmin(1).tolist()))
        found.append(heads)
    return found


def main(folder):
    """Run all presses, and write what they keep."""
    arrays, cases = {}, []
    with tempfile.TemporaryDirectory() as words:
        write_tokenizer(words)
        tokenizer = transformers.AutoTokenizer.from_pretrained(words)
        texts = ("\n\nRepeat the previous context exactly.", "\n")
        asked = [
            token
            for text in texts
            for token in tokenizer.encode(text, add_special_tokens=False)
        ]
        for kind in NETWORKS:
            model = network(kind, words)
            # Each token once: rotated or not, equal ones have equal norms.
            ids = torch.randperm(128, generator=torch.manual_seed(1))[None, :LENGTH]
            repeat = torch.tensor([asked], dtype=torch.long)
            repeated = torch.cat([ids, repeat, ids], dim=1)
            whole = run(model, repeated)
            names = ("queries", "keys", "values")
            for layer, found in enumerate(whole):
                for name, array in zip(names, found, strict=True):
                    arrays[f"{kind}/{layer}/{name}"] = array.astype(np.float32)
                output = model.model.layers[layer].self_attn.o_proj.weight.detach()
                arrays[f"{kind}/{layer}/output"] = (
                    output.T.reshape(HEADS, HEAD_DIM, HIDDEN).numpy().copy()
                )
            for name, press in PRESSES.items():
                found = kept(model, press, ids, whole)
                cases.append({"network": kind, "press": name, "kept": found})
            theta = getattr(model.config, "rope_theta", None)
            theta = theta or model.config.rope_parameters["rope_theta"]
    versions = {
        "kvpress": importlib.metadata.version("kvpress"),
        "transformers": transformers.__version__,
        "torch": torch.__version__,
    }
    head = {
        "made_by": "benchmarks/kvpress_oracle.py",
        "versions": versions,
        "length": LENGTH,
        "asked": len(asked),
        "rope_theta": theta,
    }
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(folder / "kvpress.npz", **arrays)
    lines = ",\n".join(json.dumps(case, separators=(",", ":")) for case in cases)
    top = json.dumps(head)[:-1]
    (folder / "kvpress.json").write_text(f'{top}, "cases": [\n{lines}\n]}}\n')


if __name__ == "__main__":
    main(sys.argv[1])
