"""The flags that all decoding commands share, and what is built from them: model, policy, settings."""

import copy
import dataclasses
import pathlib
from typing import Any, Self

import jax
from absl import flags

from dmax_jax.assets import checkpoint_directory
from dmax_jax.checkpoint.layout import load_checkpoint
from dmax_jax.config import MeshConfig, ModelConfig
from dmax_jax.data.tokenizer import Tokenizer, load_tokenizer
from dmax_jax.decoding.batch import DecodeSettings
from dmax_jax.decoding.policies import (
    EMBEDDINGS,
    STOP_RULES,
    CreditPolicy,
    HierarchicalPolicy,
    Policy,
    SpdPolicy,
    ThresholdPolicy,
)
from dmax_jax.errors import InputError
from dmax_jax.kernels.quantised_weight import KINDS
from dmax_jax.model.params import Params
from dmax_jax.sharding import make_mesh

WEIGHTS_KINDS = ["bf16", *KINDS]
WEIGHTS_HELP = (
    "int8, fp8: large matrices in 8 bits (fp8: float8_e4m3fn), a scale per output channel, rounded after loading; "
    "bf16: none in 8 bits, all in --dtype; default: as the checkpoint has them."
)
MESH_HELP = "Devices that share the model, such as tensor:2; default: one."
REPEATABLE = ("checkpoint", "method", "threshold")
POLICIES = {"spd": SpdPolicy, "threshold": ThresholdPolicy, "hierarchical": HierarchicalPolicy, "credit": CreditPolicy}


@dataclasses.dataclass(frozen=True)
class LoadedModel:
    config: ModelConfig  # with the ids of the flags, if given
    params: Params
    tokenizer: Tokenizer | None  # None if the checkpoint brings none
    directory: pathlib.Path


