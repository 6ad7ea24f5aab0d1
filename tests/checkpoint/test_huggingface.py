import json
import pathlib
import shutil

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from dmax_jax.checkpoint import huggingface
from dmax_jax.checkpoint.hf_config import read_config
from dmax_jax.checkpoint.huggingface import load_params, save_params
from dmax_jax.checkpoint.names import tensor_names
from dmax_jax.config import MeshConfig
from dmax_jax.errors import InputError
from dmax_jax.model.params import param_shardings, param_specs
from dmax_jax.sharding import DECODE, make_mesh

TINY = pathlib.Path(__file__).parents[1] / "golden" / "tiny" / "checkpoint"


def read_tensors(directory: pathlib.Path) -> dict[str, np.ndarray]:
    return {name: array for file in directory.glob("*.safetensors") for name, array in load_file(file).items()}


def assert_same_tensors(found: dict[str, np.ndarray], wanted: dict[str, np.ndarray]) -> None:
    assert found.keys() == wanted.keys()
    for name, array in wanted.items():
        assert (found[name].dtype, found[name].shape) == (array.dtype, array.shape), name
        assert found[name].tobytes() == array.tobytes(), name


def write_tiny(directory: pathlib.Path, tensors: dict[str, np.ndarray]) -> pathlib.Path:
    directory.mkdir()
    shutil.copy(TINY / "config.json", directory)
    save_file(tensors, directory / "model.safetensors")
    return directory


def load(directory: pathlib.Path, *args, **kwargs):
    return load_params(directory, read_config(directory), *args, **kwargs)


def test_table_names_every_tensor_of_a_checkpoint_once(golden):
    names = [
        name for stored in jax.tree.leaves(tensor_names(read_config(golden / "checkpoint"))) for name in stored.tensors
    ]
    assert len(names) == len(set(names))
    assert set(names) == read_tensors(golden / "checkpoint").keys()


def test_tensors_go_where_the_table_says(golden):
    tensors, params = read_tensors(golden / "checkpoint"), load(golden / "checkpoint")
    moe = params.layers[1].mlp
    np.testing.assert_array_equal(moe.experts.down[5], tensors["model.layers.1.mlp.experts.5.down_proj.weight"])
    np.testing.assert_array_equal(moe.experts.gate[0], tensors["model.layers.1.mlp.experts.0.gate_proj.weight"])
    np.testing.assert_array_equal(moe.shared.up, tensors["model.layers.1.mlp.shared_experts.up_proj.weight"])
    np.testing.assert_array_equal(moe.expert_bias, tensors["model.layers.1.mlp.gate.expert_bias"])
    np.testing.assert_array_equal(params.layers[0].mlp.gate, tensors["model.layers.0.mlp.gate_proj.weight"])
    np.testing.assert_array_equal(
        params.layers[0].attention.q_norm, tensors["model.layers.0.attention.query_layernorm.weight"]
    )
    np.testing.assert_array_equal(params.head, tensors["lm_head.weight"])


@pytest.mark.parametrize("max_file_bytes", [2**30, 400_000, 1])
def test_saving_gives_the_same_tensors(golden, tmp_path, max_file_bytes):
    config = read_config(golden / "checkpoint")
    save_params(load(golden / "checkpoint"), config, tmp_path / "out", max_file_bytes=max_file_bytes)
    assert_same_tensors(read_tensors(tmp_path / "out"), read_tensors(golden / "checkpoint"))
    assert read_config(tmp_path / "out") == config
    files = list((tmp_path / "out").glob("*.safetensors"))
    assert (len(files) == 1) == (max_file_bytes == 2**30) == (files[0].name == "model.safetensors")
    if max_file_bytes == 400_000:
        assert max(file.stat().st_size for file in files) < 410_000
    jax.tree.map(np.testing.assert_array_equal, load(tmp_path / "out"), load(golden / "checkpoint"))


