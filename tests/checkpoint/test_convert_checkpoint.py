import json
import pathlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import convert_checkpoint
from dmax_jax import command
from dmax_jax.checkpoint.layout import load_checkpoint
from dmax_jax.kernels.quantised_weight import KINDS
from dmax_jax.model.quantisation import quantise_params
from tests.checkpoint.test_huggingface import TINY, assert_same_tensors, read_tensors, write_tiny

of_both_kinds = pytest.mark.parametrize("kind", KINDS)


def convert(*arguments) -> None:
    argv = ["convert_checkpoint.py", *map(str, arguments)]
    command.run(convert_checkpoint.main, convert_checkpoint.FLAGS, convert_checkpoint.__doc__, argv)


def test_there_and_back(golden, tmp_path, capsys):
    source = shutil.copytree(golden / "checkpoint", tmp_path / "source")
    (source / "tokenizer.json").write_text('{"version": "1.0"}')
    convert(f"--input={source}", f"--output={tmp_path / 'orbax'}")
    assert {path.name for path in (tmp_path / "orbax").iterdir()} == {"config.json", "params", "tokenizer.json"}
    capsys.readouterr()
    convert(f"--input={tmp_path / 'orbax'}", f"--output={tmp_path / 'hf'}", "--max_file_mib=1")
    line = capsys.readouterr().out
    assert line.count("\n") == 1
    assert str(tmp_path / "hf") in line
    tensors = read_tensors(source)
    assert f"{sum(array.size for array in tensors.values()):,} parameters" in line
    assert f"{sum(array.nbytes for array in tensors.values()):,} bytes" in line
    assert_same_tensors(read_tensors(tmp_path / "hf"), tensors)
    assert len(list((tmp_path / "hf").glob("model-*.safetensors"))) > 1
    assert (tmp_path / "hf" / "tokenizer.json").read_text() == '{"version": "1.0"}'
    assert json.loads((tmp_path / "hf" / "config.json").read_text()) == json.loads((source / "config.json").read_text())


def test_the_same_layout_with_another_dtype(tmp_path):
    convert(f"--input={TINY}", f"--output={tmp_path / 'half'}", "--to=hf", "--dtype=bfloat16")
    _, params = load_checkpoint(tmp_path / "half")
    assert params.head.dtype == jnp.bfloat16
    assert params.layers[1].mlp.expert_bias.dtype == jnp.float32


def test_values_beyond_float16_are_refused(tmp_path, capsys):
    tensors = read_tensors(TINY)
    tensors["model.norm.weight"] = np.full(64, 1e6, np.float32)
    source = write_tiny(tmp_path / "source", tensors)
    with pytest.raises(SystemExit) as stop:
        convert(f"--input={source}", f"--output={tmp_path / 'out'}", "--dtype=float16")
    assert stop.value.code == 2
    assert "parameter norm has values beyond 65504" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def missing_input(tmp_path: pathlib.Path) -> tuple[list[str], str]:
    return [f"--input={tmp_path / 'absent'}", f"--output={tmp_path / 'out'}"], "absent: no such directory"


def full_output(tmp_path: pathlib.Path) -> tuple[list[str], str]:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    return [f"--input={TINY}", f"--output={tmp_path / 'full'}"], "full exists and is not an empty directory"


def no_output(tmp_path: pathlib.Path) -> tuple[list[str], str]:
    return [f"--input={TINY}"], "output"


def unknown_layout(tmp_path: pathlib.Path) -> tuple[list[str], str]:
    return [f"--input={TINY}", f"--output={tmp_path / 'out'}", "--to=torch"], "torch"


def truncated_file(tmp_path: pathlib.Path) -> tuple[list[str], str]:
    source = shutil.copytree(TINY, tmp_path / "source")
    (source / "model.safetensors").write_bytes((TINY / "model.safetensors").read_bytes()[:5000])
    return [f"--input={source}", f"--output={tmp_path / 'out'}"], "model.safetensors: not a complete safetensors file"


@of_both_kinds
def test_8_bit_weights(kind, tmp_path, capsys):
    convert(f"--input={TINY}", f"--output={tmp_path / 'small'}", f"--weights={kind}", "--dtype=bfloat16")
    config, params = load_checkpoint(TINY, "bfloat16")
    _, found = load_checkpoint(tmp_path / "small")
    jax.tree.map(np.testing.assert_array_equal, found, quantise_params(params, config, kind))
    assert f"{sum(leaf.nbytes for leaf in jax.tree.leaves(found)):,} bytes" in capsys.readouterr().out


@of_both_kinds
def test_8_bit_weights_become_16_bits_again_for_the_other_layout(kind, tmp_path):
    convert(f"--input={TINY}", f"--output={tmp_path / 'small'}", f"--weights={kind}", "--dtype=bfloat16")
    convert(f"--input={tmp_path / 'small'}", f"--output={tmp_path / 'hf'}", "--to=hf", "--weights=bf16")
    _, expected = load_checkpoint(tmp_path / "small", weights="bf16")
    jax.tree.map(np.testing.assert_array_equal, load_checkpoint(tmp_path / "hf")[1], expected)


def fp8_to_hf(tmp_path: pathlib.Path) -> tuple[list[str], str]:
    arguments = [f"--input={TINY}", f"--output={tmp_path / 'out'}", "--to=hf", "--weights=fp8"]
    return arguments, "8-bit weights have no place in the Hugging Face layout"


def stored_int8_to_hf(tmp_path: pathlib.Path) -> tuple[list[str], str]:
    convert(f"--input={TINY}", f"--output={tmp_path / 'int8'}", "--weights=int8")
    arguments = [f"--input={tmp_path / 'int8'}", f"--output={tmp_path / 'out'}"]
    return arguments, "8-bit weights have no place in the Hugging Face layout"


def stored_int8_to_fp8(tmp_path: pathlib.Path) -> tuple[list[str], str]:
    convert(f"--input={TINY}", f"--output={tmp_path / 'int8'}", "--weights=int8")
    arguments = [f"--input={tmp_path / 'int8'}", f"--output={tmp_path / 'out'}", "--to=orbax", "--weights=fp8"]
    return arguments, "the checkpoint's weights are int8, already rounded; give the model with 16 bits"


@pytest.mark.parametrize(
    "case",
    [
        fp8_to_hf,
        stored_int8_to_hf,
        stored_int8_to_fp8,
        missing_input,
        full_output,
        no_output,
        unknown_layout,
        truncated_file,
    ],
)
def test_errors_are_one_line_and_exit_code_2(case, tmp_path, capsys):
    arguments, message = case(tmp_path)
    with pytest.raises(SystemExit) as stop:
        convert(*arguments)
    last_line = capsys.readouterr().err.splitlines()[-1]
    assert stop.value.code == 2
    assert last_line.startswith("error: ")
    assert message in last_line
    assert not (tmp_path / "out").exists()
