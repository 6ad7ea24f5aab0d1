"""Converts a model between the Hugging Face layout (safetensors) and Orbax's, in either direction.

The input may also be the working directory of a training: its newest state's float32 weights are taken. Tokenizer files
travel along. The model stands in host memory once, plus about 3 GB: a bfloat16 model of 16 billion parameters, 32.5 GB
on disk, needs about 36 GB. No accelerator is used.

    python convert_checkpoint.py --input=LLaDA2.0-mini --output=LLaDA2.0-mini-orbax
    python convert_checkpoint.py --input=LLaDA2.0-mini --output=LLaDA2.0-mini-int8 --weights=int8
    python convert_checkpoint.py --input=runs/math --output=math-hf --dtype=bfloat16
"""

import functools
import pathlib
import sys
import time

import jax
import jax.numpy as jnp
import tqdm
from absl import flags

from dmax_jax import command
from dmax_jax.assets import checkpoint_directory
from dmax_jax.checkpoint.directory import require_free
from dmax_jax.checkpoint.hf_config import read_config
from dmax_jax.checkpoint.huggingface import NO_8_BITS, load_params, save_params
from dmax_jax.checkpoint.layout import LOADERS, detect_layout
from dmax_jax.checkpoint.store import save_model
from dmax_jax.errors import InputError
from dmax_jax.kernels.quantised_weight import KINDS
from dmax_jax.model.params import Params, count_params
from dmax_jax.model.quantisation import in_kind

FLAGS = flags.FlagValues()
INPUT = flags.DEFINE_string(
    "input", None, "Directory of the model, layout detected; demo, demo_base.", FLAGS, required=True
)
OUTPUT = flags.DEFINE_string("output", None, "Directory to write; must be new or empty.", FLAGS, required=True)
TO = flags.DEFINE_enum("to", None, ["orbax", "hf"], "Layout to write; default: the one that the input isn't.", FLAGS)
DTYPE = flags.DEFINE_enum(
    "dtype",
    None,
    ["float32", "bfloat16", "float16"],
    "Of the weights; default: as stored.",
    FLAGS,
)
WEIGHTS = flags.DEFINE_enum(
    "weights", None, ["bf16", *KINDS], "int8, fp8: large matrices in 8 bits (fp8: float8_e4m3fn), a scale per output "
    "channel; for --to=orbax, to decode. bf16: none in 8 bits. Default: as stored.", FLAGS,
)  # fmt: skip
MAX_FILE_MIB = flags.DEFINE_integer("max_file_mib", 4096, "Largest safetensors file, in MiB.", 1, flag_values=FLAGS)
MASK_ID = flags.DEFINE_integer("mask_id", None, "Mask token, if config.json has none.", flag_values=FLAGS)
EOS_ID = flags.DEFINE_integer("eos_id", None, "End token, if config.json has none.", flag_values=FLAGS)


def main() -> None:
    jax.config.update("jax_platforms", "cpu")
    start = time.perf_counter()
    source, output = checkpoint_directory(INPUT.value), pathlib.Path(OUTPUT.value)
    layout = detect_layout(source)
    target = TO.value or ("orbax" if layout == "hf" else "hf")
    config = read_config(source, mask_token_id=MASK_ID.value, eos_token_id=EOS_ID.value)
    require_free(output)
    if target == "hf" and WEIGHTS.value in KINDS:
        raise InputError(NO_8_BITS)
    print(f"reading {source} ({layout})", file=sys.stderr)
    load = functools.partial(load_params, progress=bar("parameters")) if layout == "hf" else LOADERS[layout]
    params = load(source, config, DTYPE.value)
    if DTYPE.value == "float16":
        refuse_overflow(params)
    params = in_kind(params, config, WEIGHTS.value, donate=True)
    print(f"writing {output} ({target})", file=sys.stderr)
    if target == "orbax":
        save_model(output, params, config, source=source)
    else:
        limit = MAX_FILE_MIB.value * 2**20
        save_params(params, config, output, max_file_bytes=limit, source=source, progress=bar("files"))
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    seconds = time.perf_counter() - start
    print(f"{count_params(config):,} parameters, {size:,} bytes, {seconds:.1f} s: {output}")


def bar(unit: str) -> functools.partial:
    return functools.partial(tqdm.tqdm, unit=unit, file=sys.stderr, leave=False)


def refuse_overflow(params: Params) -> None:
    """Raises InputError, naming the parameter, if a weight is beyond float16's largest number, 65504."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        if not jnp.isfinite(leaf).all():
            name = jax.tree_util.keystr(path, simple=True, separator=".")
            raise InputError(f"--dtype=float16: parameter {name} has values beyond 65504; choose bfloat16")


if __name__ == "__main__":
    command.run(main, FLAGS, __doc__)