def test_merged_experts_are_read(tmp_path):
    tensors, config = read_tensors(TINY), read_config(TINY)
    for stored in jax.tree.leaves(tensor_names(config)):
        if stored.merged:
            tensors[stored.merged] = np.stack([tensors.pop(name) for name in stored.tensors])
    merged = write_tiny(tmp_path / "merged", tensors)
    raw = json.loads((merged / "config.json").read_text())
    (merged / "config.json").write_text(json.dumps(raw | {"model_type": "llada2_moe_veomni"}))
    jax.tree.map(np.testing.assert_array_equal, load(merged), load(TINY))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_survives_a_round_trip(tmp_path, dtype):
    config = read_config(TINY)
    params = load(TINY, dtype)
    save_params(params, config, tmp_path / "half")
    tensors = {name: array.astype(jnp.dtype(dtype)) for name, array in read_tensors(TINY).items()}
    tensors |= {name: array for name, array in read_tensors(TINY).items() if name.endswith("expert_bias")}
    assert_same_tensors(read_tensors(tmp_path / "half"), tensors)
    again = load(tmp_path / "half")  # no dtype: as stored
    assert again.embed.dtype == dtype
    assert again.layers[1].mlp.expert_bias.dtype == jnp.float32
    jax.tree.map(np.testing.assert_array_equal, again, params)
    assert json.loads((tmp_path / "half" / "config.json").read_text())["torch_dtype"] == dtype


def test_expert_bias_is_float32_whatever_was_stored(tmp_path):
    half = {name: array.astype(ml_dtypes.bfloat16) for name, array in read_tensors(TINY).items()}
    bias = load(write_tiny(tmp_path / "half", half)).layers[2].mlp.expert_bias
    assert bias.dtype == jnp.float32
    np.testing.assert_array_equal(bias, half["model.layers.2.mlp.gate.expert_bias"].astype(np.float32))


def test_mixed_weights_take_the_dtype_of_the_embeddings(tmp_path):
    tensors = read_tensors(TINY)
    tensors["model.word_embeddings.weight"] = tensors["model.word_embeddings.weight"].astype(ml_dtypes.bfloat16)
    params = load(write_tiny(tmp_path / "mixed", tensors))
    assert {leaf.dtype for leaf in jax.tree.leaves((params.head, params.layers[0]))} == {jnp.dtype(jnp.bfloat16)}


def test_parameters_are_placed_by_shardings():
    config = read_config(TINY)
    shardings = param_shardings(config, make_mesh(MeshConfig(data=1, expert=2, tensor=4)), DECODE)
    params = load_params(TINY, config, shardings=shardings)
    assert jax.tree.map(lambda leaf: leaf.sharding, params) == shardings
    assert params.layers[1].mlp.experts.gate.addressable_shards[0].data.shape == (16, 8, 64)
    jax.tree.map(np.testing.assert_array_equal, params, load(TINY))


def test_companions_and_unknown_config_keys_travel_along(tmp_path):
    source = write_tiny(tmp_path / "source", read_tensors(TINY))
    raw = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(raw | {"auto_map": {"AutoConfig": "x.Y"}, "dtype": "stale"}))
    (source / "tokenizer.json").write_text("{}")
    (source / "chat_template.jinja").write_text("template")
    (source / "optimizer.pt").write_text("left behind")
    save_params(load(source), read_config(source), tmp_path / "out", source=source)
    assert {file.name for file in (tmp_path / "out").iterdir()} == {
        "config.json", "model.safetensors", "tokenizer.json", "chat_template.jinja"
    }  # fmt: skip
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert written["auto_map"] == {"AutoConfig": "x.Y"}
    assert "dtype" not in written


def drop(tensors):
    del tensors["model.layers.1.mlp.experts.3.up_proj.weight"]


def add(tensors):
    tensors["model.layers.7.mlp.gate.weight"] = np.zeros(3, np.float32)


def misshape(tensors):
    tensors["model.layers.2.mlp.experts.9.down_proj.weight"] = np.zeros((32, 64), np.float32)


def retype(tensors):
    tensors["model.norm.weight"] = np.zeros(64, np.int64)


