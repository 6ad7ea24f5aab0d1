"""The states of a training, saved in the background in Orbax's format."""

import contextlib
import pathlib
from typing import Any, TypeVar

import orbax.checkpoint as ocp

from dmax_jax.checkpoint.failures import naming_corrupt, naming_full_disk
from dmax_jax.errors import InputError

State = TypeVar("State")


class TrainCheckpoints:
    """The newest `keep` states of a training, saved in the background, one directory per step.

    A state is any pytree of arrays. With several processes, every one calls every method, and `data_state` is the
    same everywhere. A full disk raises InputError in the call that notices it; earlier saves stay whole.
    """

    def __init__(self, directory: str | pathlib.Path, *, keep: int, every_steps: int = 1):
        self.directory = pathlib.Path(directory).absolute()
        self.every_steps = every_steps
        options = ocp.CheckpointManagerOptions(
            preservation_policy=ocp.checkpoint_managers.LatestN(n=keep),
            cleanup_tmp_directories=True,  # what a killed process or a full disk left behind
            async_options=ocp.options.AsyncOptions(timeout_secs=3600),  # the default of 600 is short for 16B states
        )
        self._manager = ocp.CheckpointManager(self.directory, options=options)

    def save(self, step: int, state: Any, data_state: dict[str, Any], *, force: bool = False) -> bool:
        """Starts to save if `step` is a multiple of `every_steps`, or if forced; returns whether it did.

        The state may be donated as soon as this returns. A step that is there already isn't saved again.
        """
        if step in self._manager.all_steps() or not (force or step % self.every_steps == 0):
            return False
        items = ocp.args.Composite(state=ocp.args.StandardSave(state), data=ocp.args.JsonSave(data_state))
        with naming_full_disk(self.directory):
            return self._manager.save(step, args=items, force=True)

    def latest_step(self) -> int | None:
        """Returns the newest step that is saved or being saved, None if there is none."""
        return self._manager.latest_step()

    def restore(self, abstract_state: State, step: int | None = None) -> tuple[State, dict[str, Any]]:
        """Returns state and data state of a step, by default the newest, with the shardings of `abstract_state`.

        Raises InputError if there is none, if it is corrupt, or if its arrays aren't those of `abstract_state`.
        """
        self.wait()
        step = self.latest_step() if step is None else step
        if step is None or step not in self._manager.all_steps():
            raise InputError(f"{self.directory}: no checkpoint{'' if step is None else f' of step {step}'} is there")
        items = ocp.args.Composite(state=ocp.args.StandardRestore(abstract_state), data=ocp.args.JsonRestore())
        with naming_corrupt(self.directory / str(step)):
            restored = self._manager.restore(step, args=items)
            return restored.state, restored.data

    def wait(self) -> None:
        """Waits until the last save is complete."""
        with naming_full_disk(self.directory):
            self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits and releases the threads."""
        with naming_full_disk(self.directory):
            self._manager.close()

    def __enter__(self) -> "TrainCheckpoints":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_) -> None:
        with contextlib.nullcontext() if kind is None else contextlib.suppress(InputError):  # the first error counts
            self.close()
