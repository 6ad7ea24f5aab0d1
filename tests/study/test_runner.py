import dataclasses
import json
import threading
import time

import pytest

from dmax_jax.errors import InputError
from dmax_jax.study import runner
from dmax_jax.study.runner import Piece, read_points, run_study, try_lock, work_through
from tests.evaluation.random_model import write_random_model
from tests.study.small_study import make_study


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """A study from beginning to end: the base's answers, two trainings on them, all rows."""
    base = write_random_model(tmp_path_factory.mktemp("base"))
    study = make_study(str(base))
    workdir = tmp_path_factory.mktemp("study")
    assert run_study(study, workdir)
    return study, workdir


def test_every_row_and_seed_is_measured(done):
    study, workdir = done
    records = read_points(study, workdir)
    assert [(name, record["seed"]) for name, found in records.items() for record in found] == [
        ("base", 0), ("spd", 0), ("spd", 1),
    ]  # fmt: skip
    for record in records["spd"]:
        assert [point["threshold"] for point in record["points"]] == [0.9, 0.5]
        assert all(len(point["correct_by_problem"]) == study.samples for point in record["points"])
        assert ["settling" in point for point in record["points"]] == [False, True]
    metrics = (workdir / "trainings/oput-1/metrics.jsonl").read_text().splitlines()
    steps = [json.loads(line)["step"] for line in metrics]
    assert steps == [study.run.steps]


def test_a_second_start_does_nothing_and_a_missing_file_is_measured_again(done, monkeypatch):
    study, workdir = done
    monkeypatch.setattr(runner, "measure_row", lambda *_: pytest.fail("measured"))
    assert run_study(study, workdir)
    path = workdir / "points/spd-1.json"
    before = path.read_text()
    path.unlink()
    monkeypatch.undo()
    monkeypatch.setattr(runner, "train", lambda run, directory, _: (directory / "run.json").exists())  # was trained
    assert run_study(study, workdir)
    old, new = json.loads(before), json.loads(path.read_text())
    for name in ("accuracy", "correct_by_problem", "forwards_by_problem"):
        assert [point[name] for point in new["points"]] == [point[name] for point in old["points"]]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"samples": 4}, "samples=3, the study has 4"),
        ({"gen_length": 64}, "gen_length=32, the study has 64"),
        ({"trainings": ()}, None),
    ],
)
def test_figures_of_another_plan_are_refused(done, changes, message):
    study, workdir = done
    if message is None:
        training = dataclasses.replace(study.trainings[0], steps=9)
        changes, message = {"trainings": (training,)}, "training="
    with pytest.raises(InputError, match=message):
        run_study(dataclasses.replace(study, **changes), workdir)


def test_a_damaged_file_is_named(done, tmp_path):
    study, _ = done
    (tmp_path / "points").mkdir()
    (tmp_path / "points/base-0.json").write_text('{"pl')
    with pytest.raises(InputError, match=r"base-0.json is damaged"):
        run_study(study, tmp_path)


def test_an_interrupted_training_ends_the_study_without_figures(done, tmp_path, monkeypatch):
    study, _ = done
    monkeypatch.setattr(runner, "train", lambda *_: False)
    assert not run_study(study.only(["spd"]), tmp_path)
    assert read_points(study, tmp_path) == {}


def test_the_bases_own_answers_are_the_data(done, tmp_path, monkeypatch):
    study, _ = done
    own = dataclasses.replace(study.trainings[0], data="own", seeds=1)
    seen = []
    monkeypatch.setattr(runner, "train", lambda run, *_: seen.append(run))
    assert not run_study(dataclasses.replace(study.only(["spd"]), trainings=(own,)), tmp_path)
    assert seen[0].data.path == f"{tmp_path}/answers-*-of-00008.jsonl"
    assert len(list(tmp_path.glob("answers-*.jsonl"))) == 8


def test_one_process_holds_a_lock(tmp_path):
    with try_lock(tmp_path / "locks/x") as mine:
        assert mine
        with try_lock(tmp_path / "locks/x") as also_mine, try_lock(tmp_path / "locks/y") as other:
            assert not also_mine
            assert other
    with try_lock(tmp_path / "locks/x") as mine:
        assert mine


def test_what_another_process_works_on_is_waited_for(tmp_path, monkeypatch):
    """It may end without doing it; then it is done here."""
    monkeypatch.setattr(runner, "WAIT_SECONDS", 0.01)
    done = []

    def piece(name: str) -> Piece:
        return Piece(tmp_path / name, tmp_path / f"{name}.lock", lambda: done.append(name) or (tmp_path / name).touch())

    with try_lock(tmp_path / "a.lock"):
        worker = threading.Thread(target=lambda: work_through([piece("a"), piece("b")]))
        worker.start()
        while not (tmp_path / "b").exists():
            time.sleep(0.01)
        assert done == ["b"]
        assert worker.is_alive()
    worker.join(timeout=10)
    assert done == ["b", "a"]
