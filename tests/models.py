"""The models that several tests share: those of the golden values, and one that compiles quickly."""

import dataclasses
import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np

from dmax_jax.checkpoint.layout import load_checkpoint
from dmax_jax.config import ModelConfig
from dmax_jax.model.params import Params, ParamSpec, param_specs
from tests.conftest import GOLDEN

SMALL = ModelConfig(
    vocab_size=48,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    num_experts=6,
    num_experts_per_tok=2,
    n_group=3,
    topk_group=2,
    num_shared_experts=1,
    moe_intermediate_size=16,
    first_k_dense_replace=1,
    routed_scaling_factor=2.5,
    rope_theta=10000.0,
    partial_rotary_factor=0.5,
    rms_norm_eps=1e-6,
    mask_token_id=47,
    eos_token_id=45,
    pad_token_id=45,
    max_position_embeddings=128,
    initializer_range=0.3,
)


def small_model(**changes) -> ModelConfig:
    return dataclasses.replace(SMALL, **changes)


@functools.cache
def golden_model(name: str) -> tuple[ModelConfig, Params]:
    return load_checkpoint(GOLDEN / name / "checkpoint")


@functools.cache
def random_params(config: ModelConfig, seed: int = 0) -> Params:
    """Random weights as those of init_params, without its compilation."""
    rng = np.random.default_rng(seed)

    def values(spec: ParamSpec) -> np.ndarray:
        if spec.init == "normal":
            return (config.initializer_range * rng.normal(size=spec.shape)).astype(np.float32)
        return np.full(spec.shape, {"ones": 1, "zeros": 0}[spec.init], np.float32)

    return jax.tree.map(values, param_specs(config))


@functools.cache
def small_params() -> Params:
    return jax.tree.map(jnp.asarray, random_params(SMALL))


def load_arrays(path: pathlib.Path) -> dict[str, np.ndarray]:
    with np.load(path) as file:
        return dict(file)
