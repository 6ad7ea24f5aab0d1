import dataclasses
import pathlib

import pytest

from dmax_jax.config import (
    CheckpointConfig,
    DataConfig,
    ObjectiveConfig,
    OptimizerConfig,
    RunConfig,
    load_config,
    override,
)
from dmax_jax.errors import InputError
from tests.models import SMALL, small_model

CONFIGS = [
    file
    for file in sorted((pathlib.Path(__file__).parent.parent / "configs").glob("*.py"))
    if not file.stem.startswith("study_")  # tests/study loads those
]
RUN = RunConfig(model=SMALL, data=DataConfig(task="stories", samples=10, sequence_length=64), steps=5, batch_size=4)

FILE = """
from dmax_jax.config import DataConfig, RunConfig

def get_config():
    return RunConfig(initial_checkpoint="somewhere", data=DataConfig(path="rows.jsonl"), steps=7, batch_size=8)
"""


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("steps", "12", 12),
        ("dtype", "float32", "float32"),
        ("optimizer.learning_rate", "1e-5", 1e-5),
        ("objective.inverse_rate_weight", "true", True),
        ("objective.inverse_rate_weight", "False", False),
        ("mesh.data", "-1", -1),
        ("data.tokenizer", "", ""),
        ("data.tokenizer", "a=b", "a=b"),
        ("model.num_hidden_layers", "3", 3),
    ],
)
def test_overrides(name, text, value):
    changed = override(RUN, [(name, text)])
    found = changed
    for part in name.split("."):
        found = getattr(found, part)
    assert (found, type(found)) == (value, type(value))
    assert override(changed, [(name, str(dig(RUN, name)))]) == RUN  # and nothing else has changed


def dig(config, name):
    for part in name.split("."):
        config = getattr(config, part)
    return config


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("stepz", "1", "--config.stepz: RunConfig has no field 'stepz', only data, steps"),
        ("optimizer.rate", "1", "OptimizerConfig has no field 'rate'"),
        ("steps", "ten", "--config.steps=ten: expected int"),
        ("steps", "1.5", "--config.steps=1.5: expected int"),
        ("steps", "", "--config.steps=: expected int"),
        ("optimizer.learning_rate", "fast", "learning_rate=fast: expected float"),
        ("objective.inverse_rate_weight", "yes", "inverse_rate_weight=yes: expected true or false"),
        ("optimizer", "adam", "--config.optimizer: set its fields one by one"),
        ("model", "x", "--config.model: set its fields one by one"),
        ("steps.more", "1", "--config.steps.more: steps has no fields"),
        ("optimizer.learning_rate", "-1", "optimizer: learning_rate=-1.0 must be positive"),
        ("batch_size", "0", "run: batch_size=0 must be at least 1"),
    ],
)
def test_bad_overrides_are_named(name, text, message):
    with pytest.raises(InputError, match=message.replace(".", r"\.")):
        override(RUN, [(name, text)])


def test_a_file_and_its_overrides(tmp_path):
    file = tmp_path / "config.py"
    file.write_text(FILE)
    run = load_config(str(file))
    assert (run.steps, run.batch_size, run.initial_checkpoint) == (7, 8, "somewhere")
    changed = load_config(str(file), [("steps", "9"), ("optimizer.beta2", "0.5"), ("steps", "11")])
    assert (changed.steps, changed.optimizer.beta2) == (11, 0.5)
    assert dataclasses.replace(changed, steps=7, optimizer=run.optimizer) == run


def test_files_that_are_no_configuration(tmp_path):
    with pytest.raises(InputError, match=r"--config=.*nowhere\.py: no such file"):
        load_config(str(tmp_path / "nowhere.py"))
    (tmp_path / "empty.py").write_text("steps = 3\n")
    with pytest.raises(InputError, match=r"empty\.py: the file defines no get_config\(\)"):
        load_config(str(tmp_path / "empty.py"))


@pytest.mark.parametrize("file", CONFIGS, ids=lambda file: file.stem)
def test_the_configurations_of_the_repository_load(file):
    assert load_config(str(file), [("steps", "3")]).steps == 3


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_attention_heads": 3}, "num_attention_heads=3 is no multiple of num_key_value_heads=2"),
        ({"num_experts": 7}, "num_experts=7 is no multiple of n_group=3"),
        ({"topk_group": 4}, "topk_group=4 exceeds n_group=3"),
        ({"num_experts_per_tok": 5}, "num_experts_per_tok=5 exceeds the 4 experts of the kept groups"),
        ({"head_dim": 6}, "partial_rotary_factor=0.5 of head_dim=6"),
        ({"partial_rotary_factor": 0.0}, "partial_rotary_factor=0.0"),
        ({"mask_token_id": 48}, "mask_token_id=48 is outside the vocabulary of 48"),
        ({"eos_token_id": -1}, "eos_token_id=-1 is outside the vocabulary"),
        ({"eos_token_id": 47}, "equals eos_token_id"),
        ({"first_k_dense_replace": 3}, "first_k_dense_replace=3 is not within 0..2"),
        ({"hidden_size": 0}, "hidden_size=0 must be at least 1"),
    ],
)
def test_senseless_models_are_refused_by_name_and_number(changes, message):
    with pytest.raises(InputError, match=message.replace(".", r"\.")):
        small_model(**changes)


