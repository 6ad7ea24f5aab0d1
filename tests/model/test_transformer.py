import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dmax_jax.checkpoint.huggingface import load_params
from dmax_jax.checkpoint.hf_config import read_config
from dmax_jax.model.cache import empty_cache, write_cache
from dmax_jax.model.masks import block_causal_mask, two_stream_mask
from dmax_jax.model.transformer import embed, transformer, unembed


@pytest.fixture
def model(golden):
    config = read_config(golden / "checkpoint")
    return config, load_params(golden / "checkpoint", config)


def logits_of(params, config, tokens_BT, mask):
    positions = jnp.arange(tokens_BT.shape[1])[None]
    return unembed(params, transformer(params, embed(params, tokens_BT), positions, mask, config).hidden_BTD)


def test_logits_equal_the_official_code(golden, model):
    config, params = model
    expected = np.load(golden / "forward.npz")
    ids = expected["block_causal_ids"]
    logits = logits_of(params, config, ids, block_causal_mask(ids.shape[1], 8))
    error = np.abs(logits - expected["block_causal_logits"]).max() / np.abs(expected["block_causal_logits"]).max()
    assert error < 1e-4
