"""A run from its configuration to its last checkpoint; starting it again resumes it."""

import math
import pathlib
import sys
import time

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh
from tqdm import tqdm

from dmax_jax.checkpoint.hf_config import read_config
from dmax_jax.checkpoint.layout import detect_layout, load_checkpoint
from dmax_jax.checkpoint.train_checkpoints import TrainCheckpoints
from dmax_jax.config import ModelConfig, RunConfig
from dmax_jax.data.loader import Loader, make_loader
from dmax_jax.data.tokenizer import Tokenizer, load_tokenizer
from dmax_jax.errors import InputError
from dmax_jax.sharding import TRAIN, make_mesh
from dmax_jax.training.batch import Batch
from dmax_jax.training.metrics import MetricWriter
from dmax_jax.training.run_record import describe_run, holds_run, refuse_other_run
from dmax_jax.training.step import TrainState, batch_sharding, init_state, make_train_step, state_shardings
from dmax_jax.training.stop_signal import StopSignal


class Diverged(InputError):
    """The loss or the gradients are no longer numbers."""


def train(run: RunConfig, workdir: pathlib.Path, default_tokenizer: pathlib.Path) -> bool:
    """Trains from the newest checkpoint in `workdir`, or from the start; returns whether the run is complete.

    The working directory is itself a checkpoint that the other commands read. Raises Diverged with the step and the
    last good checkpoint; Ctrl-C and SIGTERM end the run after a save, and then the result is False.
    """
    mesh = make_mesh(run.mesh)
    _check_mesh(run, mesh)
    resumed = holds_run(workdir)
    if resumed:
        refuse_other_run(run, workdir)
    model = read_config(workdir) if resumed else run.model or _initial_config(run.initial_checkpoint)
    first_tokenizer = run.data.tokenizer or run.initial_checkpoint or default_tokenizer
    tokenizer_dir = workdir if resumed else pathlib.Path(first_tokenizer)
    tokenizer = load_tokenizer(tokenizer_dir, model.mask_token_id)
    _check_tokenizer(tokenizer, model, tokenizer_dir)
    loader = make_loader(
        run.data,
        tokenizer,
        batch_size=run.batch_size,
        accumulation=run.accumulation,
        seed=run.seed,
        alternating=run.objective.kind == "oput" and run.objective.schedule == "alternating",
        process_index=jax.process_index(),
        process_count=jax.process_count(),
    )
    if jax.process_index() == 0:
        if loader.dropped:
            print(f"{loader.dropped} rows are longer than data.sequence_length and left out", file=sys.stderr)
        if not resumed:
            describe_run(run, model, tokenizer_dir, workdir)
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices("the working directory describes its run")
    checkpoints = TrainCheckpoints(
        workdir / "checkpoints", keep=run.checkpoint.keep, every_steps=run.checkpoint.every_steps
    )
    with checkpoints, StopSignal() as stop:
        state = _start(run, model, mesh, checkpoints, loader)
        try:
            return _steps(run, model, mesh, state, loader, checkpoints, stop, workdir)
        finally:
            loader.close()


def _initial_config(directory: str) -> ModelConfig:
    try:
        detect_layout(directory)
        return read_config(directory)
    except InputError as error:
        raise InputError(f"initial_checkpoint: {error}") from None


def _check_tokenizer(tokenizer: Tokenizer, model: ModelConfig, directory: pathlib.Path) -> None:
    if tokenizer.eos_id != model.eos_token_id or tokenizer.vocab_size > model.vocab_size:
        raise InputError(
            f"{directory}: the tokenizer ends with id {tokenizer.eos_id} and has {tokenizer.vocab_size} tokens, the "
            f"model ends with {model.eos_token_id} and has {model.vocab_size}; take both from one checkpoint"
        )


def _check_mesh(run: RunConfig, mesh: Mesh) -> None:
    if mesh.shape["tensor"] > 1:
        raise InputError(f"mesh.tensor={mesh.shape['tensor']}: training uses the data and expert axes; set it to 1")
    if jax.process_count() > 1 and mesh.size != jax.device_count():
        raise InputError(f"the mesh has {mesh.size} devices; a run of several processes uses all {jax.device_count()}")
    shards = mesh.shape["data"] * mesh.shape["expert"]
    rows = run.batch_size // run.accumulation
    if rows % shards:
        raise InputError(
            f"batch_size={run.batch_size} in accumulation={run.accumulation} parts gives {rows} rows, no multiple of "
            f"the {shards} devices of the data and expert axes"
        )


