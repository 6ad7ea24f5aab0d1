"""What a study is made of: one base model, its own answers, trainings from it, and ways to decode what comes out."""

import collections
import dataclasses
import importlib.util
import pathlib

from dmax_jax.config import ObjectiveConfig, RunConfig
from dmax_jax.decoding.policies import Policy
from dmax_jax.errors import InputError

BASE = ""  # the training of a row that decodes the base itself


@dataclasses.dataclass(frozen=True, kw_only=True)
class Training:
    """One objective from the base model; everything that is not here is the study's."""

    name: str
    objective: ObjectiveConfig
    data: str = "own"  # own: the base model's answers | task: the task's own answers
    block_length: int = 32
    steps: int | None = None  # None: the study's
    batch_size: int | None = None  # None: the study's
    seeds: int = 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """A trained model (or the base) decoded in one way at several thresholds."""

    name: str  # of its files
    label: str  # for readers
    training: str
    policy: Policy
    thresholds: tuple[float, ...]
    block_length: int = 32
    settling: bool = False  # also measure how blocks settle, at the study's `settling_threshold`

    def __post_init__(self):
        if not self.thresholds:
            raise InputError(f"study: row {self.name!r} has no thresholds")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Table:
    """Points to be read together: (row, threshold), or (row, None) for all of a row's thresholds."""

    title: str
    points: tuple[tuple[str, float | None], ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Study:
    base: str  # checkpoint directory, or the name of one that comes with the package
    run: RunConfig  # steps, batch, optimiser of all trainings; its data is the task's
    answers: int  # questions that the base answers for training, threshold 0.95
    answers_batch: int
    samples: int  # test problems per point
    gen_length: int
    batch_size: int  # of decoding
    test_seed: int
    trainings: tuple[Training, ...]
    rows: tuple[Row, ...]
    baseline: str  # row whose most accurate threshold the speeds are compared with
    reference: str  # row that the others' areas under parallelism are compared with
    curves: tuple[str, ...]  # rows in the plot of accuracy against tokens per forward
    tables: tuple[Table, ...]
    settling_threshold: float = 0.5  # at which the rows with `settling` are plotted

    def __post_init__(self):
        trainings, rows = [t.name for t in self.trainings], [row.name for row in self.rows]
        for kind, names in (("trainings", trainings), ("rows", rows)):
            doubled = [name for name, count in collections.Counter(names).items() if count > 1]
            if doubled:
                raise InputError(f"study: two {kind} are called {doubled[0]!r}")
        for row in self.rows:
            if row.training not in (BASE, *trainings):
                raise InputError(f"study: row {row.name!r} decodes an unknown training {row.training!r}")
        named = [
            self.baseline,
            self.reference,
            *self.curves,
            *(name for table in self.tables for name, _ in table.points),
        ]
        for name in named:
            if name not in rows:
                raise InputError(f"study: there is no row {name!r}")

    def training(self, name: str) -> Training:
        return next(training for training in self.trainings if training.name == name)

    def rows_of(self, training: str) -> list[Row]:
        return [row for row in self.rows if row.training == training]

    def seeds_of(self, row: Row) -> int:
        return 1 if row.training == BASE else self.training(row.training).seeds

    def only(self, names: list[str]) -> "Study":
        """The part of the study that some rows need; raises InputError for an unknown name."""
        known = [row.name for row in self.rows]
        for name in names:
            if name not in known:
                raise InputError(f"--rows={name}: the study has no such row, only {', '.join(known)}")
        rows = tuple(row for row in self.rows if row.name in names)
        used = {row.training for row in rows}
        return dataclasses.replace(
            self,
            rows=rows,
            trainings=tuple(training for training in self.trainings if training.name in used),
            baseline=self.baseline if self.baseline in names else names[0],
            reference=self.reference if self.reference in names else names[0],
            curves=tuple(name for name in self.curves if name in names),
            tables=tuple(table for table in self.tables if all(name in names for name, _ in table.points)),
        )


def load_study(path: str) -> Study:
    """Runs `get_study()` of a Python file; raises InputError if there is none."""
    file = pathlib.Path(path)
    if not file.is_file():
        raise InputError(f"--study={path}: no such file")
    spec = importlib.util.spec_from_file_location(f"dmax_study_{file.stem}", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if not hasattr(module, "get_study"):
        raise InputError(f"--study={path}: the file defines no get_study()")
    return module.get_study()
