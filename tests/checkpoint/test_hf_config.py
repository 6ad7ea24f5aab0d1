import json
import pathlib

import pytest

from dmax_jax.checkpoint.hf_config import FIXED, read_config, write_config
from dmax_jax.errors import InputError

TINY = pathlib.Path(__file__).parents[1] / "golden" / "tiny" / "checkpoint"
RAW = json.loads((TINY / "config.json").read_text())


def read(directory: pathlib.Path, changes: dict = {}, drop: tuple[str, ...] = (), **ids):  # noqa: B006
    raw = {key: value for key, value in (RAW | changes).items() if key not in drop}
    (directory / "config.json").write_text(json.dumps(raw))
    return read_config(directory, **ids)


def test_written_config_has_the_official_keys_and_values(golden, tmp_path):
    official = json.loads((golden / "checkpoint" / "config.json").read_text())
    write_config(read_config(golden / "checkpoint"), tmp_path, "float32", source=golden / "checkpoint")
    assert json.loads((tmp_path / "config.json").read_text()) == official


def test_a_config_without_source_is_complete(golden, tmp_path):
    config = read_config(golden / "checkpoint")
    write_config(config, tmp_path, "bfloat16")
    written = json.loads((tmp_path / "config.json").read_text())
    assert written.keys() == RAW.keys()
    assert written["torch_dtype"] == "bfloat16"
    assert read_config(tmp_path) == config


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "llama"}, "model_type='llama'"),
        ({"use_qkv_bias": True}, "use_qkv_bias=True"),
        ({"use_bias": True}, "use_bias=True"),
        ({"rope_scaling": {"type": "yarn"}}, "rope_scaling="),
        ({"tie_word_embeddings": True}, "tie_word_embeddings=True"),
        ({"score_function": "softmax"}, "score_function='softmax'"),
        ({"norm_topk_prob": False}, "norm_topk_prob=False"),
        ({"moe_router_enable_expert_bias": False}, "moe_router_enable_expert_bias=False"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu'"),
        ({"use_sliding_window": True}, "use_sliding_window=True"),
        ({"expert_capacity": 2}, "expert_capacity"),
        ({"rotary_dim": 16}, "rotary_dim=16"),
        ({"hidden_size": "64"}, "hidden_size='64' is no integer"),
        ({"n_group": 4.0}, "n_group=4.0 is no integer"),
        ({"rope_theta": True}, "rope_theta=True is no number"),
        ({"n_group": 3}, "num_experts=16 is no multiple of n_group=3"),
        ({"mask_token_id": 512}, "mask_token_id=512 is outside"),
    ],
)
def test_unsupported_values_are_named_with_their_file(tmp_path, changes, message):
    read(tmp_path)  # without the change it is read
    with pytest.raises(InputError) as caught:
        read(tmp_path, changes)
    assert message in str(caught.value)
    assert "config.json: " in str(caught.value)
    assert "\n" not in str(caught.value)


def test_every_fixed_value_is_the_one_that_the_golden_has():
    assert {key: RAW[key] for key in FIXED} == FIXED


@pytest.mark.parametrize("key", ["hidden_size", "head_dim", "num_experts", "rope_theta", "topk_group", "vocab_size"])
def test_a_missing_key_is_named(tmp_path, key):
    with pytest.raises(InputError, match=f"config.json: {key} is missing"):
        read(tmp_path, drop=(key,))


def test_rotary_factor_follows_from_rotary_dim(tmp_path):
    assert read(tmp_path, {"rotary_dim": 4}, drop=("partial_rotary_factor",)).partial_rotary_factor == 0.25
    assert read(tmp_path, drop=("rotary_dim",)).rotary_dim == 8
    with pytest.raises(InputError, match="partial_rotary_factor is missing"):
        read(tmp_path, drop=("partial_rotary_factor", "rotary_dim"))


def test_ids_of_the_llada2_vocabulary_are_known(tmp_path):
    drop = ("mask_token_id", "eos_token_id", "pad_token_id")
    config = read(tmp_path, {"vocab_size": 157184}, drop=drop)
    assert (config.mask_token_id, config.eos_token_id, config.pad_token_id) == (156895, 156892, 156892)
    config = read(tmp_path, {"vocab_size": 157184, "mask_token_id": 7}, drop=drop[1:])
    assert (config.mask_token_id, config.eos_token_id) == (7, 156892)


def test_ids_of_another_vocabulary_must_be_given(tmp_path):
    for key in ("mask_token_id", "eos_token_id"):
        with pytest.raises(InputError, match=f"{key} is missing"):
            read(tmp_path, drop=(key,))
    config = read(tmp_path, drop=("mask_token_id", "eos_token_id"), mask_token_id=3, eos_token_id=0)
    assert (config.mask_token_id, config.eos_token_id, config.pad_token_id) == (3, 0, 509)
    assert read(tmp_path, mask_token_id=3).mask_token_id == 3  # an argument wins over the file


@pytest.mark.parametrize(("text", "message"), [("{", "not JSON"), ("[1]", "expected a JSON object, found list")])
def test_broken_json_is_named(tmp_path, text, message):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(InputError, match=f"config.json: {message}"):
        read_config(tmp_path)


def test_no_config_is_named(tmp_path):
    with pytest.raises(InputError, match=r"config.json: no such file"):
        read_config(tmp_path)
