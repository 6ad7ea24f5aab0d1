import os
import pathlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from flax import struct

from dmax_jax.checkpoint.hf_config import write_config
from dmax_jax.checkpoint.huggingface import load_params, save_params
from dmax_jax.checkpoint.layout import detect_layout, load_checkpoint
from dmax_jax.checkpoint.store import load_model, save_model
from dmax_jax.checkpoint.train_checkpoints import TrainCheckpoints
from dmax_jax.config import MeshConfig
from dmax_jax.errors import InputError
from dmax_jax.kernels.quantised_weight import KINDS
from dmax_jax.model.params import Params, cast_params, param_shardings
from dmax_jax.model.quantisation import dequantise_params, quantise_params, quantised_shardings
from dmax_jax.sharding import DECODE, TRAIN, make_mesh
from tests.checkpoint.test_huggingface import TINY, assert_same_tensors, read_tensors


@struct.dataclass
class State:
    step: jax.Array
    params: Params
    moments: dict[str, jax.Array]


def assert_identical(found, wanted) -> None:
    def same(a, b):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)

    jax.tree.map(same, found, wanted)


@pytest.fixture
def converted(tmp_path) -> pathlib.Path:
    config, params = load_checkpoint(TINY)
    save_model(tmp_path / "orbax", params, config)
    return tmp_path / "orbax"


@pytest.fixture
def workdir(tmp_path) -> pathlib.Path:
    """A training's working directory with states of steps 2 and 4; the newer one holds the golden weights."""
    config, params = load_checkpoint(TINY)
    with TrainCheckpoints(tmp_path / "work" / "checkpoints", keep=2) as checkpoints:
        for step, scale in ((2, 0.0), (4, 1.0)):
            scaled = jax.tree.map(lambda leaf: leaf * scale, params)  # noqa: B023, called at once
            checkpoints.save(step, State(jnp.int32(step), scaled, {"m": jnp.ones(3)}), {"epoch": step})
    write_config(config, tmp_path / "work", "float32")
    return tmp_path / "work"


def test_hugging_face_to_orbax_and_back_is_bit_exact(golden, tmp_path):
    config, params = load_checkpoint(golden / "checkpoint")
    save_model(tmp_path / "orbax", params, config)
    config, params = load_checkpoint(tmp_path / "orbax")
    save_params(params, config, tmp_path / "hf")
    assert_same_tensors(read_tensors(tmp_path / "hf"), read_tensors(golden / "checkpoint"))


def test_half_precision_is_kept_and_casts_agree(tmp_path, converted):
    config, half = load_checkpoint(TINY, "bfloat16")
    save_model(tmp_path / "half", half, config)
    assert_identical(load_model(tmp_path / "half", config), half)
    assert_identical(load_model(converted, config, "bfloat16"), half)  # rounded by Orbax as by numpy


@pytest.mark.parametrize("layout", ["hf", "orbax", "train"])
def test_every_layout_loads_onto_a_mesh(layout, converted, workdir):
    directory = {"hf": TINY, "orbax": converted, "train": workdir}[layout]
    assert detect_layout(directory) == layout
    mesh = make_mesh(MeshConfig(data=1, expert=2, tensor=4))
    for rules in (TRAIN, DECODE):
        config, params = load_checkpoint(directory, "bfloat16", mesh, rules)
        assert jax.tree.map(lambda leaf: leaf.sharding, params) == param_shardings(config, mesh, rules)
        assert_identical(params, cast_params(load_params(TINY, config), jnp.bfloat16))


