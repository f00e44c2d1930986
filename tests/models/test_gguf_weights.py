"""Tensors of GGUF files into the parameter tree: types, order, memory, devices."""

import dataclasses
import tracemalloc

import gguf
import gguf_files
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hf_checkpoints import CONFIG, assert_trees_equal, hf_tensors, raises
from safetensors.numpy import save_file

from jaxkv.models.config import LayerKind
from jaxkv.models.decoder import parameter_shapes
from jaxkv.models.gguf import weights as gguf_weights
from jaxkv.models.gguf.config import read_config
from jaxkv.models.gguf.header import read_header
from jaxkv.models.gguf.weights import read_weights
from jaxkv.models.hf import weights as hf_weights
from jaxkv.models.rope import Rope

WIDE = dict(
    hidden_size=256, intermediate_size=512, num_layers=1, head_dim=64, vocab_size=24
)
CHECKED = ("F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q4_K", "Q6_K")


def knows(kind):
    """Return whether package gguf dequantises a type."""
    row = np.zeros((1, gguf.GGML_QUANT_SIZES[kind][1]), np.uint8)
    try:
        gguf.quants.dequantize(row, kind)
    except NotImplementedError:
        return False
    return True


KNOWN = [kind.name for kind in gguf.GGMLQuantizationType if knows(kind)]


def load(path, dtype="float32", **options):
    header = read_header(path)
    return read_weights(header, read_config(header), dtype=dtype, **options)


def test_the_types_of_the_issue_are_known():
    assert set(CHECKED) <= set(KNOWN) and len(KNOWN) > 20


@pytest.mark.parametrize("kind", KNOWN)
def test_every_type_that_gguf_dequantises(tmp_path, kind):
    _, keys, tensors = gguf_files.tiny("qwen2", qkv_bias=True, **WIDE)
    path = gguf_files.write(tmp_path / "x.gguf", keys, tensors, arch="qwen2", kind=kind)
    stored = {
        tensor.name: gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        for tensor in gguf.GGUFReader(path).tensors
    }
    params = load(path)
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype("float32")}
    layer, equal = params["layer_0"], np.testing.assert_array_equal
    equal(params["embedding"], stored["token_embd.weight"])
    equal(params["head"], stored["output.weight"].T)
    equal(params["final_norm"], stored["output_norm.weight"])
    equal(layer["down"], stored["blk.0.ffn_down.weight"].T)
    equal(layer["output"], stored["blk.0.attn_output.weight"].T)
    equal(layer["mlp_norm"], stored["blk.0.ffn_norm.weight"])
    for name, parts, kind in (
        ("qkv", ("attn_q", "attn_k", "attn_v"), "weight"),
        ("qkv_bias", ("attn_q", "attn_k", "attn_v"), "bias"),
        ("gate_up", ("ffn_gate", "ffn_up"), "weight"),
    ):
        joined = np.concatenate([stored[f"blk.0.{part}.{kind}"] for part in parts])
        equal(layer[name], joined.T)


@pytest.mark.parametrize("chunk", [1, 20, 2**22])
def test_chunks_change_nothing(tmp_path, monkeypatch, chunk):
    """Rows are put where they belong, however many are read at once."""
    config, keys, tensors = gguf_files.tiny(
        qkv_bias=True, output_bias=True, head_dim=6, num_layers=1
    )
    path = gguf_files.write(tmp_path / "x.gguf", keys, tensors)
    monkeypatch.setattr(gguf_weights, "_CHUNK", chunk)
    found = load(path)
    expected = hf_tensors(config)
    prefix = "model.layers.0.self_attn."
    parts = [expected[f"{prefix}{x}_proj.weight"] for x in "qkv"]
    np.testing.assert_array_equal(found["layer_0"]["qkv"], np.concatenate(parts).T)
    parts = [expected[f"{prefix}{x}_proj.bias"] for x in "qkv"]
    np.testing.assert_array_equal(found["layer_0"]["qkv_bias"], np.concatenate(parts))


def test_fused_tensors_of_phi3(tmp_path):
    """They are expected under their names, and in the order of rotation."""
    rope = Rope(rotary_dim=4)
    config = dataclasses.replace(CONFIG, head_dim=8, rope=rope)
    keys = gguf_files.metadata(config, "phi3") | gguf_files.TOKENIZER
    tensors = hf_tensors(config)
    save_file(tensors, tmp_path / "model.safetensors")
    for i in range(config.num_layers):
        for module, parts in (
            ("self_attn.qkv", "qkv"),
            ("mlp.gate_up", ("gate", "up")),
        ):
            start, fused = f"model.layers.{i}.{module}".rsplit(".", 1)
            matrices = [tensors.pop(f"{start}.{x}_proj.weight") for x in parts]
            tensors[f"{start}.{fused}_proj.weight"] = np.concatenate(matrices)
    tensors = gguf_files.gguf_tensors(tensors, config, "phi3")
    path = gguf_files.write(tmp_path / "x.gguf", keys, tensors, arch="phi3")
    assert read_config(read_header(path)) == config
    expected = hf_weights.read_weights(tmp_path, config, dtype="float32")
    assert_trees_equal(load(path), expected)
    del tensors["blk.0.attn_qkv.weight"]
    with raises("missing blk.0.attn_qkv.weight"):
        load(gguf_files.write(tmp_path / "y.gguf", keys, tensors, arch="phi3"))


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("arch", ["llama", "qwen2", "qwen3", "smollm3", "granite"])
def test_a_file_equals_the_folder(tmp_path, arch, tied):
    """The parameters are those of safetensors with the same weights."""
    switches = dict(tied=tied, qkv_bias=arch == "qwen2", qk_norm=arch == "qwen3")
    if arch == "granite":
        scales = dict(embedding_scale=12.0, query_scale=0.5, residual_scale=0.25)
        switches |= dict(scales, logit_scale=1 / 16)
    if arch == "smollm3":
        kinds = (LayerKind(), LayerKind(), LayerKind(), LayerKind(rope=None))
        switches |= dict(num_layers=4, kinds=kinds)
    config, keys, tensors = gguf_files.tiny(arch, **switches)
    save_file(hf_tensors(config), tmp_path / "model.safetensors")
    path = gguf_files.write(tmp_path / "x.gguf", keys, tensors, arch=arch)
    assert read_config(read_header(path)) == config
    expected = hf_weights.read_weights(tmp_path, config, dtype="float32")
    assert_trees_equal(load(path), expected)


