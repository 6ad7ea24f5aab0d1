"""Weights in and out of the Hugging Face layout: safetensors files, with an index if there are several."""

import json
import pathlib
from collections.abc import Callable, Iterable

import jax
import numpy as np
from safetensors.numpy import save_file

from dmax_jax.checkpoint.directory import copy_companions, new_directory
from dmax_jax.checkpoint.failures import naming_full_disk
from dmax_jax.checkpoint.hf_config import write_config
from dmax_jax.checkpoint.names import Stored, tensor_names
from dmax_jax.checkpoint.tensor_files import INDEX, SINGLE, TensorFiles
from dmax_jax.config import ModelConfig
from dmax_jax.errors import InputError
from dmax_jax.model.params import Params, ParamSpec, param_specs
from dmax_jax.model.quantisation import weights_kind

NO_8_BITS = (
    "8-bit weights have no place in the Hugging Face layout: write Orbax's (--to=orbax), or 16 bits (--weights=bf16)"
)
Progress = Callable[[list], Iterable]  # such as tqdm; iter shows nothing


def load_params(
    directory: str | pathlib.Path,
    config: ModelConfig,
    dtype: str | np.dtype | None = None,
    *,
    shardings: Params | None = None,
    progress: Progress = iter,
) -> Params:
    """Loads a model whose experts are stored one by one or merged, one parameter of the tree at a time.

    Every weight gets `dtype`, by default that of the stored embeddings; `expert_bias` is always float32.
    `shardings` places each parameter (works with several processes); without it all go to the first device.
    Raises InputError that names the tensor or file if anything is missing, left over, misshapen or unreadable.
    """
    with TensorFiles(directory) as files:
        specs, tree = jax.tree.flatten(param_specs(config))
        table = jax.tree.leaves(tensor_names(config))
        _check_tensors(files, table, specs)
        dtype = np.dtype(dtype or files.describe("model.word_embeddings.weight")[1])
        placements = [None] * len(specs) if shardings is None else jax.tree.leaves(shardings)
        leaves = [
            _place(_read(files, stored, spec, dtype), sharding)
            for stored, spec, sharding in progress(list(zip(table, specs, placements, strict=True)))
        ]
    return jax.tree.unflatten(tree, leaves)


def save_params(
    params: Params,
    config: ModelConfig,
    directory: str | pathlib.Path,
    *,
    max_file_bytes: int = 4 * 2**30,
    metadata: dict[str, str] | None = None,
    source: str | pathlib.Path | None = None,
    progress: Progress = iter,
) -> None:
    """Writes a model, one tensor per expert, into a new directory with its `config.json`.

    Files hold at most `max_file_bytes` of weights (or a single tensor that is larger); several get an index.
    `source` is the model's former directory, whose tokenizer files and unknown config keys are carried along. Raises
    InputError for weights in 8 bits, which the layout has no place for.
    """
    if weights_kind(params):
        raise InputError(NO_8_BITS)
    table, leaves = jax.tree.leaves(tensor_names(config)), jax.tree.leaves(params)
    files = _plan_files(table, leaves, max_file_bytes)
    with new_directory(directory) as output, naming_full_disk(directory):
        if source is not None:
            copy_companions(source, output)
        write_config(config, output, params.embed.dtype.name, source=source)
        for file, rows in progress(list(files.items())):
            save_file({name: _slice(leaves[leaf], expert) for name, leaf, expert in rows}, output / file,
                      metadata={"format": "pt"} | (metadata or {}))  # fmt: skip
            # safetensors makes files that their owner alone may read; these get the mode of any other file.
            (output / file).chmod((output / "config.json").stat().st_mode)
        if len(files) > 1:
            total = sum(leaf.nbytes for leaf in leaves)
            weight_map = {name: file for file, rows in files.items() for name, _, _ in rows}
            index = {"metadata": {"total_size": total}, "weight_map": weight_map}
            (output / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _check_tensors(files: TensorFiles, table: list[Stored], specs: list[ParamSpec]) -> None:
    expected = {}
    for stored, spec in zip(table, specs, strict=True):
        if stored.merged in files:
            expected[stored.merged] = spec.shape
        else:
            expected |= dict.fromkeys(stored.tensors, spec.shape[1:] if stored.experts else spec.shape)
    missing = [name for name in expected if name not in files]
    if missing:
        raise InputError(f"{files.directory}: tensor {missing[0]} {list(expected[missing[0]])} is missing"
                         f"{_others(missing)}")  # fmt: skip
    extra = sorted(set(files) - set(expected))
    if extra:
        raise InputError(
            f"{files.directory}: tensor {extra[0]} has no place in the model of config.json{_others(extra)}"
        )
    for name, shape in expected.items():
        found, _ = files.describe(name)
        if found != shape:
            raise InputError(f"{files.directory}: tensor {name} is {list(found)}, config.json asks for {list(shape)}")


def _others(names: list[str]) -> str:
    return f" (and {len(names) - 1} others)" if len(names) > 1 else ""


def _read(files: TensorFiles, stored: Stored, spec: ParamSpec, dtype: np.dtype) -> np.ndarray:
    """Returns a parameter, stacked if it has experts; values beyond float16 become infinite, as in any cast."""
    dtype = np.dtype(spec.dtype or dtype)
    with np.errstate(over="ignore"):
        if not stored.experts or stored.merged in files:
            return files.read(stored.merged if stored.experts else stored.name).astype(dtype, copy=False)
        stack = np.empty(spec.shape, dtype)
        for expert, name in enumerate(stored.tensors):
            stack[expert] = files.read(name)
        return stack


def _place(array: np.ndarray, sharding: jax.sharding.Sharding | None) -> jax.Array:
    if sharding is None:
        return jax.device_put(array)
    return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])


def _plan_files(
    table: list[Stored], leaves: list[jax.Array], max_file_bytes: int
) -> dict[str, list[tuple[str, int, int | None]]]:
    """Spreads the tensors over files: rows (tensor name, index of the leaf, expert or None) by file name."""
    shards, room = [[]], max_file_bytes
    for leaf, stored in enumerate(table):
        size = leaves[leaf].nbytes // max(stored.experts, 1)
        for expert, name in enumerate(stored.tensors):
            if shards[-1] and size > room:
                shards.append([])
                room = max_file_bytes
            shards[-1].append((name, leaf, expert if stored.experts else None))
            room -= size
    if len(shards) == 1:
        return {SINGLE: shards[0]}
    return {f"model-{i:05}-of-{len(shards):05}.safetensors": rows for i, rows in enumerate(shards, start=1)}


def _slice(leaf: jax.Array, expert: int | None) -> np.ndarray:
    array = np.asarray(leaf)
    return np.ascontiguousarray(array if expert is None else array[expert])
