import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dmax_jax.checkpoint.names import tensor_names
from dmax_jax.config import MeshConfig
from dmax_jax.errors import InputError
from dmax_jax.model.params import cast_params, count_params, init_params, param_shardings, param_specs
from dmax_jax.sharding import DECODE, TRAIN, make_mesh
from tests.models import SMALL, small_model, small_params

MINI = small_model(
    vocab_size=157184,
    hidden_size=2048,
    intermediate_size=5120,
    num_hidden_layers=20,
    num_attention_heads=16,
    num_key_value_heads=4,
    head_dim=128,
    num_experts=256,
    num_experts_per_tok=8,
    n_group=8,
    topk_group=4,
    moe_intermediate_size=512,
)
FLASH_SHAPE = {
    "hidden_size": 4096,
    "intermediate_size": 9216,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "moe_intermediate_size": 1024,
}


@pytest.mark.parametrize(
    ("changes", "parameters", "tensors"),
    [({}, 16_255_643_392, 14_813), (FLASH_SHAPE, 102_889_705_216, 24_161)],
    ids=["mini", "flash"],
)
def test_the_published_models_have_their_published_size(changes, parameters, tensors):
    config = small_model(**{name: getattr(MINI, name) for name in MINI.__dataclass_fields__} | changes)
    assert count_params(config) == parameters
    assert sum(max(stored.experts, 1) for stored in jax.tree.leaves(tensor_names(config))) == tensors


def by_name(tree) -> dict:
    return {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def test_initial_values_follow_the_specs():
    initial = jax.jit(lambda key: init_params(key, SMALL, jnp.bfloat16))(jax.random.key(0))
    params, specs = by_name(initial), by_name(param_specs(SMALL))
    assert params.keys() == specs.keys()
    for name, leaf in params.items():
        assert leaf.shape == specs[name].shape, name
        assert leaf.dtype == ("float32" if "expert_bias" in name else "bfloat16"), name
        values = np.asarray(leaf, np.float32)
        if "norm" in name:
            assert (values == 1).all(), name
        elif "expert_bias" in name:
            assert (values == 0).all(), name
        else:
            # Five standard errors of a standard deviation, and of a mean.
            assert abs(values.std() / SMALL.initializer_range - 1) < 5 / np.sqrt(2 * values.size), name
            assert abs(values.mean()) / SMALL.initializer_range < 5 / np.sqrt(values.size), name
    matrices = [leaf for name, leaf in params.items() if "gate" in name]
    assert len({np.asarray(matrix, np.float32).flat[0] for matrix in matrices}) == len(matrices)


def test_casting_keeps_the_expert_bias_in_float32():
    params = small_params()
    bias = jnp.arange(6) + 1e-4
    layers = (params.layers[0], params.layers[1].replace(mlp=params.layers[1].mlp.replace(expert_bias=bias)))
    cast = by_name(cast_params(params.replace(layers=layers), jnp.bfloat16))
    np.testing.assert_array_equal(cast.pop(".layers[1].mlp.expert_bias"), bias)
    assert {leaf.dtype for leaf in cast.values()} == {jnp.dtype(jnp.bfloat16)}


@pytest.mark.parametrize(
    ("rules", "expected"),
    [
        (
            TRAIN,
            {
                ".layers[1].mlp.experts.gate": (3, 16, 32),
                ".layers[1].mlp.experts.up": (3, 16, 32),
                ".layers[1].mlp.experts.down": (3, 32, 16),
            },
        ),
        (
            DECODE,
            {
                ".head": (24, 32),
                ".layers[0].attention.out": (32, 16),
                ".layers[0].mlp.gate": (24, 32),
                ".layers[0].mlp.up": (24, 32),
                ".layers[0].mlp.down": (32, 24),
                ".layers[1].attention.out": (32, 16),
                ".layers[1].mlp.experts.gate": (6, 8, 32),
                ".layers[1].mlp.experts.up": (6, 8, 32),
                ".layers[1].mlp.experts.down": (6, 32, 8),
                ".layers[1].mlp.shared.gate": (8, 32),
                ".layers[1].mlp.shared.up": (8, 32),
                ".layers[1].mlp.shared.down": (32, 8),
            },
        ),
    ],
    ids=["train", "decode"],
)
def test_what_a_device_holds_of_each_parameter(rules, expected):
    mesh = make_mesh(MeshConfig(data=2, expert=2, tensor=2))
    specs, shardings = by_name(param_specs(SMALL)), by_name(param_shardings(SMALL, mesh, rules))
    held = {name: shardings[name].shard_shape(spec.shape) for name, spec in specs.items()}
    assert held == {name: spec.shape for name, spec in specs.items()} | expected


def test_an_axis_that_does_not_divide_is_named():
    with pytest.raises(InputError, match="expert:5 does not divide a parameter's dimension of"):
        param_shardings(small_model(), make_mesh(MeshConfig(data=1, expert=5)), TRAIN)


@pytest.mark.parametrize(("queries", "keys", "devices"), [(4, 2, 8), (4, 2, 3), (12, 6, 4)])
def test_heads_that_devices_can_not_share_are_named(queries, keys, devices):
    model = small_model(num_attention_heads=queries, num_key_value_heads=keys)
    message = f"tensor:{devices} does not divide {queries} query heads and {keys} key heads"
    with pytest.raises(InputError, match=message):
        param_shardings(model, make_mesh(MeshConfig(data=1, tensor=devices)), DECODE)
