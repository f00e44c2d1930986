"""Run by test_sharding.py as one of two processes, each with four devices of eight.

Takes a folder with a checkpoint, the address of the first process and its own number;
prints the tokens that it got over each mesh. With the folder alone it is the only
process, and uses one device.
"""

import json
import sys

import jax

import jaxkv

PROMPTS = [[3, 4, 5, 6], [7, 8], [9, 1, 2, 3, 4]]
MESHES = ["data=2,model=4", "data=4,model=2"]
OPTIONS = dict(
    max_new_tokens=6,
    budget=5,
    prefill=jaxkv.StreamingLLM(n_sink=1),
    decode=jaxkv.LongFlow(),
    sampler=jaxkv.Categorical(),
    stop_ids=[],
)


def tokens(lm):
    return jaxkv.generate(lm, PROMPTS, **OPTIONS).tokens


if __name__ == "__main__":
    folder, *process = sys.argv[1:]
    meshes = [None] * len(MESHES)
    if process:
        address, number = process
        jax.distributed.initialize(address, num_processes=2, process_id=int(number))
        assert (jax.device_count(), jax.local_device_count()) == (8, 4)
        meshes = MESHES
    print(json.dumps([tokens(jaxkv.load(folder, mesh=mesh)) for mesh in meshes]))