@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        (RUN, {"model": None}, "give either model"),
        (RUN, {"initial_checkpoint": "x"}, "give either model"),
        (RUN, {"accumulation": 3}, "batch_size=4 is no multiple of accumulation=3"),
        (RUN, {"block_length": 48}, "sequence_length=64 is no multiple of block_length=48"),
        (RUN, {"dtype": "float16"}, "dtype='float16' is neither"),
        (RUN, {"seed": -1}, "seed=-1"),
        (RUN, {"log_every": 0}, "log_every=0"),
        (RUN.data, {"path": "x"}, "exactly one of path='x' .* and task='stories'"),
        (RUN.data, {"task": ""}, "exactly one of path='' .* and task=''"),
        (RUN.data, {"samples": 0}, "task='stories' needs samples > 0"),
        (RUN.data, {"workers": -1}, "workers=-1"),
        (ObjectiveConfig(), {"kind": "diffusion"}, "kind='diffusion' is none of mdlm, oput, uniform, dparallel"),
        (ObjectiveConfig(), {"schedule": "both"}, "schedule='both' is none of"),
        (ObjectiveConfig(), {"rollout": "greedy"}, "rollout='greedy' is none of"),
        (ObjectiveConfig(), {"mask_rate_low": 0.8}, "mask rates 0.8 to 0.75"),
        (ObjectiveConfig(), {"mask_rate_high": 1.1}, "mask rates 0.75 to 1.1"),
        (ObjectiveConfig(mask_rate_low=0.0), {"inverse_rate_weight": True}, "divides by the mask rate"),
        (ObjectiveConfig(), {"rollout_steps": 0}, "rollout_steps=0"),
        (ObjectiveConfig(), {"certainty": -1.0}, "certainty=-1.0"),
        (
            ObjectiveConfig(),
            {"kind": "mdlm", "certainty": 1.0},
            "certainty=1.0 is for dparallel and oput, not for mdlm",
        ),
        (ObjectiveConfig(), {"kind": "dparallel"}, "dparallel needs certainty above 0"),
        (ObjectiveConfig(), {"rollout_embedding": "mild"}, "rollout_embedding='mild' is none of hard, soft"),
        (ObjectiveConfig(), {"rollout_promotion": "some"}, "rollout_promotion='some' is none of all, prefix"),
        (ObjectiveConfig(), {"supervised_padding": -1}, "supervised_padding=-1"),
        (OptimizerConfig(), {"learning_rate": float("nan")}, "learning_rate=nan"),
        (OptimizerConfig(), {"warmup_ratio": 1.5}, "warmup_ratio=1.5"),
        (OptimizerConfig(), {"beta1": 1.0}, "beta1=1.0"),
        (OptimizerConfig(), {"weight_decay": -0.1}, "weight_decay=-0.1"),
        (OptimizerConfig(), {"clip_norm": 0.0}, "clip_norm=0.0"),
        (OptimizerConfig(), {"router_bias_rate": -1.0}, "router_bias_rate=-1.0"),
        (CheckpointConfig(), {"every_steps": 0}, "every_steps=0"),
        (CheckpointConfig(), {"keep": 0}, "keep=0"),
    ],
)
def test_senseless_runs_are_refused_by_name_and_number(kind, changes, message):
    with pytest.raises(InputError, match=message):
        dataclasses.replace(kind, **changes)


def test_overrides_that_only_together_make_sense(tmp_path):
    (tmp_path / "config.py").write_text(FILE)
    run = load_config(str(tmp_path / "config.py"), [("data.path", ""), ("data.task", "stories"), ("data.samples", "3")])
    assert (run.data.path, run.data.task, run.data.samples) == ("", "stories", 3)


@pytest.mark.parametrize(("name", "text"), [("optimizer.rate", "1"), ("optimizer.learning_rate", "fast")])
def test_a_bad_override_is_named_as_it_was_given(name, text):
    with pytest.raises(InputError, match=f"--config.{name}"):
        override(RUN, [(name, text)])
