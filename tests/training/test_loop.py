import dataclasses
import functools
import json
import os
import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dmax_jax.assets import DEMO
from dmax_jax.checkpoint.huggingface import save_params
from dmax_jax.checkpoint.layout import load_checkpoint
from dmax_jax.config import CheckpointConfig, DataConfig, MeshConfig, ObjectiveConfig, OptimizerConfig, RunConfig
from dmax_jax.data.tokenizer import load_tokenizer
from dmax_jax.errors import InputError
from dmax_jax.training import loop
from dmax_jax.training.loop import Diverged, Window, train
from dmax_jax.training.metrics import MetricWriter
from dmax_jax.training.step import make_train_step
from dmax_jax.training.stop_signal import StopSignal
from tests.models import random_params, small_model

TOKENIZER = load_tokenizer(DEMO)
MODEL = small_model(
    vocab_size=TOKENIZER.vocab_size,
    mask_token_id=TOKENIZER.mask_id,
    eos_token_id=TOKENIZER.eos_id,
    pad_token_id=TOKENIZER.eos_id,
    hidden_size=16,
    initializer_range=0.02,
)
RUN = RunConfig(
    model=MODEL,
    data=DataConfig(task="stories", samples=6, sequence_length=160),
    steps=4,
    batch_size=4,
    accumulation=2,
    dtype="float32",
    log_every=1,
    objective=ObjectiveConfig(kind="mdlm"),
    optimizer=OptimizerConfig(learning_rate=1e-2),
    mesh=MeshConfig(data=2),
)


@functools.cache
def compiled_step(run, model, mesh):
    return make_train_step(run, model, mesh)


class Recorder:
    """Stands in for the training step: keeps every state, and lets a test interfere before a step."""

    def __init__(self):
        self.states = {}
        self.before = {}

    def make_train_step(self, run, model, mesh):
        # Runs that differ in this only share what is compiled.
        run = dataclasses.replace(
            run, model=model, initial_checkpoint="", checkpoint=CheckpointConfig(), log_every=1, data=RUN.data
        )
        train_step = compiled_step(run, model, mesh)

        def recorded(state, batch):
            number = int(state.step) + 1
            state = self.before.pop(number, lambda state: state)(state)
            state, metrics = train_step(state, batch)
            self.states[number] = jax.device_get(state)
            return state, metrics

        return recorded


@pytest.fixture
def recorder(monkeypatch):
    recorder = Recorder()
    monkeypatch.setattr(loop, "make_train_step", recorder.make_train_step)
    # Weights that compile at once.
    monkeypatch.setattr("dmax_jax.training.step.init_params", lambda key, model: random_params(model))
    return recorder


def interrupt(state):
    os.kill(os.getpid(), signal.SIGINT)
    return state


def poison(state):
    return state.replace(params=state.params.replace(norm=state.params.norm * jnp.nan))


def rows_of(workdir) -> list[dict]:
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    assert all(row.pop("tokens_per_second") > 0 for row in rows)
    return rows


def saved_steps(workdir) -> list[int]:
    return sorted(int(path.name) for path in (workdir / "checkpoints").iterdir())


def assert_identical(found, expected):
    def same(a, b):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)

    jax.tree.map(same, found, expected)


def test_an_interrupted_run_goes_on_as_if_nothing_had_happened(recorder, tmp_path):
    assert train(RUN, tmp_path / "straight", DEMO)
    straight = recorder.states[4]
    assert straight.step == 4
    recorder.states.clear()
    recorder.before[2] = interrupt
    assert not train(RUN, tmp_path / "resumed", DEMO)
    assert saved_steps(tmp_path / "resumed") == [2]  # although it isn't time to save
    assert list(recorder.states) == [1, 2]
    assert train(RUN, tmp_path / "resumed", DEMO)
    assert list(recorder.states) == [1, 2, 3, 4]
    assert_identical(recorder.states[4], straight)
    assert rows_of(tmp_path / "resumed") == rows_of(tmp_path / "straight")
    assert [row["step"] for row in rows_of(tmp_path / "straight")] == [1, 2, 3, 4]

    # A complete run stays as it is.
    assert train(RUN, tmp_path / "resumed", DEMO)
    assert [row["step"] for row in rows_of(tmp_path / "resumed")] == [1, 2, 3, 4]
    assert len(recorder.states) == 4


def test_the_working_directory_is_a_checkpoint(recorder, tmp_path):
    train(RUN, tmp_path, DEMO)
    config, params = load_checkpoint(tmp_path)
    assert config == MODEL
    assert_identical(params, recorder.states[4].params)
    assert load_tokenizer(tmp_path, config.mask_token_id).eos_id == MODEL.eos_token_id


def test_saves_come_at_their_time_and_at_the_end(recorder, tmp_path):
    run = dataclasses.replace(RUN, checkpoint=CheckpointConfig(every_steps=3))
    train(run, tmp_path, DEMO)
    assert saved_steps(tmp_path) == [3, 4]


@pytest.mark.parametrize(("step", "where"), [(1, "no checkpoint was saved yet"), (4, "last good checkpoint is step 2")])
def test_a_run_that_diverges_ends_and_names_the_last_good_state(recorder, tmp_path, step, where):
    recorder.before[step] = poison
    run = dataclasses.replace(RUN, checkpoint=CheckpointConfig(every_steps=2))
    with pytest.raises(Diverged, match=rf"step {step}: loss=nan, gradient_norm=nan; .*{where}"):
        train(run, tmp_path, DEMO)
    assert saved_steps(tmp_path) == list(range(2, step, 2))  # the bad state isn't saved
    assert [row["step"] for row in rows_of(tmp_path)] == list(range(1, step))
    assert train(run, tmp_path, DEMO)  # from the good one
    assert np.isfinite(rows_of(tmp_path)[-1]["loss"])


