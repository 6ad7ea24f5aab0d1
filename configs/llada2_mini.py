"""LLaDA-2.0-mini: 16,255,643,392 parameters, 20 layers of which 19 hold 256 experts each.

For `python -m dmax_jax.benchmark decode`, which makes random weights of this shape: 33 GB in bfloat16, so one H200. The
training settings are the paper's (batch 8, 2048 tokens, learning rate 2e-6, two epochs of 0.7 million answers); to use
them, set `data.path`, and `initial_checkpoint` to the converted model in place of `model`. No such training ran yet.
"""

from dmax_jax.config import DataConfig, ModelConfig, ObjectiveConfig, OptimizerConfig, RunConfig


def get_config() -> RunConfig:
    return RunConfig(
        model=ModelConfig(
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
            num_shared_experts=1,
            moe_intermediate_size=512,
            first_k_dense_replace=1,
            routed_scaling_factor=2.5,
            rope_theta=600000.0,
            partial_rotary_factor=0.5,
            rms_norm_eps=1e-6,
            mask_token_id=156895,
            eos_token_id=156892,
            pad_token_id=156892,
        ),
        data=DataConfig(path="answers.jsonl", sequence_length=2048),
        steps=175_000,
        batch_size=8,
        objective=ObjectiveConfig(kind="oput", mask_rate_low=0.75, mask_rate_high=0.75),
        optimizer=OptimizerConfig(learning_rate=2e-6),
    )
