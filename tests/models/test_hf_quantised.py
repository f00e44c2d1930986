"""Quantised checkpoints: packed here by hand, of known integers, and read back."""

import dataclasses
import json
import logging

import hf_checkpoints
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hf_checkpoints import MODEL, assert_trees_equal, hf_tensors, raises
from safetensors.numpy import save_file

from jaxkv.models.hf import packed as hf_packed
from jaxkv.models.hf.quantised import read_scheme
from jaxkv.models.hf.weights import read_weights

CONFIG = dataclasses.replace(
    hf_checkpoints.CONFIG,
    hidden_size=32,
    head_dim=8,
    intermediate_size=48,
    num_layers=1,
)
UP = "model.layers.0.mlp.up_proj"  # [48, 32]
RNG = np.random.default_rng(0)
FP8 = dict(quant_method="fp8", activation_scheme="dynamic", fmt="e4m3")
GPTQ = dict(quant_method="gptq", bits=4, group_size=8, desc_act=False, sym=False)
DYNAMIC, NO_ROWS = dict(num_bits=8, dynamic=True), np.ones((0, 48), "i4")
AWQ = dict(quant_method="awq", bits=4, group_size=16, zero_point=True, version="gemm")


def compressed(strategy, activations=DYNAMIC, **weights):
    weights = dict(num_bits=8, type="float", symmetric=True) | weights
    group = dict(
        targets=["Linear"],
        weights=dict(strategy=strategy, dynamic=False) | weights,
        input_activations=activations,
    )
    return dict(
        quant_method="compressed-tensors",
        format="float-quantized",
        quantization_status="compressed",
        ignore=["lm_head"],
        config_groups={"group_0": group},
    )


