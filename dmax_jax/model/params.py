"""The parameter tree, and one description per parameter from which values, shardings and counts follow."""

import dataclasses
import math

import jax
import jax.numpy as jnp
from flax import struct
from jax.sharding import Mesh, NamedSharding

from dmax_jax.config import ModelConfig
from dmax_jax.errors import InputError
from dmax_jax.kernels.device_sums import Inbox
from dmax_jax.kernels.quantised_weight import Weight
from dmax_jax.sharding import Rules, named_sharding


@struct.dataclass
class Attention:
    qkv: Weight  # [(N + 2 K) H, D]: all query heads, then keys, then values
    out: Weight  # [D, N H]
    q_norm: jax.Array  # [H]
    k_norm: jax.Array  # [H]


@struct.dataclass
class Mlp:
    gate: Weight  # [F, D], or [E, F, D] for the routed experts of a layer
    up: Weight  # [F, D], or [E, F, D]
    down: Weight  # [D, F], or [E, D, F]


@struct.dataclass
class Moe:
    router: jax.Array  # [E, D]
    expert_bias: jax.Array  # [E], float32; steers the choice of experts, gets no gradient
    experts: Mlp
    shared: Mlp


@struct.dataclass
class Layer:
    attention_norm: jax.Array  # [D]
    attention: Attention
    mlp_norm: jax.Array  # [D]
    mlp: Mlp | Moe


@struct.dataclass
class Params:
    embed: jax.Array  # [V, D]
    layers: tuple[Layer, ...]
    norm: jax.Array  # [D]
    head: Weight  # [V, D]
    inbox: Inbox | None = None  # not a parameter: of a device that shares a model (model/shares.py), while it computes


@dataclasses.dataclass(frozen=True)
class ParamSpec:
    """A parameter's shape, the logical axes of its dimensions, its initial values, and its dtype if that is fixed.

    `quantised` says whether it is a QuantisedWeight in a model with 8-bit weights.
    """

    shape: tuple[int, ...]
    axes: tuple[str | None, ...]
    init: str = "normal"  # normal | ones | zeros
    dtype: str | None = None
    quantised: bool = False


def param_specs(config: ModelConfig) -> Params:
    """The parameter tree with a ParamSpec at every leaf."""
    D, V, H = config.hidden_size, config.vocab_size, config.head_dim

    def norm(width: int, axis: str | None = "embed") -> ParamSpec:
        return ParamSpec((width,), (axis,), init="ones")

    def mlp(width: int) -> Mlp:
        up = ParamSpec((width, D), ("ffn", "embed"), quantised=True)
        return Mlp(gate=up, up=up, down=ParamSpec((D, width), ("embed", "ffn"), quantised=True))

    def experts() -> Mlp:
        E, F = config.num_experts, config.moe_intermediate_size
        up = ParamSpec((E, F, D), ("experts", "expert_ffn", "embed"), quantised=True)
        return Mlp(gate=up, up=up, down=ParamSpec((E, D, F), ("experts", "embed", "expert_ffn"), quantised=True))

    def moe() -> Moe:
        return Moe(
            router=ParamSpec((config.num_experts, D), (None, "embed")),
            expert_bias=ParamSpec((config.num_experts,), (None,), init="zeros", dtype="float32"),
            experts=experts(),
            shared=mlp(config.moe_intermediate_size * config.num_shared_experts),
        )

    def layer(index: int) -> Layer:
        return Layer(
            attention_norm=norm(D),
            attention=Attention(
                qkv=ParamSpec((config.qkv_rows, D), (None, "embed"), quantised=True),  # see model/shares.py
                out=ParamSpec((D, config.num_attention_heads * H), ("embed", "heads"), quantised=True),
                q_norm=norm(H, None),
                k_norm=norm(H, None),
            ),
            mlp_norm=norm(D),
            mlp=mlp(config.intermediate_size) if index < config.first_k_dense_replace else moe(),
        )

    return Params(
        embed=ParamSpec((V, D), (None, "embed")),  # a few rows are read: to split it would save nothing
        layers=tuple(layer(index) for index in range(config.num_hidden_layers)),
        norm=norm(D),
        head=ParamSpec((V, D), ("vocab", "embed"), quantised=True),
    )


def count_params(config: ModelConfig) -> int:
    """Number of scalars in the model, `expert_bias` included."""
    return sum(math.prod(spec.shape) for spec in jax.tree.leaves(param_specs(config)))


def param_shardings(config: ModelConfig, mesh: Mesh, rules: Rules) -> Params:
    """The parameter tree with a NamedSharding at every leaf; raises InputError if the mesh doesn't divide the model."""
    parts, queries, keys = 1, config.num_attention_heads, config.num_key_value_heads
    if rules["heads"] is not None:
        parts = mesh.shape[rules["heads"]]
    if queries % parts or (keys % parts and parts % keys):
        raise InputError(f"mesh: {rules['heads']}:{parts} does not divide {queries} query heads and {keys} key heads")

    def sharding(spec: ParamSpec) -> NamedSharding:
        found = named_sharding(mesh, rules, *spec.axes)
        for size, axis in zip(spec.shape, found.spec, strict=True):
            if axis is not None and size % mesh.shape[axis]:
                raise InputError(f"mesh: {axis}:{mesh.shape[axis]} does not divide a parameter's dimension of {size}")
        return found

    return jax.tree.map(sharding, param_specs(config))


def init_params(key: jax.Array, config: ModelConfig, dtype: jnp.dtype = jnp.float32) -> Params:
    """Random initial values: normal matrices of standard deviation `initializer_range`, unit norms, zero biases."""
    specs, tree = jax.tree.flatten(param_specs(config))
    keys = [jax.random.fold_in(key, index) for index in range(len(specs))]
    values = [initial_value(*pair, config.initializer_range, dtype) for pair in zip(keys, specs, strict=True)]
    return jax.tree.unflatten(tree, values)


def initial_value(key: jax.Array, spec: ParamSpec, deviation: float, dtype: jnp.dtype) -> jax.Array:
    """One parameter's initial values; `deviation` is that of normal ones."""
    dtype = spec.dtype or dtype
    if spec.init == "normal":
        return deviation * jax.random.normal(key, spec.shape, dtype)
    return jnp.full(spec.shape, {"ones": 1, "zeros": 0}[spec.init], dtype)


def cast_params(params: Params, dtype: jnp.dtype) -> Params:
    """Casts weights to the dtype of a computation; `expert_bias` keeps its float32."""

    def cast(path, leaf: jax.Array) -> jax.Array:
        return leaf if path[-1].name == "expert_bias" else leaf.astype(dtype)

    return jax.tree_util.tree_map_with_path(cast, params)
