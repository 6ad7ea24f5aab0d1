"""What a study is made of: one base model, its own answers, trainings from it, and ways to decode what comes out."""

import collections
import dataclasses

from dmax_jax.config import ObjectiveConfig, RunConfig, call_in_file
from dmax_jax.decoding.policies import Policy
from dmax_jax.errors import InputError

BASE = ""  # the training of a row that decodes the base itself


@dataclasses.dataclass(frozen=True, kw_only=True)
class Training:
    """One objective from the base model; everything that is not here is the study's."""

    name: str
    objective: ObjectiveConfig
    data: str = "own"  # answers to the same questions: own (the base model's) | task (the task's)
    block_length: int = 32
    steps: int | None = None  # None: the study's
    batch_size: int | None = None  # None: the study's
    seeds: int = 1

    def __post_init__(self):
        if self.data not in ("own", "task"):
            raise InputError(f"study: training {self.name!r} has data={self.data!r}, neither own nor task")
        if self.seeds < 1:
            raise InputError(f"study: training {self.name!r} has seeds={self.seeds}, not at least 1")


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
    run: RunConfig  # steps, batch, optimiser of all trainings; its data names the task, its start is the base
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
        thresholds = {row.name: row.thresholds for row in self.rows}
        for name, threshold in (point for table in self.tables for point in table.points):
            if threshold is not None and threshold not in thresholds[name]:
                raise InputError(f"study: a table has row {name!r} at {threshold}, which is none of its thresholds")
        for row in self.rows:
            if row.settling and self.settling_threshold not in row.thresholds:
                raise InputError(f"study: row {row.name!r} does not settle at {self.settling_threshold}")
        if not self.run.data.task:
            raise InputError("study: its run needs data.task, which says what is asked")

    def training(self, name: str) -> Training:
        return next(training for training in self.trainings if training.name == name)

    def length_of(self, training: Training) -> tuple[int, int]:
        """Its steps and batch size."""
        return training.steps or self.run.steps, training.batch_size or self.run.batch_size

    def seeds_of(self, row: Row) -> int:
        return 1 if row.training == BASE else self.training(row.training).seeds


def load_study(path: str) -> Study:
    """Runs `get_study()` of a Python file; raises InputError if there is none."""
    return call_in_file("--study", path, "get_study")
