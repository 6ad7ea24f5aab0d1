"""Runs what a study lacks. Any number of processes may work on one directory: each takes what no other has taken."""

import contextlib
import dataclasses
import fcntl
import functools
import glob
import json
import math
import pathlib
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from dmax_jax.assets import DEMO, checkpoint_directory
from dmax_jax.checkpoint.layout import load_checkpoint
from dmax_jax.config import CheckpointConfig, DataConfig, RunConfig
from dmax_jax.data.shards import Shard
from dmax_jax.data.tasks import get_task
from dmax_jax.data.tokenizer import load_tokenizer
from dmax_jax.decoding.batch import DecodeSettings
from dmax_jax.decoding.policies import ThresholdPolicy
from dmax_jax.decoding_flags import LoadedModel
from dmax_jax.errors import InputError
from dmax_jax.evaluation.report import environment
from dmax_jax.evaluation.run import evaluate
from dmax_jax.evaluation.tasks import load_problems
from dmax_jax.output_file import whole_file, write_json
from dmax_jax.study.plan import BASE, Row, Study
from dmax_jax.study.settling import measure_settling
from dmax_jax.training.loop import train
from dmax_jax.training.run_record import flatten
from dmax_jax.trajectories import write_trajectories

ANSWER_SHARDS = 8  # pieces that processes take, unless there are fewer batches
ANSWER_SEED = 1  # of the questions that the base answers
WAIT_SECONDS = 1.0


@dataclasses.dataclass(frozen=True)
class Piece:
    """Work that one process does at a time, who holds `lock`; `path` exists when it is done."""

    path: pathlib.Path
    lock: pathlib.Path
    work: Callable[[], None]


def run_study(study: Study, workdir: pathlib.Path, rows: Sequence[str] = ()) -> bool:
    """Does what is missing of the rows (default: of all), answers first; False if it was interrupted.

    What fails is left out; the first error is raised when everything else is done. Raises InputError at once for an
    unknown row, and if the directory holds figures or answers of another plan.
    """
    wanted = [row for row in study.rows if not rows or row.name in rows]
    for name in rows:
        if name not in [row.name for row in wanted]:
            raise InputError(f"--rows={name}: the study has no such row, only {', '.join(r.name for r in study.rows)}")
    (workdir / "points").mkdir(parents=True, exist_ok=True)
    read_points(study, workdir)
    used = {study.training(row.training).data for row in wanted if row.training != BASE}
    if used:
        keep_plan(workdir / "answers.plan.json", describe_answers(study))
    if not work_through(answer_pieces(study, workdir, used)):
        return False
    return work_through(point_pieces(study, workdir, wanted))


def work_through(pieces: list[Piece]) -> bool:
    """Works until every piece is done, by this process or by another one; False if one was interrupted."""
    failed: dict[pathlib.Path, InputError] = {}
    waiting = False
    while missing := [piece for piece in pieces if not piece.path.exists() and piece.lock not in failed]:
        for piece in missing:
            with try_lock(piece.lock) as mine:
                if mine and not piece.path.exists():
                    try:
                        piece.work()
                    except InputError as error:
                        print(f"{piece.lock.name}: {error}", file=sys.stderr)
                        failed[piece.lock] = error
                        break
                    if not piece.path.exists():
                        return False
                    break  # look again from the start: others have worked, too
        else:
            if not waiting:
                print(f"waiting for other processes: {', '.join(p.path.stem for p in missing)}", file=sys.stderr)
            waiting = True
            time.sleep(WAIT_SECONDS)
    if failed:
        raise next(iter(failed.values()))
    return True


