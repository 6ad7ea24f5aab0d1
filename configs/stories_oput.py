"""On-policy uniform training of the stories model, on the base model's own answers.

Hardware: one H200.
"""

from dmax_jax.config import CheckpointConfig, DataConfig, ObjectiveConfig, OptimizerConfig, RunConfig


def get_config() -> RunConfig:
    return RunConfig(
        initial_checkpoint="runs/stories_base",
        data=DataConfig(path="runs/stories_answers.jsonl", sequence_length=192, workers=10),
        steps=2000,
        batch_size=256,
        objective=ObjectiveConfig(kind="oput", schedule="joint", rollout="argmax"),
        optimizer=OptimizerConfig(learning_rate=2e-4, beta2=0.98),
        checkpoint=CheckpointConfig(every_steps=1000),
        log_every=50,
    )