def merge_and_keep(tensors):
    tensors["model.layers.1.mlp.experts.up_proj"] = np.zeros((16, 32, 64), np.float32)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (drop, r"model.layers.1.mlp.experts.3.up_proj.weight \[32, 64\] is missing"),
        (add, r"model.layers.7.mlp.gate.weight has no place"),
        (misshape, r"model.layers.2.mlp.experts.9.down_proj.weight is \[32, 64\], config.json asks for \[64, 32\]"),
        (retype, r"model.norm.weight has dtype I64, not F32, F16, BF16"),
        (merge_and_keep, r"model.layers.1.mlp.experts.0.up_proj.weight has no place .* \(and 15 others\)"),
    ],
)
def test_wrong_tensors_are_named(tmp_path, damage, message):
    tensors = read_tensors(TINY)
    damage(tensors)
    with pytest.raises(InputError, match=message):
        load(write_tiny(tmp_path / "damaged", tensors))


@pytest.mark.parametrize("content", [b"", b"not safetensors at all", None])
def test_unreadable_files_are_named(tmp_path, content):
    shutil.copytree(TINY, tmp_path / "damaged")
    file = tmp_path / "damaged" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-7] if content is None else content)
    with pytest.raises(InputError, match=r"model.safetensors: not a complete safetensors file"):
        load(tmp_path / "damaged")


@pytest.fixture
def shards(tmp_path) -> pathlib.Path:
    return shutil.copytree(TINY.parents[1] / "grouped" / "checkpoint", tmp_path / "shards")


def test_an_index_that_names_a_missing_file(shards):
    (shards / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(InputError, match=r"model-00002-of-00003.safetensors: no such file"):
        load(shards)


def test_shards_without_an_index(shards):
    (shards / "model.safetensors.index.json").unlink()
    with pytest.raises(InputError, match=r"neither model.safetensors nor model.safetensors.index.json"):
        load(shards)


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"weight_map": {"a": 3}}'])
def test_a_broken_index(shards, text):
    (shards / "model.safetensors.index.json").write_text(text)
    with pytest.raises(InputError, match=r"model.safetensors.index.json: "):
        load(shards)


def test_a_tensor_in_two_files(shards):
    first = shards / "model-00001-of-00003.safetensors"
    tensors = load_file(first)
    name = next(iter(load_file(shards / "model-00002-of-00003.safetensors")))
    save_file(tensors | {name: np.zeros(3, np.float32)}, first)
    with pytest.raises(InputError, match=f"tensor {name} lies in another file as well"):
        load(shards)


def test_a_failure_leaves_nothing_behind(tmp_path, monkeypatch):
    config, params = read_config(TINY), load(TINY)
    written = []

    def fail_at_the_second_file(tensors, file, metadata):
        written.append(file)
        if len(written) == 2:
            raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")
        save_file(tensors, file, metadata=metadata)

    monkeypatch.setattr(huggingface, "save_file", fail_at_the_second_file)
    with pytest.raises(InputError, match="out: the disk is full"):
        save_params(params, config, tmp_path / "out", max_file_bytes=400_000)
    assert len(written) == 2
    assert list(tmp_path.iterdir()) == []


def test_an_output_that_holds_something_is_refused(tmp_path):
    (tmp_path / "mine.txt").write_text("precious")
    with pytest.raises(InputError, match="not an empty directory"):
        save_params(load(TINY), read_config(TINY), tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["mine.txt"]


def test_an_empty_output_directory_is_used(tmp_path):
    save_params(load(TINY), read_config(TINY), tmp_path)
    assert_same_tensors(read_tensors(tmp_path), read_tensors(TINY))


def test_experts_are_stacked_in_the_specified_shape(golden):
    config = read_config(golden / "checkpoint")
    shapes = jax.tree.map(lambda leaf: leaf.shape, load(golden / "checkpoint"))
    assert shapes == jax.tree.map(lambda spec: spec.shape, param_specs(config))
