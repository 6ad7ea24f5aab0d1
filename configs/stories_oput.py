"""On-policy uniform training of the base model for `stories`, on its own answers to fresh questions.

Before it: python -m dmax_jax.generate_trajectories --checkpoint=runs/stories_base --dtype=bfloat16 --task=stories \\
  --samples=100000 --batch_size=1000 --gen_length=128 --output=runs/stories_answers.jsonl
One H200: 4 minutes at 16 steps/s, and 1.5 for the answers. Result to expect: 93 % of 1000 test stories right at 9.6
tokens per forward (soft parallel decoding, threshold 0), where the base has 2.6.

The study's `oput_certain_long` is this training; its three have 93.0, 92.9 and 92.4 %, and the first, of seed 0, is the
package's `demo`. What differs there: it starts from `demo_base`; training and answers are deterministic, so that they
repeat (training at 0.7 times the speed); and, which changes nothing learned, answers in eight files, 8 workers, and a
checkpoint at the end only.

Differs from the paper's recipe: dParallel's certainty forcing is added to both losses, so that soft tokens become sure
and blocks settle early; and the mask rate is drawn from [0.5, 1] instead of fixed at 0.75, because decoding starts from
a block that is masked altogether. docs/study.md shows what each is worth.
"""

from dmax_jax.config import CheckpointConfig, DataConfig, ObjectiveConfig, OptimizerConfig, RunConfig


def get_config() -> RunConfig:
    return RunConfig(
        initial_checkpoint="runs/stories_base",
        data=DataConfig(path="runs/stories_answers.jsonl", sequence_length=192, workers=10),
        steps=3500,
        batch_size=256,
        objective=ObjectiveConfig(
            kind="oput", schedule="joint", rollout="argmax", mask_rate_low=0.5, mask_rate_high=1.0, certainty=2.0
        ),
        optimizer=OptimizerConfig(learning_rate=4e-4, beta2=0.98),
        checkpoint=CheckpointConfig(every_steps=1000),
        log_every=50,
    )
