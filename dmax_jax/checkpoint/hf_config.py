"""Reading and writing `config.json` of the Hugging Face layout."""

import dataclasses
import json
import pathlib
from typing import Any

from dmax_jax.config import ModelConfig
from dmax_jax.errors import InputError

MODEL_TYPES = ("llada2_moe", "llada2_moe_veomni")

# What the model computes is fixed in these respects: a config that says otherwise describes another model.
FIXED = {
    "use_qkv_bias": False,
    "use_bias": False,
    "rope_scaling": None,
    "tie_word_embeddings": False,
    "score_function": "sigmoid",
    "norm_topk_prob": True,
    "moe_router_enable_expert_bias": True,
    "hidden_act": "silu",
    "use_sliding_window": False,
}
# Keys that the official code reads and that this project has no use for.
OFFICIAL = {
    "architectures": ["LLaDA2MoeModelLM"],
    "use_rmsnorm": True,
    "norm_head": False,
    "norm_softmax": False,
    "router_dtype": "fp32",
    "max_window_layers": 28,
    "output_router_logits": False,
    "attention_dropout": 0.0,
    "embedding_dropout": 0.0,
    "output_dropout": 0.0,
    "use_cache": False,
}
# Some official configs leave their ids to the code; this vocabulary is the one for which they are known.
LLADA2_VOCABULARY = 157184
LLADA2_IDS = {"mask_token_id": 156895, "eos_token_id": 156892}


def read_config(
    directory: str | pathlib.Path, *, mask_token_id: int | None = None, eos_token_id: int | None = None
) -> ModelConfig:
    """Reads a model's shape from `config.json`; ids given here replace the file's.

    Raises InputError, naming file and key, for a missing or ill-typed key and for models that aren't supported.
    """
    file = pathlib.Path(directory) / "config.json"
    raw = read_json(file)
    try:
        _refuse_other_models(raw)
        values = _with_rotary_factor(raw) | _token_ids(raw, mask_token_id, eos_token_id)
        return ModelConfig(
            **{
                field.name: _typed(values, field)
                for field in dataclasses.fields(ModelConfig)
                if field.name in values or field.default is dataclasses.MISSING
            }
        )
    except InputError as error:
        raise InputError(f"{file}: {error}") from None


def write_config(
    config: ModelConfig, directory: str | pathlib.Path, dtype: str, *, source: str | pathlib.Path | None = None
) -> None:
    """Writes a `config.json` that the official code reads too; `dtype` is that of the stored weights.

    Keys of the `config.json` in `source` that this project doesn't know are carried over.
    """
    carried = read_json(pathlib.Path(source) / "config.json") if source else {}
    carried.pop("dtype", None)  # newer name of torch_dtype
    values = OFFICIAL | carried | FIXED | dataclasses.asdict(config)
    values |= {"model_type": MODEL_TYPES[0], "torch_dtype": dtype, "rotary_dim": config.rotary_dim}
    (pathlib.Path(directory) / "config.json").write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def read_json(file: pathlib.Path) -> dict[str, Any]:
    """Reads a JSON object; raises InputError, naming the file, if there is none."""
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{file}: no such file") from None
    except ValueError as error:
        raise InputError(f"{file}: not JSON ({error})") from None
    if not isinstance(value, dict):
        raise InputError(f"{file}: expected a JSON object, found {type(value).__name__}")
    return value


def _refuse_other_models(raw: dict[str, Any]) -> None:
    if raw.get("model_type") not in MODEL_TYPES:
        raise InputError(f"model_type={raw.get('model_type')!r} is not supported, only {' and '.join(MODEL_TYPES)}")
    for key, value in FIXED.items():
        if raw.get(key, value) != value:
            raise InputError(f"{key}={raw[key]!r} is not supported, only {value!r}")
    if "expert_capacity" in raw:
        raise InputError("expert_capacity is not supported: LLaDA2.2-flash routes tokens in another way")


def _with_rotary_factor(raw: dict[str, Any]) -> dict[str, Any]:
    """Old configs give `rotary_dim`, newer ones `partial_rotary_factor`, most of them both."""
    rotary_dim, head_dim = raw.get("rotary_dim"), raw.get("head_dim")
    if rotary_dim is None or not isinstance(head_dim, int) or head_dim < 1:
        return raw
    factor = raw.get("partial_rotary_factor", rotary_dim / head_dim)
    if int(head_dim * factor) != rotary_dim:
        raise InputError(f"rotary_dim={rotary_dim} contradicts partial_rotary_factor={factor} of head_dim={head_dim}")
    return raw | {"partial_rotary_factor": factor}


def _token_ids(raw: dict[str, Any], mask: int | None, eos: int | None) -> dict[str, Any]:
    ids = LLADA2_IDS if raw.get("vocab_size") == LLADA2_VOCABULARY else {}
    for source in (raw, {"mask_token_id": mask, "eos_token_id": eos}):
        ids = ids | {key: source[key] for key in LLADA2_IDS if source.get(key) is not None}
    for key, flag in (("mask_token_id", "--mask_id"), ("eos_token_id", "--eos_id")):
        if key not in ids:
            raise InputError(f"{key} is missing; give it with {flag}")
    pad = raw.get("pad_token_id")
    return ids | {"pad_token_id": ids["eos_token_id"] if pad is None else pad}


def _typed(values: dict[str, Any], field: dataclasses.Field) -> int | float:
    if field.name not in values:
        raise InputError(f"{field.name} is missing")
    value = values[field.name]
    if type(value) is not int and (field.type is int or type(value) is not float):
        raise InputError(f"{field.name}={value!r} is no {'integer' if field.type is int else 'number'}")
    return field.type(value)
