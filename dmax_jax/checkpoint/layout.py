"""Loading a model from whatever layout a directory has."""

import pathlib

import numpy as np
from jax.sharding import Mesh

from dmax_jax.checkpoint.hf_config import read_config
from dmax_jax.checkpoint.huggingface import INDEX, SINGLE, load_params
from dmax_jax.checkpoint.store import load_model, load_trained
from dmax_jax.config import ModelConfig
from dmax_jax.errors import InputError
from dmax_jax.model.params import Params, param_shardings
from dmax_jax.model.quantisation import in_kind
from dmax_jax.sharding import DECODE, Rules

LOADERS = {"hf": load_params, "orbax": load_model, "train": load_trained}
# What lies beside config.json in each layout.
MARKS = {"orbax": ("params",), "train": ("checkpoints",), "hf": (SINGLE, INDEX)}


def detect_layout(directory: str | pathlib.Path) -> str:
    """Returns "hf" (safetensors), "orbax" (a converted model) or "train" (a training's working directory)."""
    directory = pathlib.Path(directory)
    if not directory.is_dir():
        raise InputError(f"{directory}: {'a file, not a directory' if directory.exists() else 'no such directory'}")
    if not (directory / "config.json").is_file():
        raise InputError(f"{directory}: no checkpoint is there: config.json is missing")
    for layout, marks in MARKS.items():
        if any((directory / mark).exists() for mark in marks):
            return layout
    raise InputError(f"{directory}: no weights beside config.json; expected {SINGLE}, {INDEX}, params/ or checkpoints/")


def load_checkpoint(
    directory: str | pathlib.Path,
    dtype: str | np.dtype | None = None,
    mesh: Mesh | None = None,
    rules: Rules | None = None,
    mask_token_id: int | None = None,
    eos_token_id: int | None = None,
    weights: str | None = None,
) -> tuple[ModelConfig, Params]:
    """Loads a model of any layout; raises InputError for what is missing, corrupt or unsupported.

    `dtype` is that of the weights, by default the stored one; `expert_bias` is always float32. With a mesh, parameters
    are placed on it by `rules` (default: those of decoding), else on the first device. Ids replace the config's own.
    `weights` is "int8" or "fp8" for 8-bit weights, "bf16" for none (all in `dtype`), None for what the checkpoint has.
    """
    load = LOADERS[detect_layout(directory)]
    config = read_config(directory, mask_token_id=mask_token_id, eos_token_id=eos_token_id)
    shardings = None if mesh is None else param_shardings(config, mesh, DECODE if rules is None else rules)
    params = load(directory, config, dtype, shardings=shardings)
    return config, in_kind(params, config, weights, donate=True)
