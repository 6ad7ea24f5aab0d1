"""The paper's tables on the task `stories`: every baseline and ablation, and what we add.

  python -m dmax_jax.evaluate --study=configs/study_small.py --workdir=runs/study

Every training starts from the same base model (`demo_base`; configs/stories_base.py makes it) and takes the same steps
at the same batch and learning rate, so that rows differ in what their labels say. Work: about 20 minutes on four H200
with two processes on each (XLA_PYTHON_CLIENT_MEM_FRACTION=0.45), compilation included, 2026-11-22. docs/study.md has
what came out.
"""

from dmax_jax.config import DataConfig, ObjectiveConfig, OptimizerConfig, RunConfig
from dmax_jax.decoding.policies import CreditPolicy, HierarchicalPolicy, SpdPolicy, ThresholdPolicy
from dmax_jax.study.plan import BASE, Row, Study, Table, Training

TAUS = (0.95, 0.85, 0.65, 0.5, 0.3, 0.0)  # of soft parallel decoding
FALLING = (0.99, 0.95, 0.9, 0.8, 0.7, 0.5, 0.3, 0.0)  # of threshold decoding
SEEDS = 3  # of the main rows


def oput(**changes) -> ObjectiveConfig:
    """The official recipe but for the schedule: mask rate 0.75, argmax, one step; joint, as in Eq. 6."""
    return ObjectiveConfig(**{"kind": "oput", "mask_rate_low": 0.75, "mask_rate_high": 0.75} | changes)


def masked(kind: str, **changes) -> ObjectiveConfig:
    return ObjectiveConfig(kind=kind, mask_rate_low=0.1, mask_rate_high=1.0, **changes)


SOFT = {"rollout_embedding": "soft"}
AS_DECODED = SOFT | {"rollout_promotion": "prefix", "rollout_steps": 2, "mask_rate_low": 0.5, "mask_rate_high": 1.0}
# Ours ("OPUT + certainty"): with dParallel's certainty forcing, and mask rates from [0.5, 1], where decoding starts.
# Long rows take 3,500 steps of 256 samples, 4.7 times as many as the others.
CERTAIN = {"certainty": 2.0, "mask_rate_low": 0.5, "mask_rate_high": 1.0}

TRAININGS = (
    Training(name="oput", objective=oput(), seeds=SEEDS),
    Training(name="oput_certain", objective=oput(**CERTAIN), seeds=SEEDS),
    Training(name="oput_task", objective=oput(), data="task", seeds=SEEDS),
    Training(name="dparallel", objective=masked("dparallel", certainty=2.0), seeds=SEEDS),
    Training(name="uniform", objective=ObjectiveConfig(kind="uniform"), seeds=SEEDS),
    Training(name="oput_rate050_100", objective=oput(mask_rate_low=0.5, mask_rate_high=1.0)),
    Training(name="oput_certain075", objective=oput(certainty=2.0)),
    Training(name="oput_certain5", objective=oput(**CERTAIN | {"certainty": 5.0})),
    Training(name="oput_soft", objective=oput(**SOFT)),
    Training(name="oput_steps2", objective=oput(rollout_steps=2)),
    Training(name="oput_steps3", objective=oput(rollout_steps=3)),
    Training(name="oput_soft_steps2", objective=oput(**SOFT, rollout_steps=2)),
    Training(name="oput_decoded", objective=oput(**AS_DECODED)),
    Training(name="oput_sample", objective=oput(rollout="sample")),
    Training(name="oput_alternating", objective=oput(schedule="alternating")),
    Training(name="oput_rate050", objective=oput(mask_rate_low=0.5, mask_rate_high=0.5)),
    Training(name="oput_rate090", objective=oput(mask_rate_low=0.9, mask_rate_high=0.9)),
    Training(name="oput_rate030_100", objective=oput(mask_rate_low=0.3, mask_rate_high=1.0)),
    Training(name="mdlm", objective=masked("mdlm")),
    Training(name="oput_block16", objective=oput(), block_length=16),
    Training(name="oput_block64", objective=oput(), block_length=64),
    Training(name="oput_certain_long", objective=oput(**CERTAIN), steps=3500, batch_size=256, seeds=SEEDS),
    Training(name="oput_long", objective=oput(), steps=3500, batch_size=256),
    Training(name="dparallel_long", objective=masked("dparallel", certainty=2.0), steps=3500, batch_size=256),
)


def spd_row(training: str, label: str, *, name: str = "", settling: bool = False, block_length: int = 32, **policy):
    """Soft parallel decoding at all taus."""
    return Row(
        name=name or f"{training}_spd",
        label=label,
        training=training,
        policy=SpdPolicy(**policy),
        thresholds=TAUS,
        settling=settling,
        block_length=block_length,
    )


def falling_row(training: str, label: str) -> Row:
    name = f"{training or 'base'}_threshold"
    return Row(name=name, label=label, training=training, policy=ThresholdPolicy(), thresholds=FALLING)