def pack_floats(module, shape, scale_name, scale_shape, block):
    """Return tensors of float8, and what they are worth, block by block."""
    numbers = RNG.normal(size=shape).astype(jnp.float8_e4m3fn)
    scale = np.exp2(RNG.integers(-4, 3, scale_shape)).astype(np.float32)
    whole = np.empty(shape, np.float32)
    grid = scale.reshape(-1, scale.size // max(1, -(-shape[0] // block[0])))
    for row in range(shape[0]):
        for column in range(shape[1]):
            factor = grid[row // block[0], column // block[1]]
            whole[row, column] = np.float32(numbers[row, column]) * factor
    return {f"{module}.weight": numbers, f"{module}.{scale_name}": scale}, whole


def word(numbers, bits):
    """Return the signed 32-bit word of integers, the first lowest."""
    value = sum(int(x) << (bits * place) for place, x in enumerate(numbers))
    return value - 2**32 if value >= 2**31 else value


def pack_gptq(module, shape, bits, size, *, offset=1, shuffled=False):
    """Pack `[outputs, inputs]` as GPTQ does: words of inputs, zeros less an offset."""
    outputs, inputs = shape
    in_word, groups, top = 32 // bits, inputs // size, 2**bits
    numbers = RNG.integers(0, top, (inputs, outputs))
    zeros = RNG.integers(0, top, (groups, outputs))
    zeros[0, :2] = 0, top - 1
    scales = np.exp2(RNG.integers(-4, 3, (groups, outputs))).astype(np.float16)
    group = np.arange(inputs) // size
    if shuffled:
        RNG.shuffle(group)
    whole = np.empty(shape, np.float32)
    for o in range(outputs):
        for i in range(inputs):
            g = group[i]
            whole[o, i] = float(scales[g, o]) * float(numbers[i, o] - zeros[g, o])
    stored = (zeros - offset) % top
    words = [
        [word(numbers[i : i + in_word, o], bits) for o in range(outputs)]
        for i in range(0, inputs, in_word)
    ]
    zero_words = [
        [word(stored[g, o : o + in_word], bits) for o in range(0, outputs, in_word)]
        for g in range(groups)
    ]
    return {
        f"{module}.qweight": np.array(words, np.int32),
        f"{module}.qzeros": np.array(zero_words, np.int32),
        f"{module}.scales": scales,
        f"{module}.g_idx": group.astype(np.int32),
    }, whole


def pack_awq(module, shape, size):
    """Pack as AWQ does: a word has outputs 0, 2, 4, 6, 1, 3, 5, 7, the first lowest."""
    outputs, inputs = shape
    numbers = RNG.integers(0, 16, (inputs, outputs))
    zeros = RNG.integers(0, 16, (inputs // size, outputs))
    scales = np.exp2(RNG.integers(-4, 3, zeros.shape)).astype(np.float16)
    group = np.arange(inputs) // size

    def words(rows):
        places = [0, 2, 4, 6, 1, 3, 5, 7]
        starts = range(0, outputs, 8)
        return np.array(
            [[word([row[o + p] for p in places], 4) for o in starts] for row in rows],
            np.int32,
        )

    whole = scales[group].astype(np.float32) * (numbers - zeros[group])
    return {
        f"{module}.qweight": words(numbers),
        f"{module}.qzeros": words(zeros),
        f"{module}.scales": scales,
    }, np.ascontiguousarray(whole.T, np.float32)


SCALE = "weight_scale_inv"
# By name: quantization_config, and what packs a matrix of a module and a shape.
CASES = {
    "fp8": (
        FP8 | dict(weight_block_size=[16, 20]),
        lambda m, s: pack_floats(
            m, s, SCALE, (-(-s[0] // 16), -(-s[1] // 20)), (16, 20)
        ),
    ),
    "fp8 in blocks larger than any matrix": (
        FP8 | dict(weight_block_size=[2**31 - 1, 2**31 - 1]),
        lambda m, s: pack_floats(m, s, SCALE, (1, 1), s),
    ),
    "fp8 of a tensor": (
        FP8 | dict(weight_block_size=None, modules_to_not_convert=["lm_head"]),
        lambda m, s: pack_floats(m, s, SCALE, (1,), s),
    ),
    "channels": (
        compressed("channel"),
        lambda m, s: pack_floats(m, s, "weight_scale", (s[0], 1), (1, s[1])),
    ),
    "tensors": (
        compressed("tensor"),
        lambda m, s: pack_floats(m, s, "weight_scale", (1,), s),
    ),
    "blocks": (
        compressed("block", block_structure=[16, 8]),
        lambda m, s: pack_floats(
            m, s, "weight_scale", (-(-s[0] // 16), s[1] // 8), (16, 8)
        ),
    ),
    "gptq": (GPTQ, lambda m, s: pack_gptq(m, s, 4, 8)),
    "gptq in another order": (
        GPTQ | dict(desc_act=True),
        lambda m, s: pack_gptq(m, s, 4, 8, shuffled=True),
    ),
    "gptq, one group": (
        GPTQ | dict(bits=8, group_size=-1, checkpoint_format="gptq"),
        lambda m, s: pack_gptq(m, s, 8, s[1]),
    ),
    "gptq v2": (
        GPTQ | dict(checkpoint_format=None, format="gptq_v2"),
        lambda m, s: pack_gptq(m, s, 4, 8, offset=0),
    ),
    "awq": (AWQ, lambda m, s: pack_awq(m, s, 16)),
}


def save(folder, tensors, settings):
    """Write tensors and a `config.json` that says no more than it must."""
    raw = {
        name: x.view(np.uint8) if x.dtype == jnp.float8_e4m3fn else x
        for name, x in tensors.items()
    }
    save_file(raw, folder / MODEL)
    file = (folder / MODEL).read_bytes()
    size = int.from_bytes(file[:8], "little")
    header = json.loads(file[8 : 8 + size])
    for name, x in tensors.items():
        if x.dtype == jnp.float8_e4m3fn:
            header[name]["dtype"] = "F8_E4M3"
    text = json.dumps(header).encode()
    start = len(text).to_bytes(8, "little")
    (folder / MODEL).write_bytes(start + text + file[8 + size :])
    config = {"model_type": "llama", "quantization_config": settings}
    (folder / "config.json").write_text(json.dumps(config))


def packed(case):
    """Return a checkpoint's tensors, with its layers packed, and as they are whole."""
    settings, pack = CASES[case]
    whole = hf_tensors(CONFIG)
    tensors = dict(whole)
    for name, matrix in whole.items():
        if "proj" in name:
            parts, whole[name] = pack(name.removesuffix(".weight"), matrix.shape)
            del tensors[name]
            tensors |= parts
    return settings, tensors, whole


@pytest.mark.parametrize("case", CASES)
def test_what_was_packed_is_read(tmp_path, case, caplog):
    settings, tensors, whole = packed(case)
    (tmp_path / "whole").mkdir()
    save_file(whole, tmp_path / "whole" / MODEL)
    expected = read_weights(tmp_path / "whole", CONFIG, dtype="float32")
    save(tmp_path, tensors, settings)
    with caplog.at_level(logging.WARNING):
        found = read_weights(tmp_path, CONFIG, dtype="float32")
    assert_trees_equal(found, expected)
    method = settings["quant_method"]
    said = f"7 tensors, quantised by {method}, are dequantised to float32"
    assert said in caplog.text
    for dtype, kind in [("bfloat16", "bfloat16"), (None, "float32")]:
        other = read_weights(tmp_path, CONFIG, dtype=dtype)
        assert_trees_equal(other, jax.tree.map(lambda x, k=kind: x.astype(k), expected))


def without(*names):
    def change(tensors):
        for name in names:
            del tensors[name]

    return change


def replaced(name, array):
    def change(tensors):
        tensors[name] = array

    return change


@pytest.mark.parametrize(
    ("case", "change", "words"),
    [
        ("fp8", without(f"{UP}.{SCALE}"), [f"tensor {UP}.{SCALE} is missing"]),
        (
            "fp8",
            replaced(f"{UP}.{SCALE}", np.ones((3, 3), "f4")),
            [f"{UP}.{SCALE} must have shape (3, 2)", "found (3, 3) and F32"],
        ),
        (
            "channels",
            replaced(f"{UP}.weight_scale", np.ones((48, 1), "i4")),
            ["weight_scale must have shape (48, 1) or (48,)", "I32"],
        ),
        ("fp8", replaced(f"{UP}.bias", np.ones(48, "f4")), [f"superfluous {UP}.bias"]),
        ("gptq", without(f"{UP}.qzeros"), [f"tensor {UP}.qzeros is missing"]),
        (
            "gptq",
            replaced(f"{UP}.scales", np.ones((4, 40), "f2")),
            [f"{UP}.scales must have shape (4, 48)"],
        ),
        (
            "gptq",
            replaced(f"{UP}.g_idx", np.full(32, 4, "i4")),
            [f"{UP}.g_idx must name one of 4 groups, found 4 to 4"],
        ),
        ("gptq in another order", without(f"{UP}.g_idx"), ["g_idx is missing"]),
        ("gptq, one group", replaced(f"{UP}.qweight", NO_ROWS), [f"{UP}.qzeros"]),
        (
            "gptq",
            replaced(f"{UP}.qweight", np.ones((4, 48), "f4")),
            [f"{UP}.qweight must be a matrix of I32, found (4, 48) and F32"],
        ),
        (
            "awq",
            replaced(f"{UP}.qzeros", np.ones((1, 6), "i4")),
            [f"{UP}.qzeros must have shape (2, 6)"],
        ),
    ],
)
def test_damaged_parts_are_named(tmp_path, case, change, words):
    settings, tensors, _ = packed(case)
    change(tensors)
    save(tmp_path, tensors, settings)
    with raises(*words):
        read_weights(tmp_path, CONFIG, dtype="float32")


def test_a_checkpoint_that_is_not_what_it_says(tmp_path):
    save(tmp_path, hf_tensors(CONFIG), FP8)
    with raises("says fp8, but no tensor is packed so", "take the key out"):
        read_weights(tmp_path, CONFIG, dtype="float32")
    save(tmp_path, packed("fp8")[1], None)
    with raises("superfluous", "weight_scale_inv"):
        read_weights(tmp_path, CONFIG, dtype="float32")
    tensors = hf_tensors(CONFIG)
    tensors[f"{UP}.weight"] = tensors[f"{UP}.weight"].astype(jnp.float8_e4m3fn)
    save(tmp_path, tensors, None)
    with raises("found F8_E4M3", "need a quantization_config"):
        read_weights(tmp_path, CONFIG, dtype="float32")


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (3, ["quantization_config=3", "one object"]),
        ({"quant_method": "bitsandbytes"}, ["quant_method='bitsandbytes'", "'fp8'"]),
        ({"bits": 4}, ["quantization_config.quant_method=None"]),
        (FP8 | dict(fmt="e5m2"), ["quantization_config.fmt='e5m2'", "'e4m3'"]),
        (FP8 | dict(activation_scheme="static"), ["activation_scheme='static'"]),
        (FP8 | dict(weight_block_size=[128]), ["weight_block_size=[128]", "rows and"]),
        (
            FP8 | dict(weight_block_size=[0, 1]),
            ["weight_block_size must be a positive"],
        ),
        (FP8 | dict(new_key=1), ["quantization_config.new_key=1 is not known", "fp8"]),
        (GPTQ | dict(bits=3), ["quantization_config.bits=3", "4, 8"]),
        (GPTQ | dict(checkpoint_format="marlin"), ["checkpoint_format='marlin'"]),
        (GPTQ | dict(desc_act="yes"), ["quantization_config.desc_act='yes'"]),
        (GPTQ | dict(checkpoint_format="gptq", format="gptq_v2"), ["format='gptq_v2"]),
        (GPTQ | dict(group_size=0), ["group_size must be a positive integer"]),
        (AWQ | dict(version="gemv"), ["quantization_config.version='gemv'", "'gemm'"]),
        (AWQ | dict(zero_point=False), ["zero_point=False"]),
        (compressed("group"), ["weights.strategy='group'", "'channel'"]),
        (compressed("channel", num_bits=4), ["weights.num_bits=4"]),
        (compressed("channel", type="int"), ["weights.type='int'", "'float'"]),
        (compressed("channel") | dict(config_groups={}), ["config_groups={}"]),
        (compressed("channel") | dict(config_groups={"a": 1}), ["config_groups.a=1"]),
        (compressed("channel") | dict(kv_cache_scheme={"a": 1}), ["kv_cache_scheme="]),
        (
            compressed("channel")
            | dict(config_groups={"a": dict(weights=None, input_activations=None)}),
            ["config_groups.a=", "a group with weights"],
        ),
        (compressed("channel", True), ["group_0.input_activations=True", "dynamic"]),
        (compressed("channel", [8]), ["group_0.input_activations=[8]", "dynamic"]),
    ],
)
def test_schemes_refused(settings, words):
    with raises(*words):
        read_scheme(settings)


def test_groups_must_be_alike_and_activations_dynamic():
    settings = compressed("channel")
    groups = settings["config_groups"]
    groups["group_1"] = compressed("tensor")["config_groups"]["group_0"]
    with raises("config_groups=", "groups with one strategy"):
        read_scheme(settings)
    groups["group_1"]["input_activations"] = {"dynamic": False}
    with raises("group_1.input_activations={'dynamic': False}", "dynamic ones"):
        read_scheme(settings)


def test_no_scheme():
    assert read_scheme(None) is None and read_scheme({}) is None


def test_mxfp4_is_what_transformers_makes_of_it():
    torch = pytest.importorskip("torch")
    mxfp4 = pytest.importorskip("transformers.integrations.mxfp4")
    blocks = RNG.integers(0, 256, (2, 6, 3, 16), np.uint8)
    scales = RNG.integers(100, 140, (2, 6, 3), np.uint8)
    stored = {
        name: Stored(name, array, "U8")
        for name, array in {"x_blocks": blocks, "x_scales": scales}.items()
    }
    scheme = read_scheme(dict(quant_method="mxfp4", modules_to_not_convert=["head"]))
    for dtype, kind in [("F32", torch.float32), ("BF16", torch.bfloat16)]:
        found = hf_packed.dequantised(stored, scheme, dtype)
        assert found.keys() == {"x"} and found["x"].shape == (2, 96, 6)
        expected = mxfp4.convert_moe_packed_tensors(
            torch.from_numpy(blocks), torch.from_numpy(scales), dtype=kind
        )
        values = found["x"].read().astype(np.float32)
        np.testing.assert_array_equal(values, expected.float())
    stored["x_scales"] = Stored("x_scales", scales[:, :5], "U8")
    with raises("x_scales must have shape (2, 6, 3)", "found (2, 5, 3)"):
        hf_packed.dequantised(stored, scheme, "F32")
    stored["x_blocks"] = Stored("x_blocks", blocks[..., :8], "U8")
    with raises("x_blocks must be bytes [E, O, I / 32, 16]", "(2, 6, 3, 8)"):
        hf_packed.dequantised(stored, scheme, "F32")


class Stored:
    path = "file"

    def __init__(self, name, array, dtype):
        self.name, self.array, self.dtype = name, array, dtype
        self.shape = array.shape

    def read(self, start=None, stop=None):
        return self.array[start:stop]


def test_integers_of_a_word():
    words = np.array([[0x76543210, -1]], np.int32)
    rows = hf_packed.unpacked(words, 4, axis=0)
    assert rows.tolist() == [[i, 15] for i in range(8)]
    columns = hf_packed.unpacked(words, 8, axis=1)
    assert columns.tolist() == [[0x10, 0x32, 0x54, 0x76, 255, 255, 255, 255]]
