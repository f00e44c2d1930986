"""The tiny network of the laws, and one that is counted by hand."""

from pathlib import Path

from jaxkv.language_model import LanguageModel
from jaxkv.laws.network import CONFIG as CONFIG
from jaxkv.laws.network import NETWORK as NETWORK
from jaxkv.laws.network import parameters as parameters
from jaxkv.laws.network import params as params
from jaxkv.laws.network import prompts as prompts
from jaxkv.models.config import Config
from jaxkv.models.decoder import Decoder

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


def language_model(folder=Path(), *, config=CONFIG, weights=None, tokenizer=None):
    """Return a model of the laws' network, or of another, that never stops."""
    return LanguageModel(
        name="tiny",
        folder=folder,
        network=Decoder(config),
        params=params() if weights is None else weights,
        tokenizer=tokenizer,
        stop_ids=(),
    )