@contextlib.contextmanager
def try_lock(path: pathlib.Path) -> Iterator[bool]:
    """Whether this process alone holds a lock; the system lets go of it when the process ends, however it does."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        yield True


@contextlib.contextmanager
def wait_for_lock(path: pathlib.Path) -> Iterator[None]:
    """Holds a lock, however long it takes to get it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def answer_pieces(study: Study, workdir: pathlib.Path, kinds: Iterable[str]) -> list[Piece]:
    """Answers to the same fresh questions: the base model's own, as the paper makes its data, and the task's."""

    def questions() -> list[dict[str, Any]]:
        row = get_task(study.run.data.task).row
        return [row(ANSWER_SEED, index, "train") for index in range(study.answers)]

    def answer(shard: Shard) -> None:
        settings = decode_settings(study, batch_size=study.answers_batch)
        model = load_model(study, checkpoint_directory(study.base))
        output = workdir / "answers.jsonl"
        write_trajectories(model, questions(), ThresholdPolicy(), settings, output, shard=shard, show_progress=True)

    def copy(path: pathlib.Path) -> None:
        with whole_file(path) as file:
            file.writelines(json.dumps(row) + "\n" for row in questions())

    def piece(path: pathlib.Path, work: Callable[[], None]) -> Piece:
        return Piece(path, workdir / "locks" / path.stem, work)

    pieces = []
    if "own" in kinds:
        shards = [Shard(index, count_shards(study)) for index in range(count_shards(study))]
        pieces += [piece(s.path(workdir / "answers.jsonl"), functools.partial(answer, s)) for s in shards]
    if "task" in kinds:
        path = workdir / "task_answers.jsonl"
        pieces.append(piece(path, functools.partial(copy, path)))
    return pieces


def decode_settings(study: Study, **own) -> DecodeSettings:
    """How a study decodes: as deterministically as it trains."""
    return DecodeSettings(gen_length=study.gen_length, deterministic=study.run.deterministic, **own)


