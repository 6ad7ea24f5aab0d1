"""What a working directory says about its run: the settings, the model's config, the tokenizer."""

import dataclasses
import json
import pathlib

import jax

from dmax_jax.checkpoint.directory import copy_companions
from dmax_jax.checkpoint.hf_config import write_config
from dmax_jax.config import ModelConfig, RunConfig
from dmax_jax.errors import InputError

# A resumed run may change these; anything else would make it another run.
FREE_FIELDS = ("log_every", "checkpoint", "mesh", "data.workers")


def describe_run(run: RunConfig, model: ModelConfig, tokenizer_dir: pathlib.Path, workdir: pathlib.Path) -> None:
    """Makes the working directory describe itself, and refuses one that holds another run."""
    settings = dataclasses.asdict(run)
    record = workdir / "run.json"
    if record.exists():
        _refuse_other_run(json.loads(record.read_text()), settings, workdir)
    if jax.process_index() == 0:
        workdir.mkdir(parents=True, exist_ok=True)
        copy_companions(tokenizer_dir, workdir)
        write_config(model, workdir, "float32", source=run.initial_checkpoint or None)
        record.write_text(json.dumps(settings, indent=2))


def _refuse_other_run(old: dict, new: dict, workdir: pathlib.Path) -> None:
    old, new = _flat(old), _flat(new)
    for name in sorted(old.keys() | new.keys()):
        free = any(name == field or name.startswith(field + ".") for field in FREE_FIELDS)
        if not free and old.get(name) != new.get(name):
            raise InputError(
                f"{workdir} holds a run with {name}={old.get(name)}, this one has {new.get(name)}: choose another "
                "--workdir or the same settings"
            )


def _flat(tree: dict, prefix: str = "") -> dict:
    flat = {}
    for name, value in tree.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return flat
