"""Writing a folder that transformers reads: what is refused."""

import pytest
import tiny

from jaxkv.models.config import Config
from jaxkv.models.hf.export import write_qwen3
from jaxkv.models.rope import Llama3Scaling, Rope

SCALED = Rope(
    theta=7.0,
    scaling=Llama3Scaling(
        factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_positions=32
    ),
)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        (dict(qk_norm=False), "qk_norm=False"),
        (dict(qkv_bias=True, output_bias=True), "qkv_bias=True, output_bias=True"),
        (dict(pre_norm=False, post_norm=True), "pre_norm=False, post_norm=True"),
        (dict(rope=SCALED), "rope=Rope.theta=7.0, scaling=Llama3Scaling"),
    ],
)
def test_no_other_network_is_written_as_qwen3(tmp_path, changes, named):
    config = Config(**vars(tiny.CONFIG) | changes)
    with pytest.raises(ValueError, match=f"write_qwen3: no Qwen3 has {named}"):
        write_qwen3({}, config, tmp_path / "x", bos_id=0, stop_ids=[1], pad_id=2)
    assert not any(tmp_path.iterdir())
