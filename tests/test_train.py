"""The command `python -m dmax_jax.train`; what it calls is tested in tests/training."""

import pathlib
import subprocess
import sys

import pytest

from dmax_jax import command, train
from dmax_jax.assets import DEMO
from dmax_jax.errors import InputError

CONFIG = """
from dmax_jax.config import DataConfig, RunConfig

def get_config():
    return RunConfig(initial_checkpoint="somewhere", data=DataConfig(path="rows.jsonl"), steps=7, batch_size=8)
"""


@pytest.fixture
def config(tmp_path):
    (tmp_path / "config.py").write_text(CONFIG)
    return str(tmp_path / "config.py")


@pytest.fixture
def runs(monkeypatch):
    """What the command would train; it is told that the runs are complete."""
    seen = []

    def note(run, workdir, tokenizer):
        seen.append((run, str(workdir), tokenizer))
        return True

    monkeypatch.setattr(train, "train", note)
    return seen


def start(*arguments: str) -> None:
    """As the end of the module does."""
    rest, overrides = train.split_overrides(["train", *arguments])
    command.run(lambda: train.main(overrides), train.FLAGS, train.__doc__, rest)


def test_configuration_overrides_and_workdir_reach_the_training(config, runs):
    start(f"--config={config}", "--config.steps=9", "--workdir=runs/x", "--config.optimizer.learning_rate=1e-3")
    [(run, workdir, tokenizer)] = runs
    assert (run.steps, run.batch_size, run.optimizer.learning_rate) == (9, 8, 1e-3)
    assert (workdir, tokenizer) == ("runs/x", DEMO)


def test_overrides_may_hold_equal_signs_and_be_empty():
    rest, overrides = train.split_overrides(["train", "--config.data.path=a=b", "--workdir=x", "--config.data.task="])
    assert rest == ["train", "--workdir=x"]
    assert overrides == [("data.path", "a=b"), ("data.task", "")]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--workdir=w"], "--config"),
        (["--config=CONFIG"], "--workdir"),
        (["--config=nowhere.py", "--workdir=w"], "--config=nowhere.py: no such file"),
        (["--config=CONFIG", "--workdir=w", "--config.steps=few"], "--config.steps=few: expected int"),
        (["--config=CONFIG", "--workdir=w", "--config.steps=0"], "steps=0 must be at least 1"),
        (["--config=CONFIG", "--workdir=w", "--config.stepz=1"], "--config.stepz: RunConfig has no field 'stepz'"),
        (["--config=CONFIG", "--workdir=w", "--wrokdir=w"], "wrokdir"),
        (["--config=CONFIG", "--workdir=w", "extra"], "unexpected argument 'extra'"),
    ],
)
def test_what_the_user_can_remedy_is_one_line_and_exit_code_2(config, runs, capsys, arguments, message):
    with pytest.raises(SystemExit) as exit_:
        start(*(argument.replace("CONFIG", config) for argument in arguments))
    captured = capsys.readouterr()
    assert exit_.value.code == 2
    assert captured.err.count("\n") == 1
    assert captured.err.startswith("error: ")
    assert message in captured.err
    assert not captured.out
    assert not runs


def test_an_error_of_the_training_is_one_line_too(config, monkeypatch, capsys):
    def refuse(*_):
        raise InputError("w holds a run with seed=0,\nthis one has 1")

    monkeypatch.setattr(train, "train", refuse)
    with pytest.raises(SystemExit) as exit_:
        start(f"--config={config}", "--workdir=w")
    assert exit_.value.code == 2
    assert capsys.readouterr().err == "error: w holds a run with seed=0, this one has 1\n"


def test_a_stopped_run_says_how_to_go_on(config, monkeypatch, capsys):
    monkeypatch.setattr(train, "train", lambda *_: False)
    with pytest.raises(SystemExit) as exit_:
        start(f"--config={config}", "--workdir=runs/x")
    assert exit_.value.code == 130
    assert "--workdir=runs/x" in capsys.readouterr().err


def test_help_names_every_flag(capsys, runs):
    start("--help")
    text = capsys.readouterr().out
    assert text.startswith(train.__doc__.splitlines()[0])
    assert all(f"{name}" in text for name in train.FLAGS)
    assert not runs


def test_the_module_is_a_command():
    process = subprocess.run(
        [sys.executable, "-m", "dmax_jax.train", "--config=nowhere.py", "--workdir=w"],
        capture_output=True,
        text=True,
        timeout=120,
        cwd=pathlib.Path(__file__).parent.parent,
    )
    assert process.returncode == 2
    assert process.stderr == "error: --config=nowhere.py: no such file\n"
