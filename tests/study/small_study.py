"""A study of two rows of one training, and made-up records of it."""

import numpy as np

from dmax_jax.config import DataConfig, ObjectiveConfig, OptimizerConfig, RunConfig
from dmax_jax.decoding.policies import SpdPolicy, ThresholdPolicy
from dmax_jax.study.plan import BASE, Row, Study, Table, Training
from dmax_jax.study.runner import describe


def make_study(base: str = "demo_base", **changes) -> Study:
    run = RunConfig(
        initial_checkpoint=base,
        data=DataConfig(task="stories", samples=16, sequence_length=192),
        steps=2,
        batch_size=8,
        dtype="float32",
        optimizer=OptimizerConfig(learning_rate=1e-3),
    )
    fields = {
        "base": base,
        "run": run,
        "answers": 4,
        "answers_batch": 4,
        "samples": 3,
        "gen_length": 32,
        "batch_size": 3,
        "test_seed": 0,
        "trainings": (Training(name="oput", objective=ObjectiveConfig(), data="task", seeds=2),),
        "rows": (
            Row(name="base", label="base", training=BASE, policy=ThresholdPolicy(), thresholds=(0.9, 0.0)),
            Row(name="spd", label="SPD", training="oput", policy=SpdPolicy(), thresholds=(0.9, 0.5), settling=True),
        ),
        "baseline": "base",
        "reference": "base",
        "curves": ("base", "spd"),
        "tables": (Table(title="Both", points=(("base", 0.9), ("spd", None))),),
    }
    return Study(**fields | changes)


def make_records(study: Study, problems: int = 200) -> dict[str, list[dict]]:
    """Outcomes drawn at random: the base is right at 80 % and 20 %, SPD at 80 % and 76 %, five times as fast."""
    rng = np.random.default_rng(0)
    rates = {"base": (0.8, 0.2), "spd": (0.8, 0.76)}
    forwards = {"base": (50, 10), "spd": (12, 8)}
    records = {}
    for row in study.rows:
        records[row.name] = []
        for seed in range(study.seeds_of(row)):
            points = []
            for threshold, rate, count in zip(row.thresholds, rates[row.name], forwards[row.name], strict=True):
                correct = (rng.random(problems) < rate).astype(int)
                tokens = rng.integers(60, 100, problems)
                points.append(
                    {
                        "threshold": threshold,
                        "accuracy": 100 * float(correct.mean()),
                        "tpf_macro": float((tokens / (count + 1)).mean()),
                        "tpf_total": float(tokens.sum() / (problems * (count + 1))),
                        "forwards": float(count),
                        "finished": 1.0,
                        "correct_by_problem": correct.tolist(),
                        "generated_tokens_by_problem": tokens.tolist(),
                        "forwards_by_problem": [count] * problems,
                    }
                )
            records[row.name].append({"plan": describe(study, row), "seed": seed, "points": points})
    return records
