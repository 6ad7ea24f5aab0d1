"""Trains a model as a configuration file says; started again with the same --workdir, it resumes.

Any field of the configuration can be set on the command line:
  python -m dmax_jax.train --config=configs/stories_oput.py --config.optimizer.learning_rate=1e-4 --workdir=runs/oput

Every field is in dmax_jax/config.py. Small enough to try on a CPU, from the base model that comes with the package:
  python -m dmax_jax.train --config=configs/stories_oput.py --workdir=runs/try --config.initial_checkpoint=demo_base \\
    --config.data.path=answers.jsonl --config.data.workers=0 --config.batch_size=8 --config.steps=10

Metrics go to WORKDIR/metrics.jsonl and WORKDIR/tensorboard, states to WORKDIR/checkpoints. The working directory is a
checkpoint that the other commands read. Ctrl-C saves and stops. A resumed run keeps its settings, steps included.
"""

import dataclasses
import pathlib
import sys
from collections.abc import Sequence

import jax
from absl import flags

from dmax_jax import command
from dmax_jax.assets import DEMO, checkpoint_directory
from dmax_jax.compilation_cache import use_compilation_cache
from dmax_jax.config import load_config
from dmax_jax.errors import InputError
from dmax_jax.training.loop import train

FLAGS = flags.FlagValues()
CONFIG = flags.DEFINE_string(
    "config", None, "Python file with get_config() -> RunConfig.", required=True, flag_values=FLAGS
)
WORKDIR = flags.DEFINE_string(
    "workdir", None, "Directory of states and metrics; made if missing.", required=True, flag_values=FLAGS
)
DISTRIBUTED = flags.DEFINE_bool(
    "distributed", False, "Join the other processes of the run first; Slurm, Kubernetes jobs and MPI are recognised.",
    flag_values=FLAGS,
)  # fmt: skip
COORDINATOR = flags.DEFINE_string(
    "coordinator", None, "With --distributed where nothing is recognised: HOST:PORT of process 0.", flag_values=FLAGS
)
PROCESSES = flags.DEFINE_integer("processes", None, "With --coordinator: number of processes.", flag_values=FLAGS)
PROCESS = flags.DEFINE_integer("process", None, "With --coordinator: number of this process.", flag_values=FLAGS)


def main(overrides: Sequence[tuple[str, str]] = ()) -> None:
    if COORDINATOR.value and not DISTRIBUTED.value:
        raise InputError("--coordinator needs --distributed")
    if DISTRIBUTED.value:
        jax.distributed.initialize(COORDINATOR.value, PROCESSES.value, PROCESS.value)
    run = load_config(CONFIG.value, overrides)
    if run.initial_checkpoint:
        run = dataclasses.replace(run, initial_checkpoint=str(checkpoint_directory(run.initial_checkpoint)))
    use_compilation_cache()
    if not train(run, pathlib.Path(WORKDIR.value), DEMO):
        print(f"stopped; the same command with --workdir={WORKDIR.value} goes on", file=sys.stderr)
        raise SystemExit(130)


def split_overrides(argv: Sequence[str]) -> tuple[list[str], list[tuple[str, str]]]:
    """Separates `--config.name=value` arguments from the flags."""
    rest = [argument for argument in argv if not argument.startswith("--config.")]
    pairs = [argument.removeprefix("--config.").partition("=") for argument in argv if argument not in rest]
    return rest, [(name, value) for name, _, value in pairs]


if __name__ == "__main__":
    arguments, config_overrides = split_overrides(sys.argv)
    command.run(lambda: main(config_overrides), FLAGS, __doc__, arguments)