def _start(run: RunConfig, model: ModelConfig, mesh: Mesh, checkpoints: TrainCheckpoints, loader: Loader) -> TrainState:
    """The newest saved state with the loader at its place, or the first state."""
    if checkpoints.latest_step() is None:
        params = None
        if run.initial_checkpoint:
            _, params = load_checkpoint(run.initial_checkpoint, "float32", mesh, TRAIN, weights="bf16")
        return init_state(run, model, mesh, params)
    shapes = jax.eval_shape(lambda: init_state(run, model, mesh))
    abstract = jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        shapes,
        state_shardings(run, model, mesh),
    )
    state, data_state = checkpoints.restore(abstract)
    loader.set_state(data_state)
    return state


def _steps(run, model, mesh, state, loader, checkpoints, stop: StopSignal, workdir: pathlib.Path) -> bool:
    train_step = make_train_step(run, model, mesh)
    first = int(state.step)
    writer = MetricWriter(workdir, first) if jax.process_index() == 0 else None
    window = Window(run, writer)
    progress = tqdm(total=run.steps, initial=first, unit="step", disable=jax.process_index() != 0, smoothing=0.1)
    sharding = batch_sharding(mesh)
    try:
        pending = None  # metrics are read one step late, so that the devices never wait for the host
        for step in range(first + 1, run.steps + 1):
            state, metrics = train_step(state, _place(next(loader), sharding))
            if pending is not None:
                window.add(*pending, checkpoints)
            pending = (step, metrics)
            stopping = step == run.steps or _agree_to_stop(stop, step % run.log_every == 0)
            if stopping or step % run.checkpoint.every_steps == 0:
                window.add(*pending, checkpoints)  # before the save: only a good state is saved
                pending = None
                checkpoints.save(step, state, loader.get_state(), force=True)
                if stopping:
                    window.flush(step)
            progress.update()
            progress.set_postfix(window.shown, refresh=False)
            if stopping:
                break
        checkpoints.wait()
        return int(state.step) >= run.steps
    finally:
        progress.close()
        if writer:
            writer.close()


def _agree_to_stop(stop: StopSignal, may_ask: bool) -> bool:
    """Whether any process was asked to stop: all must save the same step. Asking makes the host wait, so rarely."""
    if jax.process_count() == 1:
        return stop.requested
    return may_ask and bool(multihost_utils.process_allgather(np.array(stop.requested)).any())


def _place(batch, sharding) -> Batch:
    def place(local: np.ndarray) -> jax.Array:
        return jax.make_array_from_process_local_data(sharding, local)

    return Batch(
        tokens_BT=place(batch.tokens),
        prompt_length_B=place(batch.prompt_length),
        index_B=place(batch.index),
        epoch_B=place(batch.epoch),
        on_policy_B=place(batch.on_policy),
    )


class Window:
    """Means of the metrics since the last row that was written."""

    def __init__(self, run: RunConfig, writer: MetricWriter | None):
        self.shown: dict[str, str] = {}
        self._run = run
        self._writer = writer
        self._rows: list[dict[str, float]] = []
        self._since = time.perf_counter()

    def add(self, step: int, metrics: dict[str, jax.Array], checkpoints: TrainCheckpoints) -> None:
        row = {name: float(value) for name, value in jax.device_get(metrics).items()}
        if not (math.isfinite(row["loss"]) and math.isfinite(row["gradient_norm"])):
            good = checkpoints.latest_step()
            where = "no checkpoint was saved yet" if good is None else f"the last good checkpoint is step {good}"
            raise Diverged(f"step {step}: loss={row['loss']}, gradient_norm={row['gradient_norm']}; {where}")
        self._rows.append(row)
        self.shown = {"loss": f"{row['loss']:.4f}"}
        if step % self._run.log_every == 0:
            self.flush(step)

    def flush(self, step: int) -> None:
        """Writes what has come since the last row, if anything has."""
        if not self._rows:
            return
        now = time.perf_counter()
        means = {name: float(np.mean([row[name] for row in self._rows])) for name in self._rows[0]}
        tokens = len(self._rows) * self._run.batch_size * self._run.data.sequence_length
        if self._writer:
            self._writer.write(step, means | {"tokens_per_second": tokens / (now - self._since)})
        self._rows, self._since = [], now
