"""The tiny network of the laws, and one that is counted by hand."""

from jaxkv.laws.network import CONFIG as CONFIG
from jaxkv.laws.network import NETWORK as NETWORK
from jaxkv.laws.network import parameters as parameters
from jaxkv.laws.network import params as params
from jaxkv.laws.network import prompts as prompts
from jaxkv.models.decoder import Config

BY_HAND = Config(  # so small that its numbers are counted by hand
    vocab_size=10,
    hidden_size=4,
    intermediate_size=6,
    num_layers=1,
    num_heads=2,
    num_kv_heads=1,
    head_dim=2,
    max_positions=64,
)
