import dataclasses
import json
import threading
import time

import pytest

from dmax_jax.data.examples import read_rows
from dmax_jax.data.shards import matching_files
from dmax_jax.data.stories import story
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
        ({"samples": 4}, " samples=3, the study has 4"),
        ({"gen_length": 64}, " gen_length=32, the study has 64"),
        ({"steps": 9}, " training.steps=None, the study has 9"),
        ({"answers": 5}, r" training.answers.questions=4, the study has 5"),
    ],
)
def test_figures_of_another_plan_are_refused(done, changes, message):
    study, workdir = done
    if "steps" in changes:
        changes = {"trainings": (dataclasses.replace(study.trainings[0], **changes),)}
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
    assert not run_study(study, tmp_path, ["spd"])
    assert read_points(study, tmp_path) == {}


def test_only_the_rows_that_are_asked_for_are_run(done, tmp_path):
    study, _ = done
    assert run_study(study, tmp_path, ["base"])
    assert list(read_points(study, tmp_path)) == ["base"]
    assert not (tmp_path / "task_answers.jsonl").exists()
    with pytest.raises(InputError, match="--rows=x: the study has no such row, only base, spd"):
        run_study(study, tmp_path, ["x"])


def test_answers_of_another_plan_are_refused(done, tmp_path, monkeypatch):
    study, _ = done
    monkeypatch.setattr(runner, "train", lambda *_: False)
    run_study(study, tmp_path)
    (tmp_path / "points/base-0.json").unlink()
    with pytest.raises(InputError, match=r"answers.plan.json was made with questions=4, the study has 5"):
        run_study(dataclasses.replace(study, answers=5), tmp_path)


def test_both_kinds_of_answers_are_to_the_same_questions(done, tmp_path, monkeypatch):
    study, _ = done
    own = dataclasses.replace(study.trainings[0], name="own", data="own", seeds=1)
    row = dataclasses.replace(study.rows[1], name="own", training="own")
    fields = {"trainings": (*study.trainings, own), "rows": (*study.rows, row), "answers": 4, "answers_batch": 2}
    study = dataclasses.replace(study, **fields)
    seen, asked = {}, []
    monkeypatch.setattr(runner, "train", lambda run, directory, _: seen.update({directory.name: run}))

    def write(model, rows, policy, settings, output, *, shard, **_):
        asked.extend(rows[index]["question"] for index in shard.part(len(rows), settings.batch_size))
        shard.path(output).write_text("{}")

    monkeypatch.setattr(runner, "write_trajectories", write)
    workdir = tmp_path / "runs[1]"  # no pattern
    assert not run_study(study, workdir, ["own"])
    assert not run_study(study, workdir, ["spd"])
    files = {name: matching_files(run.data.path) for name, run in seen.items()}
    assert [file.name for file in files["own-0"]] == ["answers-00000-of-00002.jsonl", "answers-00001-of-00002.jsonl"]
    rows = [row for file in files["oput-0"] for row in read_rows(file)]
    assert [row["question"] for row in rows] == asked
    assert rows == [story(1, index, "train") for index in range(4)]


@pytest.mark.parametrize("deterministic", [False, True])
def test_decoding_is_as_deterministic_as_training(tmp_path, monkeypatch, deterministic):
    study = make_study()
    own = (dataclasses.replace(study.trainings[0], data="own"),)
    study = dataclasses.replace(
        study, trainings=own, run=dataclasses.replace(study.run, deterministic=deterministic), answers_batch=2
    )
    seen = []

    def write(model, rows, policy, settings, output, *, shard, **_):
        seen.append(settings)
        shard.path(output).write_text("{}")

    def evaluate(params, config, tokenizer, problems, policy, settings):
        seen.append(settings)
        raise InputError("enough")

    monkeypatch.setattr(runner, "write_trajectories", write)
    monkeypatch.setattr(runner, "evaluate", evaluate)
    monkeypatch.setattr(runner, "train", lambda run, *_: seen.append(run) or False)
    assert not run_study(study, tmp_path, ["spd"])
    with pytest.raises(InputError, match="enough"):
        run_study(study, tmp_path, ["base"])
    answers, _, run, points = seen
    assert (answers.batch_size, answers.gen_length) == (2, 32)
    assert (points.batch_size, points.gen_length) == (3, 32)
    assert [answers.deterministic, run.deterministic, points.deterministic] == [deterministic] * 3


def test_what_takes_longest_comes_first(tmp_path):
    study = make_study()
    longer = dataclasses.replace(study.trainings[0], name="long", steps=9, seeds=1)
    rows = (*study.rows, dataclasses.replace(study.rows[1], name="long", training="long"))
    study = dataclasses.replace(study, trainings=(*study.trainings, longer), rows=rows)
    pieces = runner.point_pieces(study, tmp_path, rows)
    assert [piece.path.stem for piece in pieces] == ["base-0", "long-0", "spd-0", "spd-1"]


def test_what_fails_is_told_and_keeps_nothing_else_from_being_done(tmp_path, capsys):
    def fail() -> None:
        raise InputError("it diverged")

    def piece(name: str, work) -> Piece:
        return Piece(tmp_path / name, tmp_path / f"{name}.lock", work)

    pieces = [piece("a", fail), piece("b", (tmp_path / "b").touch)]
    with pytest.raises(InputError, match="it diverged"):
        work_through(pieces)
    assert (tmp_path / "b").exists()
    assert "a.lock: it diverged" in capsys.readouterr().err


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
