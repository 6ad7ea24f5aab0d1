"""The table between the parameter tree and the tensors of the Hugging Face layout."""

import dataclasses

from dmax_jax.config import ModelConfig
from dmax_jax.model.params import Attention, Layer, Mlp, Moe, Params


@dataclasses.dataclass(frozen=True)
class Stored:
    """Where one parameter lies in a checkpoint: in one tensor, or in one per expert, stacked in the tree.

    `name` holds `{expert}` if there are `experts`. The official training code stores the stack itself, as `merged`.
    """

    name: str
    experts: int = 0
    merged: str = ""

    @property
    def tensors(self) -> list[str]:
        """Names of the split form, in the order of the stack."""
        return [self.name.format(expert=expert) for expert in range(self.experts)] if self.experts else [self.name]


def tensor_names(config: ModelConfig) -> Params:
    """The parameter tree with a Stored at every leaf."""

    def mlp(prefix: str) -> Mlp:
        return Mlp(**{name: Stored(f"{prefix}.{name}_proj.weight") for name in ("gate", "up", "down")})

    def experts(prefix: str) -> Mlp:
        def stack(name: str) -> Stored:
            return Stored(f"{prefix}.{{expert}}.{name}.weight", config.num_experts, merged=f"{prefix}.{name}")

        return Mlp(gate=stack("gate_proj"), up=stack("up_proj"), down=stack("down_proj"))

    def moe(prefix: str) -> Moe:
        return Moe(
            router=Stored(f"{prefix}.gate.weight"),
            expert_bias=Stored(f"{prefix}.gate.expert_bias"),
            experts=experts(f"{prefix}.experts"),
            shared=mlp(f"{prefix}.shared_experts"),
        )

    def layer(index: int) -> Layer:
        prefix = f"model.layers.{index}"
        return Layer(
            attention_norm=Stored(f"{prefix}.input_layernorm.weight"),
            attention=Attention(
                qkv=Stored(f"{prefix}.attention.query_key_value.weight"),
                out=Stored(f"{prefix}.attention.dense.weight"),
                q_norm=Stored(f"{prefix}.attention.query_layernorm.weight"),
                k_norm=Stored(f"{prefix}.attention.key_layernorm.weight"),
            ),
            mlp_norm=Stored(f"{prefix}.post_attention_layernorm.weight"),
            mlp=(mlp if index < config.first_k_dense_replace else moe)(f"{prefix}.mlp"),
        )

    return Params(
        embed=Stored("model.word_embeddings.weight"),
        layers=tuple(layer(index) for index in range(config.num_hidden_layers)),
        norm=Stored("model.norm.weight"),
        head=Stored("lm_head.weight"),
    )