def test_a_model_saved_on_a_mesh_loads_on_another(tmp_path):
    config, params = load_checkpoint(TINY, "float32", make_mesh(MeshConfig(data=1, tensor=4)))
    save_model(tmp_path / "shared", params, config)
    mesh = make_mesh(MeshConfig(data=1, tensor=2))
    _, loaded = load_checkpoint(tmp_path / "shared", mesh=mesh)
    assert loaded.head.sharding.shard_shape(loaded.head.shape) == (config.vocab_size // 2, config.hidden_size)
    assert_identical(loaded, load_params(TINY, config))


def test_ids_can_be_replaced(converted):
    config, _ = load_checkpoint(converted, mask_token_id=5, eos_token_id=6)
    assert (config.mask_token_id, config.eos_token_id) == (5, 6)


def test_directories_without_a_checkpoint_are_named(tmp_path):
    with pytest.raises(InputError, match="absent: no such directory"):
        load_checkpoint(tmp_path / "absent")
    with pytest.raises(InputError, match=r"config.json is missing"):
        detect_layout(tmp_path)
    shutil.copy(TINY / "config.json", tmp_path)
    with pytest.raises(InputError, match=r"no weights beside config.json"):
        detect_layout(tmp_path)
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(InputError, match="checkpoints: no complete checkpoint"):
        load_checkpoint(tmp_path)


def truncate_arrays(directory: pathlib.Path) -> None:
    for file in directory.rglob("ocdbt.process_0/d/*"):
        os.truncate(file, 100)


def truncate_index(directory: pathlib.Path) -> None:
    for file in (directory / "params" / "d").iterdir():
        os.truncate(file, file.stat().st_size // 2)


def truncate_metadata(directory: pathlib.Path) -> None:
    os.truncate(directory / "params" / "_METADATA", 10)


def remove_arrays(directory: pathlib.Path) -> None:
    shutil.rmtree(directory / "params" / "ocdbt.process_0")


@pytest.mark.parametrize("damage", [truncate_arrays, truncate_index, truncate_metadata, remove_arrays])
def test_a_corrupt_model_is_named(converted, damage):
    damage(converted)
    with pytest.raises(InputError, match=r"orbax/params: the checkpoint is corrupt") as caught:
        load_checkpoint(converted)
    assert "\n" not in str(caught.value)


def test_a_model_of_another_shape_is_named(converted):
    shutil.copy(TINY.parents[1] / "grouped" / "checkpoint" / "config.json", converted)
    with pytest.raises(InputError, match=r"parameter layers.3.* is missing"):
        load_checkpoint(converted)
    text = (TINY / "config.json").read_text().replace('"moe_intermediate_size": 32', '"moe_intermediate_size": 16')
    (converted / "config.json").write_text(text)
    with pytest.raises(InputError, match=r"layers.1.mlp.experts.gate is \[16, 32, 64\], config.json asks for"):
        load_checkpoint(converted)


def test_a_failed_save_leaves_nothing_behind(tmp_path, monkeypatch):
    def fail(self, directory, *args, **kwargs):
        (directory / "half").mkdir(parents=True)
        raise ValueError("RESOURCE_EXHAUSTED: Failed to write 9 bytes: No space left on device [os_error_code='28']")

    config, params = load_checkpoint(TINY)
    monkeypatch.setattr(ocp.Checkpointer, "save", fail)
    with pytest.raises(InputError, match="out: the disk is full"):
        save_model(tmp_path / "out", params, config)
    assert list(tmp_path.iterdir()) == []


def test_a_failure_that_is_no_full_disk_stays_what_it_is(tmp_path, monkeypatch):
    def fail(*args, **kwargs):
        raise ValueError("a defect")

    config, params = load_checkpoint(TINY)
    monkeypatch.setattr(ocp.Checkpointer, "save", fail)
    with pytest.raises(ValueError, match="a defect") as caught:
        save_model(tmp_path / "out", params, config)
    assert not isinstance(caught.value, InputError)


@pytest.fixture(params=KINDS)
def kind(request) -> str:
    return request.param


@pytest.fixture
def in_8_bits(tmp_path, kind) -> pathlib.Path:
    config, params = load_checkpoint(TINY, "bfloat16")
    save_model(tmp_path / kind, quantise_params(params, config, kind), config)
    return tmp_path / kind


def test_8_bit_weights_are_stored_as_they_are_and_found_without_being_told(in_8_bits, kind):
    config, params = load_checkpoint(TINY, "bfloat16")
    expected = quantise_params(params, config, kind)
    assert_identical(load_checkpoint(in_8_bits)[1], expected)
    assert_identical(load_checkpoint(in_8_bits, weights=kind)[1], expected)
    _, wide = load_checkpoint(in_8_bits, "float32")
    assert wide.embed.dtype == jnp.float32
    assert_identical(wide.head, expected.head)
    assert_identical(load_checkpoint(in_8_bits, weights="bf16")[1], dequantise_params(expected, jnp.bfloat16))
    _, plain = load_checkpoint(in_8_bits, "float32", weights="bf16")
    assert_identical(plain.head, dequantise_params(expected, jnp.float32).head)
    assert jax.tree.structure(plain) == jax.tree.structure(params)


@pytest.mark.parametrize("layout", ["hf", "orbax"])
def test_8_bit_weights_load_onto_a_mesh(layout, in_8_bits, kind):
    mesh = make_mesh(MeshConfig(data=1, expert=2, tensor=4))
    config, params = load_checkpoint({"hf": TINY, "orbax": in_8_bits}[layout], "bfloat16", mesh, weights=kind)
    shardings = quantised_shardings(param_shardings(config, mesh, DECODE), config)
    assert jax.tree.map(lambda leaf: leaf.sharding, params) == shardings
    assert_identical(params, load_checkpoint(in_8_bits)[1])


def test_an_8_bit_model_of_another_shape_is_named(in_8_bits):
    text = (TINY / "config.json").read_text().replace('"moe_intermediate_size": 32', '"moe_intermediate_size": 16')
    (in_8_bits / "config.json").write_text(text)
    with pytest.raises(InputError, match=r"layers.1.mlp.experts.gate.values is \[16, 32, 64\], config.json asks for"):
        load_checkpoint(in_8_bits)
