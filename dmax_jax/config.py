"""Frozen, validated settings of a model and of a run, and the loader of configuration files."""

import dataclasses
import importlib.util
import pathlib
import typing
from collections.abc import Iterable
from typing import Any

from dmax_jax.errors import InputError


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise InputError(message)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Shape of a LLaDA2-MoE; fields carry the names of the checkpoint's `config.json`."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int  # width of the dense layers' feed-forward
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    num_experts: int
    num_experts_per_tok: int
    n_group: int
    topk_group: int
    num_shared_experts: int
    moe_intermediate_size: int
    first_k_dense_replace: int
    routed_scaling_factor: float
    rope_theta: float
    partial_rotary_factor: float
    rms_norm_eps: float
    mask_token_id: int
    eos_token_id: int
    pad_token_id: int
    max_position_embeddings: int = 32768
    initializer_range: float = 0.02

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.type is int and not field.name.endswith("token_id") and field.name != "first_k_dense_replace":
                _require(value >= 1, f"model: {field.name}={value} must be at least 1")
        for name in ("mask_token_id", "eos_token_id", "pad_token_id"):
            value = getattr(self, name)
            _require(
                0 <= value < self.vocab_size, f"model: {name}={value} is outside the vocabulary of {self.vocab_size}"
            )
        _require(self.mask_token_id != self.eos_token_id, f"model: {self.mask_token_id=} equals eos_token_id")
        _require(
            0 <= self.first_k_dense_replace <= self.num_hidden_layers,
            f"model: first_k_dense_replace={self.first_k_dense_replace} is not within 0..{self.num_hidden_layers}",
        )
        _require(
            self.num_attention_heads % self.num_key_value_heads == 0,
            f"model: num_attention_heads={self.num_attention_heads} is no multiple of "
            f"num_key_value_heads={self.num_key_value_heads}",
        )
        _require(
            self.num_experts % self.n_group == 0,
            f"model: num_experts={self.num_experts} is no multiple of n_group={self.n_group}",
        )
        _require(self.topk_group <= self.n_group, f"model: topk_group={self.topk_group} exceeds n_group={self.n_group}")
        reachable = self.num_experts // self.n_group * self.topk_group
        _require(
            self.num_experts_per_tok <= reachable,
            f"model: num_experts_per_tok={self.num_experts_per_tok} exceeds the {reachable} experts of the kept groups",
        )
        _require(
            0 < self.partial_rotary_factor <= 1 and self.rotary_dim % 2 == 0,
            f"model: partial_rotary_factor={self.partial_rotary_factor} of head_dim={self.head_dim} must give an even "
            "number of rotated dimensions",
        )

    @property
    def rotary_dim(self) -> int:
        return int(self.head_dim * self.partial_rotary_factor)

    @property
    def qkv_rows(self) -> int:
        """Rows of the fused projection: all query heads, then keys, then values."""
        return (self.num_attention_heads + 2 * self.num_key_value_heads) * self.head_dim


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Where training samples come from: JSONL files (`path`) or a task that generates its own (`task`)."""

    tokenizer: str = ""  # directory with tokenizer.json; empty: the initial checkpoint's, else the demo's
    path: str = ""  # a file, or a glob pattern such as answers-*-of-*.jsonl, whose files are read in sorted order
    task: str = ""
    sequence_length: int = 192  # positions per sample, prompt and answer, padded with EOS
    samples: int = 0  # of a task: samples in one epoch
    workers: int = 0  # processes that encode the samples before the first step; 0: the training process itself

    def __post_init__(self):
        _require(
            bool(self.path) != bool(self.task),
            f"data: give exactly one of path={self.path!r} (JSONL) and task={self.task!r} (generator)",
        )
        _require(not self.task or self.samples > 0, f"data: task={self.task!r} needs samples > 0, not {self.samples}")
        _require(self.sequence_length >= 1, f"data: sequence_length={self.sequence_length} must be at least 1")
        _require(self.workers >= 0, f"data: workers={self.workers} must not be negative")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ObjectiveConfig:
    """What is learned: the paper's on-policy uniform training or one of the objectives that it is compared with."""

    kind: str = "oput"  # mdlm | oput | uniform | dparallel
    mask_rate_low: float = 0.75
    mask_rate_high: float = 0.75
    schedule: str = "joint"  # of oput: joint (Eq. 6) | alternating (the official code)
    rollout: str = "argmax"  # of oput: argmax (the official code) | sample (Eq. 3)
    rollout_steps: int = 1  # of oput: how often the model predicts again from its own predictions
    rollout_embedding: str = "hard"  # of oput: hard (the paper) | soft (as soft decoding feeds its predictions back)
    rollout_promotion: str = "all"  # of oput: all masks (the paper) | prefix (as soft decoding does, tau from [0, 1])
    inverse_rate_weight: bool = False  # of mdlm: divide a sample's loss by its mask rate
    certainty: float = 0.0  # of dparallel and oput: weight of the entropy at positions that are already right
    supervised_padding: int = 32  # how many of the trailing EOS of a sample count in the loss

    def __post_init__(self):
        for name, known in (
            ("kind", ("mdlm", "oput", "uniform", "dparallel")),
            ("schedule", ("joint", "alternating")),
            ("rollout", ("argmax", "sample")),
            ("rollout_embedding", ("hard", "soft")),
            ("rollout_promotion", ("all", "prefix")),
        ):
            value = getattr(self, name)
            _require(value in known, f"objective: {name}={value!r} is none of {', '.join(known)}")
        _require(
            0 <= self.mask_rate_low <= self.mask_rate_high <= 1 and self.mask_rate_high > 0,
            f"objective: mask rates {self.mask_rate_low} to {self.mask_rate_high} are no range within 0 to 1",
        )
        _require(
            not self.inverse_rate_weight or self.mask_rate_low > 0,
            "objective: inverse_rate_weight divides by the mask rate; set mask_rate_low above 0",
        )
        _require(self.rollout_steps >= 1, f"objective: rollout_steps={self.rollout_steps} must be at least 1")
        _require(self.certainty >= 0, f"objective: certainty={self.certainty} must not be negative")
        _require(
            self.kind != "dparallel" or self.certainty > 0, "objective: dparallel needs certainty above 0, such as 2"
        )
        _require(
            self.certainty == 0 or self.kind in ("dparallel", "oput"),
            f"objective: certainty={self.certainty} is for dparallel and oput, not for {self.kind}",
        )
        _require(self.supervised_padding >= 0, f"objective: {self.supervised_padding=} must not be negative")


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """AdamW under a linear warm-up and a cosine decay to zero; the defaults are the official hyper-parameters."""

    learning_rate: float = 2e-6
    warmup_ratio: float = 0.03
    beta1: float = 0.9
    beta2: float = 0.999
    weight_decay: float = 0.01
    clip_norm: float = 1.0
    router_bias_rate: float = 0.0  # step of the loss-free load balancing of experts; 0 leaves expert_bias alone

    def __post_init__(self):
        _require(self.learning_rate > 0, f"optimizer: learning_rate={self.learning_rate} must be positive")
        _require(0 <= self.warmup_ratio <= 1, f"optimizer: warmup_ratio={self.warmup_ratio} is not within 0 to 1")
        for name in ("beta1", "beta2"):
            _require(0 <= getattr(self, name) < 1, f"optimizer: {name}={getattr(self, name)} is not within 0 to 1")
        _require(self.weight_decay >= 0, f"optimizer: weight_decay={self.weight_decay} must not be negative")
        _require(self.clip_norm > 0, f"optimizer: clip_norm={self.clip_norm} must be positive")
        _require(self.router_bias_rate >= 0, f"optimizer: router_bias_rate={self.router_bias_rate} is negative")


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshConfig:
    """Devices along each axis; at most one axis may be -1: all devices that the others leave."""

    data: int = -1
    expert: int = 1
    tensor: int = 1

    def __post_init__(self):
        sizes = dataclasses.astuple(self)
        _require(
            all(size >= 1 or size == -1 for size in sizes) and sizes.count(-1) <= 1,
            f"mesh: data={self.data}, expert={self.expert}, tensor={self.tensor}: sizes are positive, one may be -1",
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """When the state is saved, and how many of the newest saves are kept."""

    every_steps: int = 500
    keep: int = 2

    def __post_init__(self):
        _require(self.every_steps >= 1, f"checkpoint: every_steps={self.every_steps} must be at least 1")
        _require(self.keep >= 1, f"checkpoint: keep={self.keep} must be at least 1")


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunConfig:
    """One training run. Starts from `initial_checkpoint` if given, else from random weights of shape `model`."""

    data: DataConfig
    steps: int
    batch_size: int  # sequences per optimiser step, over all devices
    model: ModelConfig | None = None
    initial_checkpoint: str = ""
    block_length: int = 32
    accumulation: int = 1  # parts in which a batch is worked through, to save memory
    dtype: str = "bfloat16"  # of the computation; master weights and moments are float32
    seed: int = 0
    deterministic: bool = False  # the same numbers from every start on GPUs of a kind, at 0.7 times the speed
    log_every: int = 10
    objective: ObjectiveConfig = ObjectiveConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    mesh: MeshConfig = MeshConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()

    def __post_init__(self):
        _require(
            (self.model is None) == bool(self.initial_checkpoint),
            "run: give either model (random weights) or initial_checkpoint, whose config says the model's shape",
        )
        for name in ("steps", "batch_size", "block_length", "accumulation", "log_every"):
            _require(getattr(self, name) >= 1, f"run: {name}={getattr(self, name)} must be at least 1")
        _require(
            self.batch_size % self.accumulation == 0,
            f"run: batch_size={self.batch_size} is no multiple of accumulation={self.accumulation}",
        )
        _require(
            self.data.sequence_length % self.block_length == 0,
            f"run: data.sequence_length={self.data.sequence_length} is no multiple of block_length={self.block_length}",
        )
        _require(self.seed >= 0, f"run: seed={self.seed} must not be negative")
        _require(self.dtype in ("float32", "bfloat16"), f"run: dtype={self.dtype!r} is neither float32 nor bfloat16")


def load_config(path: str, overrides: Iterable[tuple[str, str]] = ()) -> RunConfig:
    """Runs `get_config()` of a Python file and applies overrides such as `("optimizer.learning_rate", "1e-5")`."""
    return override(call_in_file("--config", path, "get_config"), overrides)


def call_in_file(flag: str, path: str, function: str) -> Any:
    """Calls a function of a Python file that a flag names; raises InputError if there is no such file or function."""
    file = pathlib.Path(path)
    _require(file.is_file(), f"{flag}={path}: no such file")
    spec = importlib.util.spec_from_file_location(f"dmax_{file.stem}", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    _require(hasattr(module, function), f"{flag}={path}: the file defines no {function}()")
    return getattr(module, function)()


def override(config: Any, overrides: Iterable[tuple[str, str]], prefix: str = "") -> Any:
    """Returns a copy of a dataclass with the fields at dotted names set from their text, all of them at once."""
    fields = typing.get_type_hints(type(config))
    changes, inner = {}, {}
    for name, text in overrides:
        head, _, rest = name.partition(".")
        known = ", ".join(fields)
        _require(
            head in fields, f"--config.{prefix}{name}: {type(config).__name__} has no field {head!r}, only {known}"
        )
        if rest:
            inner.setdefault(head, []).append((rest, text))
        else:
            changes[head] = _parse(text, fields[head], prefix + name)
    for head, rest in inner.items():
        part = getattr(config, head)
        _require(dataclasses.is_dataclass(part), f"--config.{prefix}{head}.{rest[0][0]}: {prefix}{head} has no fields")
        changes[head] = override(part, rest, f"{prefix}{head}.")
    return dataclasses.replace(config, **changes)


def _parse(text: str, kind: type, name: str) -> Any:
    if kind is bool:
        _require(text.lower() in ("true", "false"), f"--config.{name}={text}: expected true or false")
        return text.lower() == "true"
    _require(kind in (int, float, str), f"--config.{name}: set its fields one by one")
    try:
        return kind(text)
    except ValueError:
        raise InputError(f"--config.{name}={text}: expected {kind.__name__}") from None
