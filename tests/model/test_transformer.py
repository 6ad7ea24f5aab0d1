import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dmax_jax.model.cache import empty_cache, write_cache
from dmax_jax.model.masks import block_causal_mask
from dmax_jax.model.params import cast_params
from dmax_jax.model.transformer import embed, transformer, unembed
from tests.conftest import GOLDEN
from tests.models import SMALL, golden_model, load_arrays, small_params

BLOCK = 4


@functools.partial(jax.jit, static_argnums=2)
def block_causal_logits(params, tokens_BT, config, block_length=8):
    length = tokens_BT.shape[1]
    x_BTD, positions = embed(params, tokens_BT), jnp.arange(length)[None]
    out = transformer(params, x_BTD, positions, block_causal_mask(length, block_length), config)
    return unembed(params, out.hidden_BTD), out


@pytest.fixture(scope="module")
def params():
    return small_params()


@pytest.fixture(scope="module")
def tokens():
    return jax.random.randint(jax.random.key(1), (2, 24), 0, SMALL.vocab_size)


def relative_error(found, expected) -> float:
    return float(np.abs(found - expected).max() / np.abs(expected).max())


def test_logits_equal_the_official_code(golden):
    config, params = golden_model(golden.name)
    expected = load_arrays(golden / "forward.npz")
    logits, _ = block_causal_logits(params, expected["block_causal_ids"], config)
    assert logits.dtype == jnp.float32
    assert relative_error(logits, expected["block_causal_logits"]) < 1e-4


def test_bfloat16_stays_close_to_float32():
    config, params = golden_model("calm")
    expected = load_arrays(GOLDEN / "calm" / "forward.npz")
    logits, out = block_causal_logits(cast_params(params, jnp.bfloat16), expected["block_causal_ids"], config)
    assert out.hidden_BTD.dtype == jnp.bfloat16
    assert logits.dtype == jnp.float32
    error = np.linalg.norm(logits - expected["block_causal_logits"])
    assert error < 0.1 * np.linalg.norm(expected["block_causal_logits"])


def test_a_cache_changes_nothing(params, tokens):
    """Each row has a place of its own: row 0 goes on after 8 cached positions, row 1 after 16."""
    whole_BTV, whole = block_causal_logits(params, tokens, SMALL, BLOCK)
    starts = [8, 16]

    @jax.jit
    def run_block(params, prefix):
        start_B = jnp.array(starts)
        cache = write_cache(empty_cache(SMALL, 2, 24, jnp.float32), prefix, jnp.array([0, 0]), jnp.array([True, True]))
        positions_BT = start_B[:, None] + jnp.arange(BLOCK)[None]
        own_BT = jnp.take_along_axis(tokens, positions_BT, axis=1)
        seen_BTS = jnp.broadcast_to((jnp.arange(24)[None] < start_B[:, None])[:, None], (2, BLOCK, 24))
        mask_BTS = jnp.concatenate([seen_BTS, jnp.ones((2, BLOCK, BLOCK), bool)], axis=2)
        out = transformer(params, embed(params, own_BT), positions_BT, mask_BTS, SMALL, cache=cache)
        return unembed(params, out.hidden_BTD), out.kv

    logits_BTV, kv = run_block(params, jax.tree.map(lambda leaf: leaf[:, :16], whole.kv))
    expected = [jax.tree.map(lambda leaf: leaf[row, starts[row] :][:BLOCK], (whole_BTV, whole.kv)) for row in (0, 1)]  # noqa: B023
    jax.tree.map(
        lambda found, *rows: np.testing.assert_allclose(found, np.stack(rows), atol=2e-5), (logits_BTV, kv), *expected
    )


def test_later_blocks_are_invisible(params, tokens):
    logits, _ = block_causal_logits(params, tokens, SMALL, BLOCK)
    changed, _ = block_causal_logits(params, tokens.at[:, 13].add(1), SMALL, BLOCK)
    np.testing.assert_array_equal(logits[:, :12], changed[:, :12])
    assert (jnp.abs(logits[:, 12:] - changed[:, 12:]).max(-1) > 1e-3).all()  # its own block and all later ones


def test_every_row_chooses_its_experts_in_every_sparse_layer(params, tokens):
    _, out = block_causal_logits(params, tokens, SMALL, BLOCK)
    assert [load.sum() for load in out.loads] == [tokens.size * SMALL.num_experts_per_tok]
    assert len(out.kv) == SMALL.num_hidden_layers


def test_a_cache_is_written_at_each_rows_place_and_only_where_asked():
    rng = np.random.default_rng(0)
    config = SMALL
    shape = (config.num_key_value_heads, config.head_dim)
    old = jax.tree.map(lambda leaf: rng.normal(size=leaf.shape), empty_cache(config, 3, 10, jnp.float32))
    new = jax.tree.map(lambda leaf: rng.normal(size=(3, 4, *shape)), old)
    written = write_cache(old, new, jnp.array([0, 2, 6]), jnp.array([True, False, True]))

    def check(written, old, new):
        expected = old.copy()
        expected[0, 0:4], expected[2, 6:10] = new[0], new[2]
        np.testing.assert_allclose(written, expected, rtol=1e-6)

    jax.tree.map(check, written, old, new)
