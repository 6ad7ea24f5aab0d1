"""What a working directory says about its run: the settings, the model's config, the tokenizer."""

import dataclasses
import json
import pathlib
from typing import Any

from dmax_jax.checkpoint.directory import TOKENIZER_FILES, copy_companions
from dmax_jax.checkpoint.hf_config import write_config
from dmax_jax.config import ModelConfig, RunConfig
from dmax_jax.errors import InputError

# A resumed run may change these; anything else would make it another run.
FREE_FIELDS = ("log_every", "checkpoint", "mesh", "data.workers")


def holds_run(workdir: pathlib.Path) -> bool:
    """Whether there is a run to resume: a record of its settings and at least one saved state."""
    return (workdir / "run.json").exists() and any(
        entry.name.isdigit() for entry in (workdir / "checkpoints").glob("*")
    )


def describe_run(run: RunConfig, model: ModelConfig, tokenizer_dir: pathlib.Path, workdir: pathlib.Path) -> None:
    """Makes the working directory of a new run describe itself. For process 0."""
    workdir.mkdir(parents=True, exist_ok=True)
    copy_companions(tokenizer_dir, workdir, TOKENIZER_FILES)
    write_config(model, workdir, "float32", source=run.initial_checkpoint or None)
    partial = workdir / "run.json.partial"
    partial.write_text(json.dumps(dataclasses.asdict(run), indent=2))
    partial.replace(workdir / "run.json")


def refuse_other_run(run: RunConfig, workdir: pathlib.Path) -> None:
    """Raises InputError, naming the field, if the directory's run has other settings.

    A setting that is newer than the directory has its default there.
    """
    try:
        old = defaults_of(run) | flatten(json.loads((workdir / "run.json").read_text()))
    except ValueError as error:
        raise InputError(f"{workdir}/run.json is damaged ({error}); choose another --workdir") from None
    new = flatten(dataclasses.asdict(run))
    for name in sorted(old.keys() | new.keys()):
        free = any(name == field or name.startswith(field + ".") for field in FREE_FIELDS)
        if not free and old.get(name) != new.get(name):
            raise InputError(
                f"{workdir} holds a run with {name}={old.get(name)}, this one has {new.get(name)}: choose another "
                "--workdir or the same settings"
            )


def defaults_of(config: Any, prefix: str = "") -> dict:
    """The defaults of a dataclass's fields and of the dataclasses in it, with dotted names."""
    flat = {}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            flat |= defaults_of(value, f"{prefix}{field.name}.")
        elif field.default is not dataclasses.MISSING:
            flat[prefix + field.name] = field.default
    return flat


def flatten(tree: dict, prefix: str = "") -> dict:
    """A tree of dictionaries as one, with dotted names."""
    flat = {}
    for name, value in tree.items():
        flat |= flatten(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return flat
