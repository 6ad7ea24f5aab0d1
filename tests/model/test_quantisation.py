import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dmax_jax.config import MeshConfig
from dmax_jax.errors import InputError
from dmax_jax.kernels.quantised_weight import KINDS, QuantisedWeight
from dmax_jax.model.cache import empty_cache
from dmax_jax.model.masks import BlockPattern, CachedBlocks, block_causal_mask
from dmax_jax.model.params import cast_params, init_params, param_shardings
from dmax_jax.model.quantisation import (
    dequantise_params,
    in_kind,
    quantise_params,
    quantised_shardings,
    quantised_specs,
    weights_kind,
)
from dmax_jax.model.transformer import embed, transformer, unembed
from dmax_jax.sharding import DECODE, TRAIN, make_mesh
from tests.models import SMALL, golden_model, small_model, small_params

MANY_EXPERTS = small_model(num_experts=12)  # beyond those that are multiplied with every row
BLOCK = 8

of_both_kinds = pytest.mark.parametrize("kind", KINDS)
each_with_a_kind = pytest.mark.parametrize(("config", "kind"), [(SMALL, "int8"), (MANY_EXPERTS, "fp8")])


def by_name(tree) -> dict:
    return {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


@functools.cache
def params_of(config):
    return init_params(jax.random.key(0), config)


def mask_of(length):
    return block_causal_mask(length, BLOCK)


VISIBLE = {"mask": mask_of, "pattern": lambda length: BlockPattern(BLOCK)}


@functools.partial(jax.jit, static_argnames=("config", "visible"))
def logits_of(params, tokens_BT, config, visible="mask"):
    T = tokens_BT.shape[1]
    out = transformer(params, embed(params, tokens_BT), jnp.arange(T)[None], VISIBLE[visible](T), config)
    return unembed(params, out.hidden_BTD)


@functools.partial(jax.jit, static_argnames="config")
def logits_over_a_cache(params, tokens_BT, config):
    cache = jax.tree.map(lambda zeros: zeros + 0.1, empty_cache(config, 2, 64, params.embed.dtype))
    visible = CachedBlocks(jnp.array([BLOCK, 2 * BLOCK]), jnp.array([True, False]), BLOCK)
    positions = jnp.arange(tokens_BT.shape[1])[None]
    out = transformer(params, embed(params, tokens_BT), positions, visible, config, cache=cache)
    return unembed(params, out.hidden_BTD)


def relative_error(found, expected) -> float:
    found, expected = np.asarray(found), np.asarray(expected)
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


@of_both_kinds
def test_matrices_are_in_8_bits_and_what_chooses_and_normalises_is_not(kind):
    params = small_params()
    quantised = quantise_params(params, SMALL, kind)
    assert (weights_kind(quantised), weights_kind(params)) == (kind, None)
    dtypes = {name: leaf.dtype for name, leaf in by_name(quantised).items()}
    matrices = {name.removesuffix(".values") for name, dtype in dtypes.items() if dtype == KINDS[kind]}
    attention = {f".layers[{layer}].attention.{name}" for layer in (0, 1) for name in ("qkv", "out")}
    mlps = {f".layers{mlp}.{name}" for mlp in ("[0].mlp", "[1].mlp.experts", "[1].mlp.shared")
            for name in ("gate", "up", "down")}  # fmt: skip
    assert matrices == attention | mlps | {".head"}
    unchanged = by_name(params).keys() - matrices
    assert unchanged == dtypes.keys() - {f"{name}.{part}" for name in matrices for part in ("values", "scale")}
    for name in unchanged:
        np.testing.assert_array_equal(by_name(quantised)[name], by_name(params)[name])


@of_both_kinds
def test_a_kind_is_kept_or_rounded_to_and_never_rounded_again(kind):
    quantised = quantise_params(small_params(), SMALL, kind)
    jax.tree.map(np.testing.assert_array_equal, in_kind(small_params(), SMALL, kind), quantised)
    assert in_kind(quantised, SMALL, kind) is in_kind(quantised, SMALL, None) is quantised
    plain = dequantise_params(quantised, jnp.float32)
    jax.tree.map(np.testing.assert_array_equal, in_kind(quantised, SMALL, "bf16"), plain)
    (other,) = KINDS.keys() - {kind}
    with pytest.raises(InputError, match=f"--weights={other}: the checkpoint's weights are {kind}, already rounded"):
        in_kind(quantised, SMALL, other)


@of_both_kinds
def test_the_specs_describe_the_real_ones(kind):
    quantised = quantise_params(small_params(), SMALL, kind)
    described = jax.tree.map(lambda spec: (spec.shape, spec.dtype or "float32"), quantised_specs(SMALL, kind))
    assert described == jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype.name), quantised)


