"""Models in Orbax's format: converted ones, and the parameters in the states of a training."""

import pathlib
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from dmax_jax.checkpoint.directory import copy_companions, new_directory
from dmax_jax.checkpoint.failures import naming_corrupt, naming_full_disk
from dmax_jax.checkpoint.hf_config import write_config
from dmax_jax.config import ModelConfig
from dmax_jax.errors import InputError
from dmax_jax.kernels.quantised_weight import kind_of
from dmax_jax.model.params import Params, param_specs
from dmax_jax.model.quantisation import quantised_shardings, quantised_specs


def save_model(
    directory: str | pathlib.Path, params: Params, config: ModelConfig, *, source: str | pathlib.Path | None = None
) -> None:
    """Writes a model into a new directory that describes itself: `config.json` and `params/`. For one process.

    `source` is the model's former directory, whose tokenizer files and unknown config keys are carried along.
    """
    with new_directory(directory) as output, naming_full_disk(directory):
        if source is not None:
            copy_companions(source, output)
        write_config(config, output, params.embed.dtype.name, source=source)
        with _pytree_checkpointer(params) as checkpointer:
            checkpointer.save(output / "params", ocp.args.PyTreeSave({"params": params}))


def load_model(
    directory: str | pathlib.Path,
    config: ModelConfig,
    dtype: str | np.dtype | None = None,
    *,
    shardings: Params | None = None,
) -> Params:
    """Loads what save_model wrote; `dtype` and `shardings` as in huggingface.load_params. Weights in 8 bits stay so."""
    return _restore_params(pathlib.Path(directory) / "params", config, dtype, shardings)


def load_trained(
    directory: str | pathlib.Path,
    config: ModelConfig,
    dtype: str | np.dtype | None = None,
    *,
    shardings: Params | None = None,
) -> Params:
    """Loads the parameters, and nothing else, of the newest state in a training's `checkpoints/`."""
    steps = pathlib.Path(directory).absolute() / "checkpoints"
    newest = max(ocp.utils.checkpoint_steps(steps), default=None)
    if newest is None:
        raise InputError(f"{steps}: no complete checkpoint is there")
    return _restore_params(steps / str(newest) / "state", config, dtype, shardings)


def _restore_params(
    directory: pathlib.Path, config: ModelConfig, dtype: str | np.dtype | None, shardings: Params | None
) -> Params:
    directory = directory.absolute()
    saved = _saved_params(directory)
    kind = kind_of(saved["head.values"].dtype) if "head.values" in saved else None
    specs = quantised_specs(config, kind) if kind else param_specs(config)
    _check_shapes(directory, saved, specs)
    dtype = dtype or saved["embed"].dtype
    if shardings is None:
        shardings = jax.tree.map(lambda _: jax.sharding.SingleDeviceSharding(jax.devices()[0]), specs)
    elif kind:
        shardings = quantised_shardings(shardings, config)
    target = {
        "params": jax.tree.map(
            lambda spec, sharding: jax.ShapeDtypeStruct(spec.shape, spec.dtype or dtype, sharding=sharding),
            specs,
            shardings,
        )
    }
    restore_args = ocp.checkpoint_utils.construct_restore_args(target)
    arguments = ocp.args.PyTreeRestore(item=target, restore_args=restore_args, partial_restore=True)
    with _pytree_checkpointer(target) as checkpointer, naming_corrupt(directory):
        return checkpointer.restore(directory, arguments)["params"]


def _saved_params(directory: pathlib.Path) -> dict[str, Any]:
    """Returns shape and dtype of each saved parameter by its path in the tree, such as `layers.0.mlp.gate`."""
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer, naming_corrupt(directory):
        metadata = checkpointer.metadata(directory).item_metadata
        if metadata is None:
            raise ValueError("its metadata can't be read")
        return _by_path(metadata.tree["params"])


def _by_path(tree: Any) -> dict[str, Any]:
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in leaves}


def _check_shapes(directory: pathlib.Path, saved: dict[str, Any], specs: Params) -> None:
    expected = _by_path(specs)
    for name in sorted(expected.keys() ^ saved.keys()):
        fault = "is missing" if name in expected else "has no place in the model of config.json"
        raise InputError(f"{directory}: parameter {name} {fault}")
    for name, spec in expected.items():
        found = tuple(saved[name].shape)
        if found != spec.shape:
            raise InputError(f"{directory}: parameter {name} is {list(found)}, config.json asks for {list(spec.shape)}")


def _pytree_checkpointer(tree: Any) -> ocp.Checkpointer:
    """A checkpointer that holds few parameters in memory twice; Orbax's own bound is 96 GB."""
    largest = 4 * max(leaf.size for leaf in jax.tree.leaves(tree))  # bytes, if stored as float32
    gigabytes = 2 + largest / 1e9  # Orbax refuses a parameter that exceeds this bound
    return ocp.Checkpointer(ocp.PyTreeCheckpointHandler(save_concurrent_gb=gigabytes, restore_concurrent_gb=gigabytes))