ROWS = (
    falling_row(BASE, "base, threshold"),
    Row(
        name="base_hierarchical",
        label="base, hierarchical, low threshold 0.2",
        training=BASE,
        policy=HierarchicalPolicy(),
        thresholds=FALLING[:6],
    ),
    Row(name="base_credit", label="base, credit", training=BASE, policy=CreditPolicy(), thresholds=FALLING[:6]),
    spd_row(BASE, "base, soft", name="base_spd", settling=True),
    falling_row("mdlm", "masked diffusion on own answers, threshold"),
    spd_row("mdlm", "masked diffusion on own answers, soft"),
    falling_row("dparallel", "dParallel, threshold"),
    spd_row("uniform", "uniform diffusion, soft"),
    spd_row("oput", "OPUT, soft", settling=True),
    falling_row("oput", "OPUT, threshold"),
    spd_row("oput", "OPUT, hard", name="oput_hard", embedding="hard"),
    spd_row("oput", "OPUT, hard, no prefix", name="oput_hard_anywhere", embedding="hard", contiguous_prefix=False),
    spd_row("oput", "OPUT, soft, no prefix", name="oput_spd_anywhere", contiguous_prefix=False),
    spd_row("oput", "OPUT, soft, not renormalised", name="oput_unnormalised", embedding="unnormalised"),
    spd_row("oput", "OPUT, soft, stops on consistency", name="oput_consistency", stop="consistency"),
    spd_row("oput", "OPUT, soft, stops on confidence", name="oput_confidence", stop="confidence"),
    spd_row("oput_task", "OPUT on the task's answers, soft", settling=True),
    spd_row("oput_task", "OPUT on the task's answers, hard", name="oput_task_hard", embedding="hard"),
    spd_row("oput_sample", "OPUT, sampled rollout, soft"),
    spd_row("oput_alternating", "OPUT, alternating, soft"),
    spd_row("oput_rate050", "OPUT, mask rate 0.5, soft"),
    spd_row("oput_rate090", "OPUT, mask rate 0.9, soft"),
    spd_row("oput_rate030_100", "OPUT, mask rate from [0.3, 1], soft"),
    spd_row("oput_rate050_100", "OPUT, mask rate from [0.5, 1], soft"),
    spd_row("oput_block16", "OPUT, blocks of 16, soft", block_length=16),
    spd_row("oput_block64", "OPUT, blocks of 64, soft", block_length=64),
    spd_row("oput_steps2", "OPUT, rollouts of 2 steps, soft"),
    spd_row("oput_steps3", "OPUT, rollouts of 3 steps, soft"),
    spd_row("oput_soft", "OPUT, soft rollouts, soft", settling=True),
    spd_row("oput_soft_steps2", "OPUT, soft rollouts of 2 steps, soft"),
    spd_row("oput_decoded", "OPUT, soft rollouts as decoded, soft"),
    spd_row("oput_certain075", "OPUT + certainty, mask rate 0.75, soft"),
    spd_row("oput_certain5", "OPUT + certainty 5, soft"),
    spd_row("oput_certain", "OPUT + certainty, soft", settling=True),
    spd_row("oput_certain", "OPUT + certainty, hard", name="oput_certain_hard", embedding="hard"),
    falling_row("oput_certain", "OPUT + certainty, threshold"),
    spd_row("oput_certain_long", "OPUT + certainty, long, soft"),
    spd_row("oput_long", "OPUT, long, soft"),
    falling_row("dparallel_long", "dParallel, long, threshold"),
)

TABLES = (
    Table(
        title="Methods (the paper's Table 1)",
        points=(
            ("base_threshold", 0.99),
            ("base_threshold", 0.95),
            ("base_hierarchical", 0.95),
            ("base_credit", 0.95),
            ("dparallel_threshold", 0.95),
            ("uniform_spd", 0.5),
            ("oput_spd", 0.5),
            ("oput_certain_spd", 0.5),
        ),
    ),
    Table(
        title="What each part adds, at 0.5 and at 0 (Table 3)",
        points=(
            ("base_threshold", 0.5),
            ("base_spd", 0.5),
            ("oput_hard_anywhere", 0.5),
            ("oput_hard", 0.5),
            ("oput_unnormalised", 0.5),
            ("oput_spd", 0.5),
            ("base_threshold", 0.0),
            ("base_spd", 0.0),
            ("oput_hard_anywhere", 0.0),
            ("oput_hard", 0.0),
            ("oput_unnormalised", 0.0),
            ("oput_spd", 0.0),
        ),
    ),
    Table(
        title="When a block stops, at 0.5 (Table 4)",
        points=(("oput_consistency", 0.5), ("oput_confidence", 0.5), ("oput_spd", 0.5)),
    ),
    Table(title="The threshold", points=(("base_threshold", None), ("oput_spd", None), ("oput_certain_spd", None))),
    Table(
        title="Whose answers, at 0.5",
        points=(("oput_spd", 0.5), ("oput_hard", 0.5), ("oput_task_spd", 0.5), ("oput_task_hard", 0.5)),
    ),
    Table(
        title="The recipe, at 0.5",
        points=tuple(
            (f"{name}_spd", 0.5)
            for name in (
                "oput",
                "oput_sample",
                "oput_alternating",
                "oput_rate050",
                "oput_rate090",
                "oput_rate030_100",
                "oput_rate050_100",
                "oput_block16",
                "oput_block64",
                "oput_steps2",
                "oput_steps3",
                "oput_soft",
                "oput_soft_steps2",
                "oput_decoded",
                "oput_certain075",
                "oput_certain",
                "oput_certain5",
                "oput_certain_long",
            )
        ),
    ),
)


def get_study() -> Study:
    return Study(
        base="demo_base",
        run=RunConfig(
            initial_checkpoint="demo_base",
            data=DataConfig(task="stories", samples=100_000, sequence_length=192, workers=8),
            steps=1500,
            batch_size=128,
            optimizer=OptimizerConfig(learning_rate=4e-4, beta2=0.98),
            log_every=50,
            deterministic=True,
        ),
        answers=100_000,
        answers_batch=1000,
        samples=1000,
        gen_length=128,
        batch_size=1000,
        test_seed=0,
        trainings=TRAININGS,
        rows=ROWS,
        baseline="base_threshold",
        reference="oput_spd",
        curves=(
            "base_threshold",
            "oput_spd",
            "oput_certain_spd",
            "oput_certain_long_spd",
            "oput_task_spd",
            "dparallel_threshold",
            "oput_hard",
            "uniform_spd",
            "base_spd",
        ),
        tables=TABLES,
    )
