"""AdamW under the official schedule, and the loss-free balancing of experts."""

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from dmax_jax.config import ModelConfig, OptimizerConfig
from dmax_jax.model.params import Moe, Params, param_shardings, param_specs
from dmax_jax.sharding import TRAIN, named_sharding


def learning_rate(config: OptimizerConfig, steps: int) -> optax.Schedule:
    """Linear warm-up from zero, then a cosine to zero at `steps`."""
    warmup = round(config.warmup_ratio * steps)
    return optax.warmup_cosine_decay_schedule(0.0, config.learning_rate, warmup, max(steps, warmup + 1))


def make_optimizer(config: OptimizerConfig, steps: int, model: ModelConfig) -> optax.GradientTransformation:
    """Clips the global norm, then AdamW; norms and `expert_bias` do not decay."""
    decays = jax.tree.map(lambda spec: spec.init == "normal", param_specs(model))
    return optax.chain(
        optax.clip_by_global_norm(config.clip_norm),
        optax.adamw(
            learning_rate(config, steps),
            b1=config.beta1,
            b2=config.beta2,
            weight_decay=config.weight_decay,
            mask=decays,
        ),
    )


def optimizer_shardings(optimizer: optax.GradientTransformation, model: ModelConfig, mesh: Mesh, params: Params):
    """Shardings of the optimiser's state: moments lie where their parameters lie, counters everywhere."""
    everywhere = named_sharding(mesh, TRAIN)
    return optax.tree.map_params(
        optimizer,
        lambda _, sharding: sharding,
        jax.eval_shape(optimizer.init, params),
        param_shardings(model, mesh, TRAIN),
        transform_non_params=lambda _: everywhere,
    )


def balance_experts(params: Params, loads: tuple[jax.Array, ...], rate: float) -> Params:
    """Raises the bias of experts with less than the mean load by `rate`, lowers the others' (no gradient involved)."""
    loads_left = iter(loads)

    def balance(layer):
        if not isinstance(layer.mlp, Moe):
            return layer
        load_E = next(loads_left).astype(jnp.float32)
        bias_E = layer.mlp.expert_bias + rate * jnp.sign(jnp.mean(load_E) - load_E)
        return layer.replace(mlp=layer.mlp.replace(expert_bias=bias_E))

    return params.replace(layers=tuple(balance(layer) for layer in params.layers))