@pytest.mark.parametrize("config", [SMALL, MANY_EXPERTS], ids=["few experts", "many experts"])
@pytest.mark.parametrize(("length", "kind"), [(16, "fp8"), (96, "int8")])
def test_the_model_is_that_of_the_dequantised_weights(config, length, kind):
    """Two rows of 96 positions are more than those that experts are looped over for."""
    quantised = quantise_params(params_of(config), config, kind)
    plain = dequantise_params(quantised, jnp.float32)
    assert weights_kind(plain) is None
    assert jax.tree.structure(plain) == jax.tree.structure(params_of(config))
    tokens_BT = jax.random.randint(jax.random.key(1), (2, length), 0, config.vocab_size)
    for logits in (logits_of, functools.partial(logits_of, visible="pattern"), logits_over_a_cache):
        if logits is logits_over_a_cache:
            tokens_BT = tokens_BT[:, : 2 * BLOCK]
        expected = logits(plain, tokens_BT, config=config)
        assert relative_error(logits(quantised, tokens_BT, config=config), expected) < 1e-5
        original = logits(params_of(config), tokens_BT, config=config)
        assert relative_error(expected, original) > 1e-3  # the test would see if nothing were rounded


@pytest.mark.parametrize(("kind", "bound"), [("int8", 0.05), ("fp8", 0.15)])
def test_8_bits_cost_a_model_of_the_official_code_little(kind, bound):
    config, params = golden_model("calm")
    tokens_BT = jax.random.randint(jax.random.key(1), (2, 32), 0, config.vocab_size)
    expected = logits_of(params, tokens_BT, config)
    assert relative_error(logits_of(quantise_params(params, config, kind), tokens_BT, config), expected) < bound


@each_with_a_kind
def test_bfloat16(config, kind):
    quantised = quantise_params(params_of(config), config, kind)
    plain = dequantise_params(quantised, jnp.float32)
    narrow = quantise_params(cast_params(plain, jnp.bfloat16), config, kind).replace(head=quantised.head)
    tokens_BT = jax.random.randint(jax.random.key(1), (2, 16), 0, config.vocab_size)
    logits = logits_of(narrow, tokens_BT, config)
    assert logits.dtype == jnp.float32
    assert relative_error(logits, logits_of(plain, tokens_BT, config)) < 0.1


@of_both_kinds
@pytest.mark.parametrize("rules", [DECODE, TRAIN], ids=["decode", "train"])
def test_scales_lie_beside_their_channels(rules, kind):
    mesh = make_mesh(MeshConfig(data=1, expert=2, tensor=2))
    shardings = param_shardings(SMALL, mesh, rules)
    quantised = quantise_params(jax.device_put(small_params(), shardings), SMALL, kind)
    found = jax.tree.map(lambda leaf: leaf.sharding, quantised)
    assert found == quantised_shardings(shardings, SMALL)
    jax.tree.map(np.testing.assert_array_equal, quantised, quantise_params(small_params(), SMALL, kind))
    held = {name: leaf.sharding.shard_shape(leaf.shape) for name, leaf in by_name(quantised).items()}
    experts, ffn = (6, 8) if rules is DECODE else (3, 16)
    assert held[".layers[1].mlp.experts.gate.values"] == (experts, ffn, 32)
    assert held[".layers[1].mlp.experts.gate.scale"] == (experts, ffn)
    assert held[".layers[1].mlp.experts.down.values"] == (experts, 32, ffn)
    assert held[".layers[1].mlp.experts.down.scale"] == (experts, 32)
    assert held[".head.scale"] == held[".head.values"][:1]
    restored = dequantise_params(quantised, jnp.float32)
    assert jax.tree.map(lambda leaf: leaf.sharding, restored) == shardings


@each_with_a_kind
def test_a_mesh_changes_nothing(config, kind):
    quantised = quantise_params(params_of(config), config, kind)
    mesh = make_mesh(MeshConfig(data=1, tensor=2))
    spread = jax.device_put(quantised, quantised_shardings(param_shardings(config, mesh, DECODE), config))
    tokens_BT = jax.random.randint(jax.random.key(1), (2, 2 * BLOCK), 0, config.vocab_size)
    assert relative_error(
        logits_over_a_cache(spread, tokens_BT, config), logits_over_a_cache(quantised, tokens_BT, config)
    ) < 1e-5  # fmt: skip


@of_both_kinds
def test_donated_weights_make_room_one_by_one(kind):
    given = jax.tree.map(jnp.copy, small_params())
    quantised = in_kind(given, SMALL, kind, donate=True)
    jax.tree.map(np.testing.assert_array_equal, quantised, quantise_params(small_params(), SMALL, kind))
    for old, new in zip(jax.tree.leaves(given), jax.tree.leaves(quantised, is_leaf=is_quantised), strict=True):
        assert old.is_deleted() == is_quantised(new)


def is_quantised(leaf) -> bool:
    return isinstance(leaf, QuantisedWeight)