class DecodingFlags:
    """Defines the flags in `flag_values`; the other methods read them after parsing.

    With `repeatable`, checkpoint, method and threshold may be given several times; then the other methods are those of
    each of the `runs`.
    """

    def __init__(
        self,
        flag_values: flags.FlagValues,
        *,
        checkpoint: str = "demo",
        method: str = "spd",
        batch_size: int = 1,
        gen_length: int = 256,
        repeatable: bool = False,
    ):
        values = self._values = flag_values
        self._repeatable = repeatable
        self._chosen: dict[str, Any] = {}  # of the repeatable flags, in one of the runs
        define_string, define_enum, define_float = (
            (flags.DEFINE_multi_string, flags.DEFINE_multi_enum, flags.DEFINE_multi_float)
            if repeatable
            else (flags.DEFINE_string, flags.DEFINE_enum, flags.DEFINE_float)
        )
        define_string(
            "checkpoint", checkpoint, "Checkpoint directory: Hugging Face layout, Orbax, or a training's --workdir; "
            "demo and demo_base are the models that come with the package, with and without DMax training.",
            flag_values=values,
        )  # fmt: skip
        define_enum("method", method, list(POLICIES), "How blocks are decoded.", flag_values=values)
        define_float(
            "threshold", None, "Confidence from which a masked token is taken; default: 0.5 for spd, 0.95 for the "
            "others.", flag_values=values,
        )  # fmt: skip
        flags.DEFINE_float("low_threshold", 0.2, "hierarchical: threshold of each run's best.", flag_values=values)
        flags.DEFINE_float(
            "accept_threshold", 0.9, "spd: a block is done when all its tokens are this sure.", flag_values=values
        )
        flags.DEFINE_bool(
            "contiguous_prefix", True, "spd: promote a prefix of the masked positions; off: wherever the threshold is "
            "reached.", flag_values=values,
        )  # fmt: skip
        flags.DEFINE_enum(
            "embedding", "soft", list(EMBEDDINGS), "spd: what a decoded position feeds back; unnormalised leaves out "
            "the paper's Eq. 10.", flag_values=values,
        )  # fmt: skip
        flags.DEFINE_enum("stop", "either", list(STOP_RULES), "spd: when a block is done.", flag_values=values)
        flags.DEFINE_integer(
            "max_steps", None, "Forwards after which a block is left, settled or not; default and most: its length.",
            flag_values=values,
        )  # fmt: skip
        flags.DEFINE_float("temperature", 0.0, "0 takes the best token, above 0 samples.", flag_values=values)
        flags.DEFINE_integer("seed", 0, "Seed of sampling.", flag_values=values)
        flags.DEFINE_integer("gen_length", gen_length, "Answer tokens, rounded up to whole blocks.", flag_values=values)
        flags.DEFINE_integer("block_length", 32, "Positions decoded together.", flag_values=values)
        flags.DEFINE_integer("batch_size", batch_size, "Prompts decoded together.", flag_values=values)
        flags.DEFINE_enum(
            "dtype", None, ["float32", "bfloat16"], "Of weights and computation; default: the checkpoint's own.",
            flag_values=values,
        )  # fmt: skip
        flags.DEFINE_enum("weights", None, WEIGHTS_KINDS, WEIGHTS_HELP, flag_values=values)
        flags.DEFINE_bool(
            "fill_leftover_masks", True, "Give masks that are left when a block ends their best token; off: as the "
            "official code.", flag_values=values,
        )  # fmt: skip
        flags.DEFINE_bool(
            "deterministic", False, "The same answers from every start on GPUs of a kind: products are not chosen by "
            "timing; a batch of other prompts may still round differently.", flag_values=values,
        )  # fmt: skip
        flags.DEFINE_string("mesh", "", MESH_HELP, flag_values=values)
        flags.DEFINE_integer("eos_id", None, "Instead of the checkpoint's own end token.", flag_values=values)
        flags.DEFINE_integer("mask_id", None, "Instead of the checkpoint's own mask token.", flag_values=values)

    def runs(self) -> list[Self]:
        """One for each value of the repeated flags, which are paired in order; a flag given once serves all.

        Raises InputError if their numbers of values don't match.
        """
        given = {name: self._values[name].value or [None] for name in REPEATABLE} if self._repeatable else {}
        count = max(map(len, given.values()), default=1)
        short = {name: value for name, value in given.items() if len(value) not in (1, count)}
        if short:
            (name, value), *_ = short.items()
            longest = next(name for name, value in given.items() if len(value) == count)
            raise InputError(f"--{name} is given {len(value)} times and --{longest} {count}: give one, or as many")
        runs = [copy.copy(self) for _ in range(count)]
        for number, run in enumerate(runs):
            run._chosen = {name: value[number % len(value)] for name, value in given.items()}
        return runs

    def _value(self, name: str) -> Any:
        return self._chosen[name] if name in self._chosen else self._values[name].value

    @property
    def checkpoint(self) -> str:
        return self._value("checkpoint")

    @property
    def method(self) -> str:
        return self._value("method")

    def policy(self) -> Policy:
        policy = POLICIES[self.method]
        names = {field.name for field in dataclasses.fields(policy)}
        given = {name: self._value(name) for name in names if name in self._values}
        return policy(**{name: value for name, value in given.items() if value is not None})

    def settings(self, *, trace: bool = False) -> DecodeSettings:
        values = self._values
        return DecodeSettings(
            gen_length=values.gen_length,
            block_length=values.block_length,
            batch_size=values.batch_size,
            seed=values.seed,
            trace=trace,
            deterministic=values.deterministic,
        )

    def load(self) -> LoadedModel:
        """Loads checkpoint and tokenizer; raises InputError for anything wrong with them."""
        values = self._values
        directory = checkpoint_directory(self.checkpoint)
        mesh = make_mesh(parse_mesh(values.mesh or "tensor:1"))
        config, params = load_checkpoint(
            directory,
            values.dtype,
            mesh,
            mask_token_id=values.mask_id,
            eos_token_id=values.eos_id,
            weights=values.weights,
        )
        has_tokenizer = (directory / "tokenizer.json").exists()
        tokenizer = load_tokenizer(directory, config.mask_token_id) if has_tokenizer else None
        return LoadedModel(config, params, tokenizer, directory)

    def describe(self) -> dict:
        """Method, its settings, and where it ran, for a result's JSON."""
        values = self._values
        return {
            "checkpoint": self.checkpoint,
            "method": self.method,
            "policy": dataclasses.asdict(self.policy()),
            "gen_length": values.gen_length,
            "block_length": values.block_length,
            "batch_size": values.batch_size,
            "seed": values.seed,
            "dtype": values.dtype,
            "weights": values.weights,
            "deterministic": values.deterministic,
            "mesh": values.mesh,
            "eos_id": values.eos_id,
            "mask_id": values.mask_id,
            "device": jax.devices()[0].device_kind,
        }


def parse_mesh(text: str) -> MeshConfig:
    """`tensor:2` as a MeshConfig whose other axes are 1: in decoding they would repeat the work."""
    axis, _, size = text.partition(":")
    if axis != "tensor" or not size.isdecimal():
        raise InputError(f"--mesh={text}: write tensor:N, for the N devices that share the model")
    return MeshConfig(data=1, expert=1, tensor=int(size))
