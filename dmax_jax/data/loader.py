"""The input pipeline: an endless, restartable stream of training batches for one process, built with grain."""

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import NamedTuple

import grain
import numpy as np

from dmax_jax.config import DataConfig
from dmax_jax.data.sources import Source, open_source
from dmax_jax.data.tokenizer import Tokenizer
from dmax_jax.errors import InputError

THREADS = 4
BATCHES_AHEAD = 8
ENDLESS = 2**53  # places in the stream; grain rounds lengths through floats, which larger numbers do not survive


class Batch(NamedTuple):
    """One optimiser step's samples of one process: A accumulation parts of B rows with T positions."""

    tokens: np.ndarray  # int32 [A, B, T]
    prompt_length: np.ndarray  # int32 [A, B]
    index: np.ndarray  # int32 [A, B], the sample's position in the data set
    epoch: np.ndarray  # int32 [A, B]
    on_policy: np.ndarray  # bool [A, B]


@dataclasses.dataclass(frozen=True)
class Order:
    """Which sample stands at which place of the endless stream, `batch_size` places to a step.

    Every epoch has its own random order. With `alternating` the first half of each step's places is on policy and the
    second half off policy; each half has an order of its own, so that a sample rarely meets itself in a step.
    """

    samples: int
    batch_size: int
    seed: int
    alternating: bool

    def __call__(self, place: int) -> tuple[int, int, bool]:
        """Returns the sample's index, its epoch, and whether it is on policy."""
        if not self.alternating:
            return *self._shuffled(place, 0), True
        step, row = divmod(place, self.batch_size)
        half = self.batch_size // 2
        return *self._shuffled(step * half + row % half, row // half), row < half

    def _shuffled(self, place: int, stream: int) -> tuple[int, int]:
        return self._streams[stream][place], place // self.samples

    @functools.cached_property
    def _streams(self) -> list[grain.MapDataset]:
        # Grain adds the epoch to the seed; mixing the seed first keeps seed 1 from being seed 0 an epoch later.
        seeds = np.random.SeedSequence(self.seed).generate_state(2)
        return [grain.MapDataset.range(self.samples).shuffle(seed=int(seed)).repeat() for seed in seeds]


class Loader(Iterator[Batch]):
    """Endless batches; `get_state` after n batches and `set_state` later continue with batch n, bit for bit.

    The state is a JSON-able dict. It says the number of the next step only, so a run may go on with another number of
    processes. Attributes: `samples` in an epoch and `dropped` rows, which did not fit.
    """

    def __init__(self, steps_from: Callable[[int], grain.IterDataset], samples: int, dropped: int):
        self.samples = samples
        self.dropped = dropped
        self._steps_from = steps_from
        self._iterator = None
        self._step = 0

    def __next__(self) -> Batch:
        if self._iterator is None:
            self._iterator = iter(self._steps_from(self._step))
        batch = next(self._iterator)
        self._step += 1
        return batch

    def get_state(self) -> dict[str, int]:
        return {"step": self._step}

    def set_state(self, state: dict[str, int]) -> None:
        self.close()
        self._step = state["step"]

    def close(self) -> None:
        """Ends the threads that read ahead; the next batch starts new ones."""
        if self._iterator is not None:
            self._iterator.close()
            self._iterator = None


def make_loader(
    data: DataConfig,
    tokenizer: Tokenizer,
    *,
    batch_size: int,
    accumulation: int,
    seed: int,
    alternating: bool,
    process_index: int = 0,
    process_count: int = 1,
) -> Loader:
    """Returns the batches of one process.

    `batch_size` counts all processes. Laid side by side along axis B, the batches of the processes are the batch that
    a single process would get. `alternating`: every sample comes twice in an epoch, once on and once off policy.
    """
    parts = accumulation * process_count
    if batch_size % parts:
        raise InputError(f"batch_size={batch_size} is no multiple of {accumulation=} times {process_count=}")
    if alternating and batch_size % 2:
        raise InputError(f"batch_size={batch_size} must be even: half of an alternating batch is on policy")
    source = open_source(data, tokenizer, seed)
    order = Order(len(source.tokens), batch_size, seed, alternating)

    def steps_from(step: int) -> grain.IterDataset:
        rows = grain.MapDataset.range(step * batch_size, ENDLESS).map(functools.partial(_row, order, source))
        steps = rows.batch(batch_size // parts)[process_index::process_count].batch(accumulation)
        return steps.to_iter_dataset(grain.ReadOptions(num_threads=THREADS, prefetch_buffer_size=BATCHES_AHEAD))

    return Loader(steps_from, len(source.tokens), source.dropped)


def _row(order: Order, source: Source, place: int) -> Batch:
    """Returns the row (a batch without axes A and B) at a place of the stream."""
    index, epoch, on_policy = order(place)
    return Batch(
        source.tokens[index], source.prompt_length[index], np.int32(index), np.int32(epoch), np.bool_(on_policy)
    )
