"""Run by test_sharding.py, where JAX finds eight devices: loading over a mesh.

Prints "equal" where each kind of file gives each device what `spread` would have given
it, read in parts, and rows that do not divide get what they get on one device.
"""

import importlib.util
from pathlib import Path

import gguf_files
import jax
import numpy as np
from hf_checkpoints import write_checkpoint, write_config

import jaxkv
from jaxkv import sharding
from jaxkv.models.hf import weights as hf_weights
from jaxkv.runtime.meshes import mesh_of

PROMPTS = [[3, 4, 5, 6], [7, 8], [9, 1, 2, 3, 4]]
READ = []  # shapes of what was read of matrices


def listening(read):
    def run(tensor, *arguments):
        found = read(tensor, *arguments)
        READ.append((found.shape, tensor.shape))
        return found

    return run


def check(name, alone):
    """Raise unless a model over a mesh is the one on one device, laid out."""
    network, wanted = sharding.spread(
        alone.network, alone.params, sharding.make_mesh(data=2, model=4)
    )
    lm = jaxkv.load(name, mesh="data=2,model=4")
    assert lm.network == network and "on 8 devices" in repr(lm)
    assert lm.identity == alone.identity

    def same(path, one, two):
        where = jax.tree_util.keystr(path)
        np.testing.assert_array_equal(one, two, err_msg=where)
        assert one.sharding == two.sharding, (where, one.sharding, two.sharding)

    jax.tree_util.tree_map_with_path(same, lm.params, wanted)
    return lm


def generated(lm):
    said = []
    found = jaxkv.generate(
        *(lm, PROMPTS),
        max_new_tokens=6,
        budget=[4, 3, 5],
        prefill=jaxkv.StreamingLLM(n_sink=1),
        sampler=jaxkv.Categorical(),
        seed=[5, 6, 7],
        stop_ids=[],
        on_tokens=said.append,
        logprobs=True,
    )
    assert {len(new) for new in said} == {len(PROMPTS)}
    assert found.stats.prompt_tokens == (4, 2, 5)
    return found


def served(lm):
    engine = jaxkv.Engine(lm, rows=4, max_prompt=32, max_new_tokens=6, block=4)
    handles = [engine.submit([3, 4, 5 + i], max_new_tokens=5) for i in range(5)]
    return [engine.wait(handle).tokens for handle in handles]


def refuses(mesh, said):
    try:
        jaxkv.load("hf", mesh=mesh)
    except ValueError as error:
        assert said in str(error), error
    else:
        raise AssertionError(f"{mesh} was not refused")


if __name__ == "__main__":
    Path("hf").mkdir()
    write_checkpoint(write_config(Path("hf")))
    alone = jaxkv.load("hf")
    jaxkv.save(alone, "orbax")
    hf_weights._Tensor.read = listening(hf_weights._Tensor.read)
    lm = check("hf", alone)
    # A device has a quarter of each matrix, and at most half of what makes heads.
    matrices = [(got, whole) for got, whole in READ if len(whole) == 2]
    assert matrices and all(
        np.prod(got) <= np.prod(whole) // 2 for got, whole in matrices
    )
    check("orbax", alone)
    if importlib.util.find_spec("gguf"):
        sizes = dict(hidden_size=32, intermediate_size=32, head_dim=8)
        _, keys, tensors = gguf_files.tiny(**sizes)
        gguf_files.write("file.gguf", keys, tensors, kind="Q8_0")
        check("file.gguf", jaxkv.load("file.gguf"))
    assert served(alone) == served(lm)
    one, many = generated(alone), generated(lm)
    assert one.tokens == many.tokens and one.finish_reason == many.finish_reason
    np.testing.assert_allclose(
        np.concatenate(one.logprobs), np.concatenate(many.logprobs), atol=1e-5
    )
    # No head is left for a fourth device, but for copies: 2 heads, 12 and 20 columns.
    assert dict(mesh_of(jaxkv.load("hf", mesh="auto").params).shape) == dict(
        data=2, model=2, copies=2
    )
    refuses("model=8", "12 feed-forward columns do not divide over model=8 devices")
    refuses("data=3,model=4", "takes 12 devices, but there are 8")
    print("equal")