def test_another_run_is_refused_and_a_change_of_no_consequence_is_not(recorder, tmp_path):
    recorder.before[1] = interrupt
    train(RUN, tmp_path, DEMO)
    for changes, message in [
        ({"seed": 1}, "holds a run with seed=0, this one has 1"),
        ({"steps": 5}, "holds a run with steps=4, this one has 5"),
        ({"objective": ObjectiveConfig(kind="oput")}, "holds a run with objective.kind=mdlm, this one has oput"),
        ({"model": dataclasses.replace(MODEL, rope_theta=5.0)}, "holds a run with model.rope_theta=10000.0"),
        ({"data": dataclasses.replace(RUN.data, samples=7)}, "holds a run with data.samples=6, this one has 7"),
    ]:
        with pytest.raises(InputError, match=message):
            train(dataclasses.replace(RUN, **changes), tmp_path, DEMO)
    record = json.loads((tmp_path / "run.json").read_text())
    del record["deterministic"], record["objective"]["certainty"]  # as if the directory were older than the settings
    (tmp_path / "run.json").write_text(json.dumps(record))
    with pytest.raises(InputError, match="holds a run with deterministic=False, this one has True"):
        train(dataclasses.replace(RUN, deterministic=True), tmp_path, DEMO)
    free = dataclasses.replace(RUN, log_every=3, checkpoint=CheckpointConfig(every_steps=3, keep=1))
    assert train(free, tmp_path, DEMO)


def test_a_run_starts_from_the_weights_of_its_initial_checkpoint(recorder, tmp_path):
    params = random_params(MODEL, seed=9)
    save_params(params, MODEL, tmp_path / "initial")
    seen = []

    def look(state):
        seen.append(jax.device_get(state.params))
        return interrupt(state)

    recorder.before[1] = look
    run = dataclasses.replace(
        RUN,
        model=None,
        initial_checkpoint=str(tmp_path / "initial"),
        data=dataclasses.replace(RUN.data, tokenizer=str(DEMO)),
    )
    train(run, tmp_path / "work", DEMO)
    assert_identical(seen[0], params)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_size": 6}, "batch_size=6 in accumulation=2 parts gives 3 rows, no multiple of the 2 devices"),
        ({"mesh": MeshConfig(data=4, expert=4)}, "needs 16 devices; there are 8"),
        ({"model": dataclasses.replace(MODEL, mask_token_id=5)}, "in the tokenizer, but mask_token_id is 5"),
        ({"data": DataConfig(path="nowhere.jsonl", sequence_length=160)}, "nowhere.jsonl: no such file"),
    ],
)
def test_impossible_runs_are_refused(tmp_path, changes, message):
    with pytest.raises(InputError, match=message):
        train(dataclasses.replace(RUN, **changes), tmp_path, DEMO)


class Rows:
    def __init__(self):
        self.written = {}

    def write(self, step, metrics):
        self.written[step] = metrics


def test_a_row_of_metrics_is_the_mean_since_the_last_one():
    rows = Rows()
    window = Window(dataclasses.replace(RUN, steps=7, log_every=3), rows)
    for step in range(1, 8):
        window.add(step, {"loss": jnp.float32(step), "gradient_norm": jnp.float32(10 * step)}, None)
    window.flush(7)
    window.flush(7)  # nothing has come since
    assert [(step, row["loss"], row["gradient_norm"]) for step, row in rows.written.items()] == [
        (3, 2.0, 20.0),
        (6, 5.0, 50.0),
        (7, 7.0, 70.0),
    ]
    assert window.shown == {"loss": "7.0000"}


def test_rows_of_a_resumed_runs_future_are_dropped(tmp_path):
    writer = MetricWriter(tmp_path, 0)
    for step in range(1, 6):
        writer.write(step, {"loss": step / 2})
    writer.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "lo')  # cut short
    writer = MetricWriter(tmp_path, 3)
    writer.write(4, {"loss": 9.0})
    writer.close()
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [(row["step"], row["loss"]) for row in rows] == [(1, 0.5), (2, 1.0), (3, 1.5), (4, 9.0)]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_asks_and_the_second_acts(number):
    caught = []
    previous = signal.signal(number, lambda *_: caught.append(number))
    try:
        with StopSignal() as stop:
            assert not stop.requested
            os.kill(os.getpid(), number)
            assert stop.requested
            assert not caught
            os.kill(os.getpid(), number)
            assert caught == [number]
        with StopSignal() as stop:
            pass
        os.kill(os.getpid(), number)
        assert caught == [number] * 2
        assert not stop.requested
    finally:
        signal.signal(number, previous)


def test_a_start_that_failed_leaves_the_directory_free(tmp_path):
    lost = dataclasses.replace(RUN, data=dataclasses.replace(RUN.data, task="", path=str(tmp_path / "lost.jsonl")))
    with pytest.raises(InputError, match="no such file"):
        train(lost, tmp_path / "run", DEMO)
    assert not (tmp_path / "run" / "run.json").exists()


def test_a_tokenizer_with_another_end_is_refused(tmp_path):
    other = dataclasses.replace(RUN, model=dataclasses.replace(MODEL, eos_token_id=5))
    with pytest.raises(InputError, match="the tokenizer ends with id"):
        train(other, tmp_path / "run", DEMO)


def test_training_uses_no_tensor_axis(tmp_path):
    with pytest.raises(InputError, match=r"mesh.tensor=2"):
        train(dataclasses.replace(RUN, mesh=MeshConfig(data=1, tensor=2)), tmp_path / "run", DEMO)