def count_shards(study: Study) -> int:
    return min(ANSWER_SHARDS, -(-study.answers // study.answers_batch))


def point_pieces(study: Study, workdir: pathlib.Path, rows: Sequence[Row]) -> list[Piece]:
    """A piece per row and seed; who takes one trains the model and measures all of its rows.

    What takes longest comes first (the base, whose rows are many, then long trainings), so that no process is left
    alone with it at the end; after that the first seeds.
    """

    def length(name: str) -> float:
        return math.inf if name == BASE else math.prod(study.length_of(study.training(name)))

    most = max((study.seeds_of(row) for row in rows), default=0)
    models = [(name, seed) for seed in range(most) for name in dict.fromkeys(row.training for row in rows)]
    models.sort(key=lambda model: length(model[0]), reverse=True)

    def piece(row: Row, seed: int) -> Piece:
        own = [other for other in rows if other.training == row.training]
        lock = workdir / "locks" / f"{row.training or 'base'}-{seed}"
        return Piece(point_path(workdir, row, seed), lock, lambda: run_model(study, workdir, own, seed))

    return [
        piece(row, seed) for name, seed in models for row in rows if row.training == name and seed < study.seeds_of(row)
    ]


def point_path(workdir: pathlib.Path, row: Row, seed: int) -> pathlib.Path:
    return workdir / "points" / f"{row.name}-{seed}.json"


def run_model(study: Study, workdir: pathlib.Path, rows: Sequence[Row], seed: int) -> None:
    """Trains the model of some rows if it needs to be, and measures those that lack a file; none if interrupted."""
    name, directory = rows[0].training, checkpoint_directory(study.base)
    if name != BASE:
        directory = workdir / "trainings" / f"{name}-{seed}"
        print(f"training {name}, seed {seed}", file=sys.stderr)
        if not train(planned_run(study, workdir, name, seed), directory, DEMO):
            return
    model = load_model(study, directory)
    for row in rows:
        path = point_path(workdir, row, seed)
        if not path.exists():
            write_json(path, measure_row(study, row, model, seed))


def planned_run(study: Study, workdir: pathlib.Path, name: str, seed: int) -> RunConfig:
    """The complete configuration of a training: the study's, the training's own, and where its data lies."""
    training = study.training(name)
    own = "answers.jsonl" if count_shards(study) == 1 else f"answers-*-of-{count_shards(study):05d}.jsonl"
    files = {"own": own, "task": "task_answers.jsonl"}
    data = DataConfig(
        path=f"{glob.escape(str(workdir))}/{files[training.data]}",
        sequence_length=study.run.data.sequence_length,
        workers=study.run.data.workers,
    )
    steps, batch_size = study.length_of(training)
    return dataclasses.replace(
        study.run,
        initial_checkpoint=str(checkpoint_directory(study.base)),
        data=data,
        steps=steps,
        batch_size=batch_size,
        seed=seed,
        block_length=training.block_length,
        objective=training.objective,
        checkpoint=CheckpointConfig(every_steps=steps, keep=1),
    )


def load_model(study: Study, directory: pathlib.Path) -> LoadedModel:
    config, params = load_checkpoint(directory, study.run.dtype)
    return LoadedModel(config, params, load_tokenizer(directory, config.mask_token_id), pathlib.Path(directory))


def measure_row(study: Study, row: Row, model: LoadedModel, seed: int) -> dict[str, Any]:
    """Every threshold of a row, with each problem's outcome."""
    settings = decode_settings(study, batch_size=study.batch_size, block_length=row.block_length)
    problems = load_problems(study.run.data.task, study.samples, study.test_seed)
    points = []
    for threshold in row.thresholds:
        policy = row.policy.replace(threshold=threshold)
        traced = dataclasses.replace(settings, trace=row.settling and threshold == study.settling_threshold)
        result, answers = evaluate(model.params, model.config, model.tokenizer, problems, policy, traced)
        point = {"threshold": threshold} | dataclasses.asdict(result.metrics)
        for name in ("correct", "generated_tokens", "forwards"):
            point[f"{name}_by_problem"] = [int(getattr(sample, name)) for sample in result.samples]
        if traced.trace:
            point["settling"] = dataclasses.asdict(measure_settling(answers, row.block_length))
        print(
            f"{row.name} {seed} {threshold:g}: {point['accuracy']:.1f} % at {point['tpf_macro']:.2f}", file=sys.stderr
        )
        points.append(point)
    return {"plan": describe(study, row), "seed": seed, "environment": environment(), "points": points}


def describe(study: Study, row: Row) -> dict[str, Any]:
    """Everything in the plan that a row's figures depend on, as JSON has it."""
    training = {}
    if row.training != BASE:
        run = dataclasses.asdict(study.run)
        for name in ("seed", "log_every", "checkpoint", "mesh"):
            del run[name]
        del run["data"]["workers"]
        own = dataclasses.asdict(study.training(row.training))
        training = {"run": run, "answers": describe_answers(study)} | own
        del training["seeds"]
    plan = {
        "row": row.name,
        "base": study.base,
        "training": training,
        "method": type(row.policy).__name__,
        "policy": dataclasses.asdict(row.policy),
        "thresholds": row.thresholds,
        "block_length": row.block_length,
        "task": study.run.data.task,
        "dtype": study.run.dtype,
        "deterministic": study.run.deterministic,
        "samples": study.samples,
        "test_seed": study.test_seed,
        "gen_length": study.gen_length,
        "batch_size": study.batch_size,
    }
    return json.loads(json.dumps(plan))


def read_points(study: Study, workdir: pathlib.Path) -> dict[str, list[dict[str, Any]]]:
    """What has been measured: for every row that has any, its seeds' records.

    Raises InputError for a file that another plan has made.
    """
    records = {}
    for row in study.rows:
        paths = [point_path(workdir, row, seed) for seed in range(study.seeds_of(row))]
        found = [read_record(path, describe(study, row)) for path in paths if path.exists()]
        if found:
            records[row.name] = found
    return records


def describe_answers(study: Study) -> dict[str, Any]:
    """Everything in the plan that the training data depends on."""
    return {
        "base": study.base,
        "task": study.run.data.task,
        "seed": ANSWER_SEED,
        "questions": study.answers,
        "batch_size": study.answers_batch,
        "gen_length": study.gen_length,
        "dtype": study.run.dtype,
        "deterministic": study.run.deterministic,
    }


def keep_plan(path: pathlib.Path, plan: dict[str, Any]) -> None:
    """Writes what is planned beside what will be made, or compares it with what was; raises InputError."""
    if path.exists():
        refuse_other_plan(path, json.loads(path.read_text(encoding="utf-8")), plan)
    else:
        write_json(path, plan, indent=1)


def read_record(path: pathlib.Path, plan: dict[str, Any]) -> dict[str, Any]:
    """A row's file; raises InputError, naming what differs, if it was made by another plan."""
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        made_by = record["plan"]
    except (ValueError, KeyError) as error:
        raise InputError(f"{path} is damaged ({error}); remove it, and it is measured again") from None
    refuse_other_plan(path, made_by, plan)
    return record


def refuse_other_plan(path: pathlib.Path, made_by: dict[str, Any], plan: dict[str, Any]) -> None:
    made_by, plan = flatten(made_by), flatten(plan)
    for name in sorted(plan.keys() | made_by.keys()):
        if plan.get(name) != made_by.get(name):
            raise InputError(
                f"{path} was made with {name}={made_by.get(name)}, the study has {plan.get(name)}: choose another "
                "--workdir, or remove what it made"
            )
