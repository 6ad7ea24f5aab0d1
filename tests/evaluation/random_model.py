"""A checkpoint that knows nothing, with the demo's tokenizer, for tests of commands."""

import pathlib
import shutil

import jax

from dmax_jax.assets import DEMO
from dmax_jax.checkpoint.huggingface import save_params
from dmax_jax.data.tokenizer import load_tokenizer
from dmax_jax.model.params import init_params
from tests.models import small_model


def write_random_model(directory: pathlib.Path) -> pathlib.Path:
    tokenizer = load_tokenizer(DEMO)
    ids = {"mask_token_id": tokenizer.mask_id, "eos_token_id": tokenizer.eos_id, "pad_token_id": tokenizer.eos_id}
    config = small_model(vocab_size=768, num_hidden_layers=1, max_position_embeddings=512, **ids)
    save_params(init_params(jax.random.key(0), config), config, directory)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(DEMO / name, directory)
    return directory