@pytest.mark.parametrize(
    ("kind", "own"),
    [("F32", "float32"), ("F16", "float16"), ("BF16", "bfloat16"), ("Q8_0", None)],
)
@pytest.mark.parametrize("backend", ["cpu", "gpu"])
def test_dtypes(tmp_path, monkeypatch, kind, own, backend):
    """A quantised file has no dtype of its own, so the device decides."""
    _, keys, tensors = gguf_files.tiny(hidden_size=32, intermediate_size=32, head_dim=8)
    path = gguf_files.write(tmp_path / "x.gguf", keys, tensors, kind=kind)
    exact = load(path, "float32")
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    quantised = {"cpu": "float32", "gpu": "bfloat16"}[backend]
    for asked, expected in ((None, own or quantised), ("bfloat16", "bfloat16")):
        found = load(path, asked)
        rounded = jax.tree.map(lambda leaf: leaf.astype(expected), exact)  # noqa: B023
        assert_trees_equal(found, rounded)
    with pytest.raises(ValueError, match=r"dtype must be one of .* found 'int8'"):
        load(path, "int8")


def test_shardings_place_every_parameter(tmp_path):
    config, keys, tensors = gguf_files.tiny()
    path = gguf_files.write(tmp_path / "x.gguf", keys, tensors)
    device = jax.devices()[0]
    shardings = jax.tree.map(lambda _: device, parameter_shapes(config))
    del shardings["layer_1"]["down"]
    with pytest.raises(KeyError, match="down"):
        load(path, shardings=shardings)
    shardings["layer_1"]["down"] = device
    assert_trees_equal(load(path, shardings=shardings), load(path))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_host_holds_one_parameter_at_a_time(tmp_path, monkeypatch, dtype):
    """NumPy's memory, as tracemalloc counts it; JAX copies what it keeps."""
    config, keys, tensors = gguf_files.tiny(
        hidden_size=512, intermediate_size=1024, head_dim=64, num_layers=4
    )
    path = gguf_files.write(tmp_path / "x.gguf", keys, tensors, kind="Q8_0")
    chunk = 2**14
    monkeypatch.setattr(gguf_weights, "_CHUNK", chunk)
    put = jax.device_put
    monkeypatch.setattr(
        jax, "device_put", lambda x, target: put(np.copy(x), target).copy()
    )
    load(path, dtype)  # what is imported and cached at the first call
    tracemalloc.start()
    try:
        load(path, dtype)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    leaves = jax.tree.leaves(parameter_shapes(config))
    largest = max(leaf.size for leaf in leaves) * jnp.dtype(dtype).itemsize
    # Twice for the copy that stands for the device's, and what a chunk takes.
    assert peak < 2 * largest + 16 * chunk + 2**19


@pytest.mark.parametrize("kind", ["F64", "I8", "Q8_1", "Q8_K"])
def test_other_types_are_refused(tmp_path, kind):
    _, keys, tensors = gguf_files.tiny(**WIDE)
    path = tmp_path / "x.gguf"
    name = "blk.0.ffn_down.weight"
    integers = {"F64": "f8", "I8": "i1"}
    if kind in integers:
        tensors[name] = tensors[name].astype(integers[kind])
        gguf_files.write(path, keys, tensors)
    else:
        of = gguf.GGMLQuantizationType[kind]
        shape = gguf.quants.quant_shape_to_byte_shape(tensors[name].shape, of)
        raw = np.zeros(shape, np.uint8)
        gguf_files.write(path, keys, tensors | {name: (raw, kind)})
    with raises(path, name, f"type {kind}", "dequantise"):
        load(path)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("kind", ["F32", "Q8_0"])
def test_what_is_no_number_is_refused(tmp_path, kind, bad):
    """Damage within the numbers is found where it makes one that no network has."""
    _, keys, tensors = gguf_files.tiny(**WIDE)
    name = "blk.0.attn_k.weight"
    raw = gguf_files.quantised(tensors[name], kind)
    scale = np.float16(bad) if kind == "Q8_0" else np.float32(bad)
    raw.reshape(-1).view(np.uint8)[: scale.itemsize] = np.atleast_1d(scale).view("u1")
    path = tmp_path / "x.gguf"
    gguf_files.write(path, keys, tensors | {name: (raw, kind)})
    with raises(path, name, "NaN or infinite"):
        load(path)
